"""A worker: it asks for a list of passes, judges it and writes down what became of it."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fxopt.search.found import TrialRecord
from fxopt.search.judging import Judging, Task
from fxopt.search.quiet import Turns
from fxopt.search.space import Point, Space
from fxopt.search.storage import put_back, put_back_dead, sign
from fxopt.search.study import (
    MACHINE,
    OUTCOME,
    PASSES,
    plain_outcome,
    record_of,
    records,
    taken,
    this_machine,
)

if TYPE_CHECKING:
    import optuna

# A sampler that proposes what it knows is sent elsewhere.
_MOST_REPEATS = 3
_MOST_POINTS = 20_000
_MOST_DRAWS = 2_000


@dataclass(frozen=True)
class Budget:
    """`trials` that the whole study is to hold; `deadline` in seconds of the epoch, or None."""

    trials: int
    deadline: float | None = None

    def is_spent(self, study: optuna.Study) -> bool:
        """Whether no further trial is to begin."""
        late = self.deadline is not None and time.time() >= self.deadline
        return late or taken(study) >= self.trials


def make_sampler(objectives: int, trials: int, seed: int) -> optuna.samplers.BaseSampler:
    """TPE for one objective, NSGA-II for several; both take the metric's constraint of a trial."""
    from optuna.samplers import NSGAIISampler, TPESampler

    if objectives > 1:
        return NSGAIISampler(seed=seed, population_size=max(4, min(12, trials // 3)))
    return TPESampler(seed=seed, n_startup_trials=max(4, min(10, trials // 3)))


class Worker:
    """One process's part of a search. `tell` gets the record of each trial that it ended."""

    def __init__(
        self,
        study: optuna.Study,
        task: Task,
        space: Space,
        budget: Budget,
        turns: Turns,
        seed: int,
        tell: Callable[[TrialRecord], None] = lambda record: None,
    ) -> None:
        self.study, self.task, self.space = study, task, space
        self.budget, self.turns, self.seed, self.tell = budget, turns, seed, tell
        self.machine = this_machine(study)
        self.repeats = 0
        self.number: int | None = None
        self.notes: list[str] = []

    def run(self) -> bool:
        """Work until the budget is spent or no list is left; False when it was interrupted."""
        while True:
            put_back_dead(self.study)
            if self.budget.is_spent(self.study):
                return True
            if self.repeats >= _MOST_REPEATS:
                point = self._unvisited()
                if point is None:
                    self.notes.append("every list of the space has been tried")
                    return True
                self.study.enqueue_trial(dict(point))
                self.repeats = 0
            if not self._one_trial():
                return False

    def _one_trial(self) -> bool:
        from optuna.exceptions import UpdateFinishedTrialError

        self.number = None
        try:
            self.study.optimize(self._objective, n_trials=1, catch=(Exception,))
        except UpdateFinishedTrialError:
            # It was taken for dead, after a long sleep of the machine, and is in the queue again.
            return True
        except KeyboardInterrupt:
            for trial in self._present():
                put_back(self.study, trial)
            return False
        for trial in self._present():
            record = record_of(trial)
            self.repeats = self.repeats + 1 if record.same_as is not None else 0
            self.tell(record)
        return True

    def _present(self) -> list[optuna.trial.FrozenTrial]:
        """The trial that was begun last, where one was."""
        return [] if self.number is None else [self.study.get_trials(deepcopy=False)[self.number]]

    def _objective(self, trial: optuna.trial.Trial) -> tuple[float, ...]:
        from optuna import TrialPruned

        self.number = trial.number
        sign(trial)
        point = {
            slot.name: str(trial.suggest_categorical(slot.name, slot.choices))
            for slot in self.space.slots
        }
        passes = self.space.passes(point)
        trial.set_user_attr(PASSES, passes)
        trial.set_user_attr(MACHINE, self.machine)
        record = TrialRecord(trial.number, passes, "running", machine=self.machine)
        try:
            record = self._known(record) or self._judged(record)
        except Exception as error:
            record = replace(record, state="failed", reason=f"{type(error).__name__}: {error}")
            trial.set_user_attr(OUTCOME, plain_outcome(record))
            raise
        trial.set_user_attr(OUTCOME, plain_outcome(record))
        if record.metric is not None and "metric" not in trial.constraints:
            trial.set_constraint("metric", self.task.violation(record.metric))
        if record.state == "measured":
            return tuple(record.ratios[name] for name in self.task.objectives)
        if record.state == "infeasible":
            # It has no values; samplers rank it by its violation alone.
            return (float("inf"),) * len(self.task.objectives)
        raise TrialPruned(record.reason)

    def _judged(self, record: TrialRecord) -> TrialRecord:
        if not record.passes:
            reason = "no pass is left: that is the original itself"
            return replace(record, state="pruned", reason=reason)
        rivals = [
            other
            for other in records(self.study)
            if other.state == "measured" and other.machine == self.machine
        ]
        try:
            return Judging(self.task, record, self.turns).run(rivals)
        finally:
            # Graph modules hold themselves in cycles; the next trial needs this one's memory.
            gc.collect()

    def _known(self, record: TrialRecord) -> TrialRecord | None:
        """What became of the same list on this machine before."""
        for other in records(self.study):
            same = other.passes == record.passes and other.machine == self.machine
            if same and other.counts and other.state != "failed":
                return replace(other, number=record.number, same_as=other.number)
        return None

    def _unvisited(self) -> Point | None:
        """A point of a list that this machine hasn't tried; None where none is found."""
        seen = {one.passes for one in records(self.study) if one.machine == self.machine} | {""}
        draw = random.Random(f"{self.seed} {len(seen)}")
        if self.space.size <= _MOST_POINTS:
            lists = {self.space.passes(point): point for point in self.space.points()}
            left = [point for passes, point in lists.items() if passes not in seen]
            return draw.choice(left) if left else None
        for _ in range(_MOST_DRAWS):
            point = {slot.name: draw.choice(slot.choices) for slot in self.space.slots}
            if self.space.passes(point) not in seen:
                return point
        return None
