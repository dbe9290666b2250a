"""Recorded results: the files of benchmarks/results as values.

A file is one JSON object. `machine` is the fingerprint. `systems` holds figures by system:
`median_ms`, `p5_ms`, `p95_ms` where its calls were timed, and whatever else was measured of it.
`ratios` holds, by `"a / b"`, how many times as much `a` costs as `b`, taken round by round
(`median`, `p5`, `p95`), or one number where nothing varies; an entry `"a / b"` of such a spread
beside `ratios` is one of them. Other entries are shown as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IDENTITY = ("cpu", "cores", "threads", "isa", "gpu")
"""What of a fingerprint tells one machine from another; the rest may differ between runs."""

_PARTS = ("median", "p5", "p95")


class ResultsError(ValueError):
    """Results can't be read or compared; says which file, what is wrong, and what to give."""


@dataclass(frozen=True)
class Spread:
    """A median with its 5th and 95th percentile, in any unit; all equal where nothing varies."""

    median: float
    p5: float
    p95: float

    @property
    def varies(self) -> bool:
        return self.p5 < self.p95

    def __str__(self) -> str:
        median, low, high = (
            f"{part:#.3g}".rstrip(".") for part in (self.median, self.p5, self.p95)
        )
        return f"{median} ({low} to {high})" if self.varies else median


@dataclass(frozen=True)
class Result:
    """One file; `more` is what is neither the machine's, a system's nor a ratio."""

    name: str
    machine: Mapping[str, Any]
    systems: Mapping[str, Mapping[str, Any]]
    ratios: Mapping[str, Spread]
    more: Mapping[str, Any]

    @property
    def identity(self) -> tuple[Any, ...]:
        return tuple(self.machine.get(key) for key in IDENTITY)

    def times(self) -> dict[str, Spread]:
        """Milliseconds of each system that was timed, the fastest first."""
        found = {name: time_of(row) for name, row in self.systems.items()}
        timed = {name: time for name, time in found.items() if time is not None}
        return dict(sorted(timed.items(), key=lambda item: item[1].median))

    def others(self) -> dict[str, dict[str, Any]]:
        """What was measured of each system beside its time."""
        return {
            name: {key: value for key, value in row.items() if key not in _TIME_KEYS}
            for name, row in self.systems.items()
        }


_TIME_KEYS = {f"{part}_ms" for part in _PARTS} | {"seconds", "seconds_per_epoch"}


def time_of(row: Mapping[str, Any]) -> Spread | None:
    """Milliseconds out of a system's figures, None where it wasn't timed."""
    if "median_ms" in row:
        return Spread(*(float(row[f"{part}_ms"]) for part in _PARTS))
    seconds = row.get("seconds_per_epoch", row.get("seconds"))
    if seconds is None:
        return None
    found = spread_of(seconds)
    return Spread(1e3 * found.median, 1e3 * found.p5, 1e3 * found.p95)


def spread_of(value: Any) -> Spread:
    """`{"median": ..., "p5": ..., "p95": ...}` or one number.

    Raises `ValueError` for anything else, and for percentiles that don't enclose the median.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Spread(*(float(value),) * 3)
    if not isinstance(value, Mapping) or not all(_is_number(value.get(part)) for part in _PARTS):
        raise ValueError(f"{value!r:.80} is neither a number nor median, p5 and p95")
    found = Spread(*(float(value[part]) for part in _PARTS))
    if not 0 <= found.p5 <= found.median <= found.p95 < float("inf"):
        raise ValueError(f"{value!r:.80}: 0 <= p5 <= median <= p95 doesn't hold")
    return found


def is_spread(value: Any) -> bool:
    """Whether the value is a mapping of a median and its percentiles."""
    return isinstance(value, Mapping) and set(value) == set(_PARTS)


def pair_of(name: str) -> tuple[str, str] | None:
    """The two systems of a ratio's name, `"a / b"`; None where it isn't such a name."""
    first, slash, second = name.partition(" / ")
    return (first, second) if slash else None


def read_results(path: Path) -> list[Result]:
    """The results in a folder (every `*.json`), or the one in a file, in the order of their names.

    Raises `ResultsError` where there are none, and for a file that holds no result.
    """
    if not path.exists():
        raise ResultsError(f"{path} doesn't exist: give a folder of results or one .json file")
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise ResultsError(
            f"{path} holds no .json file: record some with python -m pytest benchmarks --record"
        )
    return [_read(file) for file in files]


def _read(file: Path) -> Result:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{file} can't be read as JSON: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("machine"), dict):
        raise ResultsError(
            f'{file} is no recorded result: it has no "machine"; results are written by '
            "python -m pytest benchmarks --record"
        )
    machine, systems = data.pop("machine"), data.pop("systems", {})
    loose = [name for name, value in data.items() if is_spread(value) and pair_of(name)]
    try:
        stated = {**data.pop("ratios", {}), **{name: data.pop(name) for name in loose}}
        ratios = {name: spread_of(value) for name, value in stated.items()}
        result = Result(file.stem, machine, systems, ratios, data)
        result.times()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ResultsError(f"{file} is damaged: {error}") from error
    return result


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
