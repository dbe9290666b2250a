"""What a run measured: losses of each step, evaluations of each epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fxopt.errors import TrainError
from fxopt.train.terms import Term


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returned after an epoch, at which optimizer step."""

    epoch: int
    step: int
    values: Mapping[str, float]

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value:.4g}" for name, value in self.values.items())
        return f"after epoch {self.epoch} (step {self.step}): {values}"


@dataclass
class History:
    """One entry per optimizer step in each list: `losses["total"]` is the weighted sum, the others
    the terms before their weights, means over the batches of the step and the processes.

    `skipped` counts steps left out since a scaled gradient overflowed.
    """

    losses: dict[str, list[float]] = field(default_factory=dict)
    learning_rates: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    skipped: int = 0

    @property
    def steps(self) -> int:
        """How many optimizer steps were tried."""
        return len(self.learning_rates)

    def line(self) -> str:
        """The last step in words: `loss 0.51 (task 0.42, logits 0.09), lr 3e-05`."""
        last = {name: values[-1] for name, values in self.losses.items() if values}
        total = last.pop("total")
        terms = ", ".join(f"{name} {value:.4g}" for name, value in last.items())
        return f"loss {total:.4g} ({terms}), lr {self.learning_rates[-1]:.3g}"

    def to_plain(self) -> dict[str, Any]:
        """Numbers, lists and dicts, as for JSON."""
        return {
            "losses": {name: list(values) for name, values in self.losses.items()},
            "learning_rates": list(self.learning_rates),
            "evaluations": [
                {"epoch": one.epoch, "step": one.step, "values": dict(one.values)}
                for one in self.evaluations
            ],
            "skipped": self.skipped,
        }

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> History:
        """The history that `to_plain` described."""
        return History(
            {name: list(values) for name, values in plain["losses"].items()},
            list(plain["learning_rates"]),
            [Evaluation(**one) for one in plain["evaluations"]],
            plain["skipped"],
        )

    def __str__(self) -> str:
        if not self.steps:
            return "no step taken"
        skipped = f", {self.skipped} skipped (overflow)" if self.skipped else ""
        ends = f"total {self.losses['total'][0]:.4g} -> {self.losses['total'][-1]:.4g}"
        lines = [f"{self.steps} steps{skipped}; {ends}; last: {self.line()}"]
        return "\n".join([*lines, *map(str, self.evaluations)])


@dataclass(frozen=True)
class Distilled:
    """The student that was handed over, trained; what it learnt from, and how that went.

    `precision` says in what was computed and why; `resumed_at` is the step that a checkpoint held,
    0 for a run from the start.
    """

    student: nn.Module
    history: History
    terms: tuple[Term, ...]
    precision: str
    resumed_at: int = 0

    def __str__(self) -> str:
        terms = " + ".join(map(str, self.terms))
        return f"{terms}\n{self.history}"


def checked_evaluation(values: Any) -> dict[str, float]:
    """What an evaluate= callable returned, as floats; `TrainError` where it isn't numbers."""
    try:
        found = {str(name): float(value) for name, value in dict(values).items()}
    except (TypeError, ValueError) as error:
        raise TrainError(
            f"evaluate= returned {values!r:.80}; it must return a dict of numbers such as "
            "{'accuracy': 0.9}"
        ) from error
    return found


def not_finite(losses: Mapping[str, float]) -> list[str]:
    """The names whose value is infinite or NaN."""
    return [name for name, value in losses.items() if not math.isfinite(value)]
