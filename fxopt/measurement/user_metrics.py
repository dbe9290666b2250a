"""The user's own metrics: functions of a model and data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from fxopt.errors import FxoptError, MeasureError

Metric: TypeAlias = Callable[[Any, Iterable[Any]], "float | Mapping[str, float]"]
Metrics: TypeAlias = "Metric | Mapping[str, Metric]"


def usable_metrics(metric: Metrics | None) -> dict[str, Metric]:
    """The metrics by name. Raises `MeasureError` for what is no function."""
    if metric is None:
        return {}
    named = dict(metric) if isinstance(metric, Mapping) else {_name(metric): metric}
    for name, function in named.items():
        if not callable(function):
            raise MeasureError(
                f"metric= is a function of (model, data), or a dict of them by name; {name!r} is "
                f"{type(function).__name__}"
            )
    return named


def scores(
    metrics: Mapping[str, Metric], model: Any, data: Iterable[Any], who: str
) -> dict[str, float]:
    """What the metrics say of `model`, by name; a metric that returns a dict names its own.

    Raises `MeasureError` where one returns no number, or raises what isn't fxopt's.
    """
    found: dict[str, float] = {}
    for name, metric in metrics.items():
        try:
            result: Any = metric(model, data)
        except FxoptError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise MeasureError(
                f"the metric {name!r} raised {type(error).__name__} for {who}: {error}"
            ) from error
        parts = dict(result) if isinstance(result, Mapping) else {name: result}
        for part, value in parts.items():
            try:
                found[str(part)] = float(value)
            except (TypeError, ValueError) as error:
                raise MeasureError(
                    f"the metric {name!r} returned {value!r:.60} for {who}; it must return a "
                    "number, or a dict of numbers by name"
                ) from error
    return found


def _name(metric: Metric) -> str:
    name: str = getattr(metric, "__name__", "metric")
    return "metric" if name == "<lambda>" else name
