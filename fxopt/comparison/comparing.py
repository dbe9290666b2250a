"""compare: what several models cost and what they are worth, side by side."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

from fxopt.calls import check_batches
from fxopt.comparison.comparison import Comparison
from fxopt.comparison.fields import Failure, Front, Quality, Row
from fxopt.comparison.pareto import pareto_front
from fxopt.errors import MeasureError
from fxopt.measurement.fidelity import Fidelity, fidelity_all
from fxopt.measurement.measuring import measure_all
from fxopt.measurement.outputs import judging
from fxopt.measurement.pair import Pair
from fxopt.measurement.subject import Subject
from fxopt.measurement.user_metrics import Metrics, usable_metrics
from fxopt.timing import fingerprint, ratio

Better = Literal["higher", "lower"]

_COSTS = ("latency", "energy", "memory")
_LONGEST_REASON = 300


def compare(
    models: Mapping[str, Any],
    data: Iterable[Any],
    *,
    inputs: Any = None,
    metric: Metrics | None = None,
    better: Better = "higher",
    labels: Iterable[Any] | None = None,
    reference: str | None = None,
    repeats: int = 10,
    seconds: float = 2.0,
    tokens: int | None = None,
    energy: bool = True,
    estimate: bool = False,
    watts: float | None = None,
    carbon: float | None = None,
    subtract_idle: bool = False,
    count: bool = True,
    new_tokens: int | None = None,
    contexts: Sequence[int] = (0,),
    one_by_one: int | None = None,
) -> Comparison:
    """Measure `models` in turns on `inputs`, and judge them on `data` against the reference.

    `models` are modules, `fxopt.Optimized` or callables by name; `reference` is the name of that
    which the others are held against, the first one if left out. `inputs`, what a call is timed on,
    left out: the first batch of `data`. `metric` (a function of a model and `data`, or a dict of
    such functions), `labels` and `one_by_one` as for `fidelity`, the rest as for `measure`.

    The models are ranked by the first figure of `metric`, of which `better` says which way is
    better; without a metric by accuracy where there are labels, by perplexity for causal language
    models, else by SQNR. A Pareto front is given for latency, for energy where it was measured and
    for the bytes of parameters.

    A model other than the reference that raises is left out, with the reason in `failures`.
    Raises `MeasureError` for no models, an unknown reference or one that can't be called, and what
    `measure` and `fidelity` raise.
    """
    reference = _reference(models, reference)
    if better not in ("higher", "lower"):
        raise MeasureError(f'better={better!r}: say whether "higher" or "lower" is better')
    if inputs is None:
        inputs, data = _first_batch(data, read_again=bool(usable_metrics(metric)))
    failures: list[Failure] = []
    first_calls = _first_calls(models, reference, inputs, failures)
    running = {name: models[name] for name in first_calls}
    measured = measure_all(
        running,
        inputs,
        repeats=repeats,
        seconds=seconds,
        tokens=tokens,
        energy=energy,
        estimate=estimate,
        watts=watts,
        carbon=carbon,
        subtract_idle=subtract_idle,
        count=count,
        new_tokens=new_tokens,
        contexts=contexts,
    )
    worth = fidelity_all(
        models[reference],
        running,
        data,
        metric=metric,
        labels=labels,
        one_by_one=one_by_one,
        failed=lambda name, error: failures.append(Failure(name, _reason(error))),
    )
    basis = measured[reference].latency
    rows = tuple(
        Row(
            number,
            name,
            replace(found, first_call_seconds=first_calls[name]),
            ratio(found.latency, basis),
            worth.get(name),
        )
        for number, (name, found) in enumerate(measured.items(), start=1)
    )
    quality = _quality(worth, better)
    return Comparison(
        reference, rows, quality, _fronts(rows, quality), tuple(failures), fingerprint()
    )


def _reference(models: Any, reference: str | None) -> str:
    if not isinstance(models, Mapping) or not models:
        raise MeasureError("compare() takes models as {name: model}, at least one")
    names = [str(name) for name in models]
    if reference is None:
        return names[0]
    if reference not in models:
        raise MeasureError(f"reference={reference!r} is none of the models: {', '.join(names)}")
    return reference


def _first_batch(data: Any, read_again: bool) -> tuple[Any, Any]:
    """The first batch, and data that still has it."""
    check_batches(data, "data", MeasureError)
    stream = iter(data)
    try:
        first = next(stream)
    except StopIteration:
        raise MeasureError(
            "data gave no batch at all, so there is nothing to time the models on"
        ) from None
    if stream is data and not read_again:
        return first, chain([first], stream)
    return first, data


def _first_calls(
    models: Mapping[str, Any], reference: str, inputs: Any, failures: list[Failure]
) -> dict[str, float]:
    """Seconds of the first call, compilation and all, of each model that can be called."""
    seconds = {}
    with judging(models.values()):
        for name, model in models.items():
            subject = Subject.of(model, inputs, name)
            started = time.perf_counter()
            try:
                subject()
                subject.synchronize()
            except Exception as error:
                if name == reference:
                    raise MeasureError(
                        f"the reference {name!r} can't be called with the inputs: {_reason(error)}"
                    ) from error
                failures.append(Failure(name, _reason(error)))
                continue
            seconds[name] = time.perf_counter() - started
    return seconds


def _quality(worth: Mapping[str, Fidelity], better: Better) -> Quality:
    found = list(worth.values())
    if metric := next((name for each in found for name in each.metrics), None):
        values = {name: each.metrics[metric] for name, each in worth.items() if each.metrics}
        return Quality(metric, "", better, _candidates(values))
    accuracy = {name: each.accuracy for name, each in worth.items() if each.accuracy}
    if accuracy:
        return Quality("accuracy", "", "higher", _candidates(accuracy))
    perplexity = {name: each.perplexity for name, each in worth.items() if each.perplexity}
    if perplexity:
        return Quality("perplexity", "", "lower", _candidates(perplexity))
    return Quality("SQNR", "dB", "higher", {name: each.sqnr_db for name, each in worth.items()})


def _candidates(pairs: Mapping[str, Pair]) -> dict[str, float]:
    return {name: pair.candidate for name, pair in pairs.items()}


def _fronts(rows: Iterable[Row], quality: Quality) -> tuple[Front, ...]:
    sign = -1.0 if quality.better == "higher" else 1.0
    fronts = []
    for kind in _COSTS:
        points = {
            row.name: (cost, sign * quality.values[row.name])
            for row in rows
            if (cost := row.cost(kind)) is not None and row.name in quality.values
        }
        if points:
            fronts.append(Front(kind, pareto_front(points)))
    return tuple(fronts)


def _reason(error: Exception) -> str:
    line = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {line}"[:_LONGEST_REASON]
