"""How a trial ends in the storage, also where another process has ended it already."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fxopt.search.found import TrialRecord
from fxopt.search.signs_of_life import OUTCOME, WORKER, signature
from fxopt.search.space import Space
from fxopt.search.study import INSTEAD_OF, MACHINE, PASSES, plain_outcome, recorded_anew

if TYPE_CHECKING:
    import optuna

_CONSTRAINT = "metric"


@dataclass(frozen=True)
class Ending:
    """What became of a trial, as optuna takes it.

    `violation` is how far its metric is beyond what is allowed; None where it wasn't judged.
    """

    record: TrialRecord
    objectives: tuple[str, ...]
    violation: float | None

    @property
    def state(self) -> optuna.trial.TrialState:
        """Complete where samplers are to learn from it."""
        from optuna.trial import TrialState

        if self.record.state in ("measured", "infeasible"):
            return TrialState.COMPLETE
        return TrialState.FAIL if self.record.state == "failed" else TrialState.PRUNED

    @property
    def values(self) -> list[float] | None:
        """By objective; a list that doesn't keep the metric has none, its violation ranks it."""
        if self.record.state == "infeasible":
            return [math.inf] * len(self.objectives)
        if self.record.state == "measured":
            return [self.record.ratios[name] for name in self.objectives]
        return None


def write(study: optuna.Study, trial: optuna.trial.Trial, ending: Ending) -> None:
    """End a trial.

    Raises `UpdateFinishedTrialError` or `ValueError` where another process has ended it.
    """
    trial.set_user_attr(OUTCOME, plain_outcome(ending.record))
    if ending.violation is not None and _CONSTRAINT not in trial.constraints:
        trial.set_constraint(_CONSTRAINT, ending.violation)
    study.tell(trial, ending.values, ending.state)


def write_anew(
    study: optuna.Study, ending: Ending, point: Mapping[str, str], space: Space
) -> TrialRecord:
    """The record, found at `point` of `space`, as a further trial in place of the one ended."""
    import optuna

    record = ending.record
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        slot.name: optuna.distributions.CategoricalDistribution(slot.choices)
        for slot in space.slots
    }
    study.add_trial(
        optuna.create_trial(
            state=ending.state,
            values=ending.values,
            params=dict(point),
            distributions=distributions,
            user_attrs={
                PASSES: record.passes,
                MACHINE: record.machine,
                OUTCOME: plain_outcome(record),
                INSTEAD_OF: record.number,
                WORKER: signature(),
            },
            constraints=None if ending.violation is None else {_CONSTRAINT: ending.violation},
        )
    )
    number = recorded_anew(study.get_trials(deepcopy=False))[record.number]
    return replace(record, number=number)
