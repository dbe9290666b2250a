"""What a search makes small, in which unit, and whether this machine can measure it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fxopt.errors import SearchError

UNITS: Mapping[str, str] = {"latency": "ms", "memory": "bytes", "energy": "j"}
"""The objectives and the units of their values: milliseconds a call; bytes of the parameters plus
the extra bytes of a call at its peak; joules a call."""


def key(objective: str) -> str:
    """The name under which an objective's value is given: `latency_ms`."""
    return f"{objective}_{UNITS[objective]}"


@dataclass(frozen=True)
class Measured:
    """What a candidate costs beside the original, both measured in turns.

    `values` and `original` by `key`; `ratios` by objective, candidate over original, taken round by
    round where there are rounds.
    """

    values: Mapping[str, float]
    original: Mapping[str, float]
    ratios: Mapping[str, float]

    def __post_init__(self) -> None:
        for name in ("values", "original", "ratios"):
            numbers = {which: float(number) for which, number in getattr(self, name).items()}
            object.__setattr__(self, name, numbers)


Measure = Callable[[Any, Any, Any, tuple[str, ...]], Measured]
"""(original, candidate, inputs, objectives) -> what the candidate costs beside the original."""


def checked_objectives(given: str | Iterable[str]) -> tuple[str, ...]:
    """The objectives as a tuple. Raises `SearchError` for none, an unknown one, one twice."""
    objectives = (given,) if isinstance(given, str) else tuple(given)
    unknown = [one for one in objectives if one not in UNITS]
    if unknown or not objectives or len(set(objectives)) < len(objectives):
        raise SearchError(
            f"objectives={objectives!r}: give one or more of {', '.join(UNITS)}, each once"
        )
    return objectives


def checked_measured(found: Any, objectives: tuple[str, ...]) -> Measured:
    """What a measuring function returned. Raises `SearchError` where an objective has no number."""
    for objective in objectives:
        value = found.ratios.get(objective) if isinstance(found, Measured) else None
        if value is None or not math.isfinite(value):
            raise SearchError(
                f"measure= returned {found!r:.80}: it must return a Measured with a finite ratio "
                f"for {objective!r}"
            )
    return found  # type: ignore[no-any-return]
