"""What got worse between two runs of the benchmarks, beyond the noise.

Only ratios are compared: systems of one round feel a busy machine alike, so that a ratio taken
round by round survives it, and milliseconds of two runs are never set side by side. A ratio "a / b"
counts as a matter of `a`: higher is worse.

**Beyond the noise.** Let m, l, h be the median and the 5th and 95th percentile of a ratio over its
rounds. From old to new the ratio has grown by the factor m'/m. It is worse beyond the noise where

    log(m'/m)  >  max( log 1.05,  sqrt( log²(h/m) + log²(m'/l') ) )

and better where the same holds with the two runs exchanged. The root adds, as independent errors
are added, the halves of the two spreads that face each other: by how far a single round of the old
run may lie above its median, and one of the new run below. A median is steadier than a round, so
that this asks for more than statistics alone would; it allows for what a spread doesn't show, the
machine drifting between two runs. 5 % is by how much repeated runs differ on a quiet machine, and
all there is where a ratio was recorded as one number.

**Fidelity** has no spread: it changes only with the code or a library. A system that stands first
in a ratio is worse where a figure of `TOLERANCES` is off by more than is said there. Above 100 dB
only the rounding of float32 differs.

Results of two machines aren't compared; neither is what only one of the runs has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from benchmarks.recorded import IDENTITY, Result, ResultsError, Spread, pair_of

_FLOOR = 0.05
_ROUNDING_DB = 100.0


class Verdict(Enum):
    """How the new run stands to the old one."""

    WORSE = "worse"
    BETTER = "better"
    SAME = "same"


@dataclass(frozen=True)
class Change:
    """One figure in both runs, as text; `detail` says what changed and what noise allows."""

    name: str
    old: str
    new: str
    verdict: Verdict
    detail: str

    def __str__(self) -> str:
        return f"{self.verdict.value:<7} {self.name}: {self.old} -> {self.new}, {self.detail}"


@dataclass(frozen=True)
class Difference:
    """A result in both runs: every change, and what of the old run the new one lacks.

    `refusal` says why the two aren't compared; there are no changes then.
    """

    result: str
    changes: tuple[Change, ...] = ()
    gone: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    refusal: str = ""

    @property
    def regressions(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.verdict is Verdict.WORSE)


def growth(old: Spread, new: Spread) -> float:
    """The logarithm of the factor by which the median grew; infinite from or to 0."""
    if old.median == new.median:
        return 0.0
    if old.median == 0 or new.median == 0:
        return math.inf if old.median == 0 else -math.inf
    return math.log(new.median / old.median)


def noise(old: Spread, new: Spread) -> float:
    """The logarithm of the factor that the spreads of both runs allow, at least that of 1.05."""
    low, high = (old, new) if new.median >= old.median else (new, old)
    above = math.log(low.p95 / low.median) if low.median > 0 else 0.0
    below = math.log(high.median / high.p5) if high.p5 > 0 else 0.0 if not high.p95 else math.inf
    return max(math.log1p(_FLOOR), math.hypot(above, below))


def judge(old: Spread, new: Spread) -> Verdict:
    """Worse, better, or the same within the noise, as the head of this file defines it."""
    grown, allowed = growth(old, new), noise(old, new)
    if abs(grown) <= allowed:
        return Verdict.SAME
    return Verdict.WORSE if grown > 0 else Verdict.BETTER


@dataclass(frozen=True)
class Tolerance:
    """By how much a figure of fidelity may fall (`higher`: more is better) or rise."""

    by: float
    higher: bool = True
    relative: bool = False
    cap: float = math.inf

    def judge(self, old: float, new: float) -> Verdict:
        old, new = min(old, self.cap), min(new, self.cap)
        lost = (old - new if self.higher else new - old) / (abs(old) or 1 if self.relative else 1)
        if abs(lost) <= self.by:
            return Verdict.SAME
        return Verdict.WORSE if lost > 0 else Verdict.BETTER


TOLERANCES: Mapping[str, Tolerance] = {
    "sqnr_db": Tolerance(1.0, cap=_ROUNDING_DB),
    "cosine_mean": Tolerance(0.001),
    "same_neighbour": Tolerance(0.02),
    "accuracy_mean": Tolerance(0.01),
    "perplexity": Tolerance(0.01, higher=False, relative=True),
    "peak_bytes": Tolerance(0.05, higher=False, relative=True),
}
"""The figures of a system that are compared beside ratios, and what is allowed."""


def differences(old: Sequence[Result], new: Sequence[Result]) -> list[Difference]:
    """Each result of the old run beside the new one of the same name, or two single ones.

    Raises `ResultsError` where the runs have no result in common.
    """
    by_name = {result.name: result for result in new}
    if len(old) == len(new) == 1:
        by_name = {old[0].name: new[0]}
    if not any(result.name in by_name for result in old):
        raise ResultsError(
            "the two runs have no result in common: "
            f"{_listed([r.name for r in old])} and {_listed([r.name for r in new])}"
        )
    return [
        compare(result, by_name[result.name])
        if result.name in by_name
        else Difference(result.name, refusal="the new run doesn't have it")
        for result in old
    ]


def compare(old: Result, new: Result) -> Difference:
    """The changes from one result to another of the same benchmark."""
    if old.identity != new.identity:
        unlike = [key for key in IDENTITY if old.machine.get(key) != new.machine.get(key)]
        told = ", ".join(f"{k} {old.machine.get(k)} and {new.machine.get(k)}" for k in unlike)
        return Difference(old.name, refusal=f"measured on different machines ({told})")
    changes = [*_ratio_changes(old, new), *_fidelity_changes(old, new)]
    gone = [name for name in old.ratios if name not in new.ratios]
    notes = [
        f"{key} {old.machine[key]} -> {new.machine.get(key)}"
        for key in ("python", "torch", "transformers", "fxopt")
        if key in old.machine and old.machine[key] != new.machine.get(key)
    ]
    return Difference(old.name, tuple(changes), tuple(gone), tuple(notes))


def render(found: Sequence[Difference]) -> str:
    """The differences as lines: what changed by name, what didn't by number, and the sum."""
    lines: list[str] = []
    for difference in found:
        lines.append(f"{difference.result}")
        if difference.refusal:
            lines.append(f"  not compared: {difference.refusal}")
            continue
        lines += [f"  note: {note}" for note in difference.notes]
        moved = [c for c in difference.changes if c.verdict is not Verdict.SAME]
        lines += [
            f"  {change}" for change in sorted(moved, key=lambda c: c.verdict.value != "worse")
        ]
        within = len(difference.changes) - len(moved)
        lines.append(f"  same    {within} of {len(difference.changes)} figures, within the noise")
        lines += [f"  gone    {name}: the new run doesn't have it" for name in difference.gone]
    compared = [difference for difference in found if not difference.refusal]
    worse = sum(len(difference.regressions) for difference in found)
    plural = "regression" if worse == 1 else "regressions"
    lines += [
        "",
        f"{worse} {plural} beyond the noise; {len(compared)} of {len(found)} results compared",
    ]
    return "\n".join(lines)


def _ratio_changes(old: Result, new: Result) -> Iterator[Change]:
    for name, before in old.ratios.items():
        after = new.ratios.get(name)
        if after is not None:
            grown, allowed = _percent(growth(before, after)), _percent(noise(before, after))
            detail = f"{grown}, the noise allows {allowed.lstrip('+')}"
            yield Change(name, str(before), str(after), judge(before, after), detail)


def _fidelity_changes(old: Result, new: Result) -> Iterator[Change]:
    """Of the systems that stand first in a ratio: the others are what they are measured against."""
    judged = {pair[0] for name in old.ratios if (pair := pair_of(name)) is not None}
    for system in (name for name in old.systems if name in judged and name in new.systems):
        for figure, tolerance in TOLERANCES.items():
            values = old.systems[system].get(figure), new.systems[system].get(figure)
            if all(isinstance(value, (int, float)) for value in values):
                yield _fidelity_change(f"{figure} of {system}", *values, tolerance)


def _fidelity_change(name: str, old: Any, new: Any, tolerance: Tolerance) -> Change:
    show: Callable[[float], str] = "{:.6g}".format
    unit = f"{100 * tolerance.by:g} %" if tolerance.relative else f"{tolerance.by:g}"
    verdict = tolerance.judge(old, new)
    return Change(name, show(old), show(new), verdict, f"{unit} allowed")


def _percent(logarithm: float) -> str:
    return f"{100 * math.expm1(logarithm):+.0f} %" if math.isfinite(logarithm) else "without bound"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
