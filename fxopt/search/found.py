"""What a search found: its trials, the front of those that keep the metric, the best of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fxopt.comparison.pareto import pareto_front
from fxopt.search.objectives import UNITS, key
from fxopt.search.space import Space

State = Literal["measured", "infeasible", "pruned", "failed", "lost", "running", "waiting"]
_ENDED = ("measured", "infeasible", "pruned", "failed")


@dataclass(frozen=True)
class TrialRecord:
    """One list of passes and what became of it.

    `state`: "measured" (it keeps the metric and was timed), "infeasible" (it doesn't keep it, so it
    was not timed), "pruned" (it is no list that holds, or can't beat the front), "failed" (an error
    that isn't fxopt's, an interrupt, a worker that died), "running", "waiting"; `reason` says why.
    `values` and `original` are by objective and unit, `ratios` by objective. `metric` is the
    candidate's as it was judged last, `machine` the key of the fingerprint it was measured under,
    and `same_as` the trial that had made the same list before.
    """

    number: int
    passes: str
    state: State
    reason: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    original: Mapping[str, float] = field(default_factory=dict)
    ratios: Mapping[str, float] = field(default_factory=dict)
    metric: float | None = None
    machine: str = ""
    seconds: float | None = None
    same_as: int | None = None

    @property
    def counts(self) -> bool:
        """Whether it used up one of the trials that were asked for."""
        return self.state in _ENDED and self.same_as is None

    def __str__(self) -> str:
        costs = ", ".join(f"{name} {ratio:.3f}x" for name, ratio in self.ratios.items())
        judged = "" if self.metric is None else f"metric {self.metric:.4g}"
        again = "" if self.same_as is None else f"as trial {self.same_as}"
        reason = self.reason.partition("\n")[0]
        said = "; ".join(filter(None, [again, costs, judged, reason]))
        return f"trial {self.number}, {self.state}: {self.passes or 'no pass'} ({said})"


@dataclass(frozen=True)
class Candidate:
    """A list of passes on the front: `fxopt.transform(model, candidate.passes)` makes it again.

    `values` such as `latency_ms`, `ratios` of them to the original's in the same rounds, the
    `metric` of the finished model, and the number of its `trial`.
    """

    passes: str
    values: Mapping[str, float]
    ratios: Mapping[str, float]
    metric: float
    trial: int

    def __str__(self) -> str:
        costs = ", ".join(
            f"{shown(name, self.values[key(name)])} ({ratio:.2f}x)"
            for name, ratio in self.ratios.items()
        )
        return f"{costs}, metric {self.metric:.4g}: {self.passes}"


@dataclass(frozen=True)
class Found:
    """The outcome of a search; prints as a table.

    `pareto` is the front measured on this machine, of candidates that keep the metric: no other is
    as low in each objective and lower in one. `fronts` has every machine's by its key, and
    `machines` their fingerprints; they are never mixed. `original_metric` and `threshold` are what
    the metric was and had to be. `interrupted` tells of a Ctrl-C, `notes` what else to know.
    """

    objectives: tuple[str, ...]
    trials: tuple[TrialRecord, ...]
    machine: str
    machines: Mapping[str, Mapping[str, Any]]
    original_metric: float
    threshold: float
    space: Space
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    @property
    def fronts(self) -> dict[str, tuple[Candidate, ...]]:
        """The Pareto front of each machine, by first objective."""
        keys = dict.fromkeys(trial.machine for trial in self.trials if trial.ratios)
        return {
            machine: front([t for t in self.trials if t.machine == machine], self.objectives)
            for machine in keys
        }

    @property
    def pareto(self) -> tuple[Candidate, ...]:
        """The front measured on this machine."""
        return self.fronts.get(self.machine, ())

    @property
    def best(self) -> Candidate | None:
        """The candidate of the front with the least product of its ratios; None without any."""
        return min(self.pareto, key=lambda one: math.prod(one.ratios.values()), default=None)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "objectives": list(self.objectives),
            "metric": {"original": self.original_metric, "threshold": self.threshold},
            "machine": self.machine,
            "machines": {name: dict(one) for name, one in self.machines.items()},
            "pareto": [_plain(candidate) for candidate in self.pareto],
            "best": self.best.passes if self.best else None,
            "trials": [_plain(trial) for trial in self.trials],
            "space": self.space.to_plain(),
            "interrupted": self.interrupted,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        counts = Counter(str(trial.state) for trial in self.trials if trial.counts)
        told = ", ".join(f"{counts[state]} {state}" for state in _ENDED if counts[state])
        lines = [
            f"search over {', '.join(self.objectives)}: {told or 'no trial finished'}",
            f"metric of the original {self.original_metric:.4g}, allowed {self.threshold:.4g}",
        ]
        lines += [f"  {candidate}" for candidate in self.pareto]
        if not self.pareto:
            lines.append("  no list measured on this machine keeps the metric")
        for machine, others in self.fronts.items():
            if machine != self.machine:
                cpu = self.machines.get(machine, {}).get("cpu", machine)
                lines.append(
                    f"  {len(others)} more on the front of another machine ({cpu}), not comparable "
                    f"with these: fronts[{machine!r}]"
                )
        if self.interrupted:
            lines.append("interrupted: what was measured before is kept")
        return "\n".join([*lines, *self.notes])


def front(trials: Iterable[TrialRecord], objectives: Sequence[str]) -> tuple[Candidate, ...]:
    """The Pareto front of the measured trials, the lowest in the first objective first.

    A list that was drawn twice stands on it once.
    """
    measured = {
        one.number: one for one in trials if one.state == "measured" and one.same_as is None
    }
    costs = {number: [one.ratios[name] for name in objectives] for number, one in measured.items()}
    return tuple(_candidate(measured[number]) for number in pareto_front(costs))


def _candidate(one: TrialRecord) -> Candidate:
    values, ratios = dict(one.values), dict(one.ratios)
    return Candidate(one.passes, values, ratios, float(one.metric or 0), one.number)


def shown(objective: str, value: float) -> str:
    """A value to read: `21.3 ms`, `45.1 MB`, `0.8 J`."""
    if objective == "memory":
        return f"{value / 1e6:.3g} MB"
    return f"{value:.3g} {UNITS[objective].upper() if objective == 'energy' else UNITS[objective]}"


def _plain(one: TrialRecord | Candidate) -> dict[str, Any]:
    return {
        name: dict(value) if isinstance(value, Mapping) else value
        for name, value in vars(one).items()
    }
