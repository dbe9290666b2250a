"""How ours stand beside the others in a result: the fastest of both sides, and by how much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.recorded import Result, Spread, pair_of

_OURS = "fxopt"


@dataclass(frozen=True)
class Standing:
    """The fastest of ours and of the others in one result, and the ratio where it was taken."""

    result: str
    ours: str
    ours_ms: Spread
    other: str
    other_ms: Spread
    ratio: Spread | None


@dataclass(frozen=True)
class Behind:
    """A system that is faster than the fastest of ours, in every round but one in twenty."""

    result: str
    ours: str
    other: str
    ratio: Spread


def is_ours(system: str) -> bool:
    """Whether a system is a list of passes of this package."""
    return system.split(" ")[0] == _OURS


def standings(results: Sequence[Result]) -> list[Standing]:
    """One for each result in which both sides were timed."""
    return [found for result in results if (found := _standing(result)) is not None]


def behind(results: Sequence[Result]) -> list[Behind]:
    """Where the fastest of ours is slower than another system, by more than the spread."""
    return [found for result in results for found in _behind(result)]


def outcome(ratio: Spread) -> str:
    """`good` where even the 95th percentile is below 1, `bad` where even the 5th is above."""
    return "good" if ratio.p95 < 1 else "bad" if ratio.p5 > 1 else ""


def _standing(result: Result) -> Standing | None:
    times = _contestants(result)
    ours = next((name for name in times if is_ours(name)), None)
    other = next((name for name in times if not is_ours(name)), None)
    if ours is None or other is None:
        return None
    ratio = result.ratios.get(f"{ours} / {other}")
    return Standing(result.name, ours, times[ours], other, times[other], ratio)


def _behind(result: Result) -> Iterator[Behind]:
    times = _contestants(result)
    fastest = next((name for name in times if is_ours(name)), None)
    for name, ratio in result.ratios.items():
        first, other = pair_of(name) or ("", "")
        if first == fastest and other in times and not is_ours(other) and ratio.p5 > 1:
            yield Behind(result.name, first, other, ratio)


def _contestants(result: Result) -> dict[str, Spread]:
    """The times of what gives the model's outputs: a floor, timed alongside, gives none."""
    judged = {name for name, row in result.systems.items() if "sqnr_db" in row}
    return {name: time for name, time in result.times().items() if name in judged or not judged}
