"""A worker: it asks for a list of passes, judges it and writes down what became of it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fxopt.search.ending import Ending, write, write_anew
from fxopt.search.found import TrialRecord
from fxopt.search.interrupts import held_back
from fxopt.search.judging import Judging, Task
from fxopt.search.leftovers import Leftovers
from fxopt.search.quiet import Turns
from fxopt.search.signs_of_life import beating, begin_trial, give_back, is_ended, put_back_dead
from fxopt.search.space import Point, Space
from fxopt.search.staged import Captures
from fxopt.search.study import MACHINE, PASSES, records, taken, this_machine

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
        self.captures = Captures(task.model)
        self.repeats = 0
        self.number: int | None = None
        self.notes: list[str] = []

    def run(self) -> bool:
        """Work until the budget is spent or no list is left; False when it was interrupted.

        However it ends, but for a kill, no trial of its own is left running.
        """
        try:
            with Leftovers() as leftovers:
                self._work(leftovers)
        except BaseException as end:
            if self.number is not None:
                # Neither a second Ctrl-C nor a storage that has failed hides the reason.
                with suppress(Exception, KeyboardInterrupt), held_back():
                    give_back(self.study, self.number)
            if not isinstance(end, KeyboardInterrupt):
                raise
            return False
        return True

    def _work(self, leftovers: Leftovers) -> None:
        record: TrialRecord | None = None
        while True:
            put_back_dead(self.study)
            if self.budget.is_spent(self.study):
                return
            if self.repeats >= _MOST_REPEATS:
                point = self._unvisited()
                if point is None:
                    self.notes.append("every list of the space has been tried")
                    return
                self.study.enqueue_trial(dict(point))
                self.repeats = 0
            if record is not None and record.same_as is None:
                leftovers.free()
            record = self._one_trial()
            if record is not None:
                self.repeats = self.repeats + 1 if record.same_as is not None else 0
                self.tell(record)

    def _one_trial(self) -> TrialRecord | None:
        """What became of the next trial; None where another worker ended it before it began."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            with held_back():
                trial = begin_trial(self.study)
                self.number = trial.number
            point = {
                slot.name: str(trial.suggest_categorical(slot.name, slot.choices))
                for slot in self.space.slots
            }
            passes = self.space.passes(point)
            trial.set_user_attr(PASSES, passes)
            trial.set_user_attr(MACHINE, self.machine)
        except UpdateFinishedTrialError:
            self.number = None
            return None
        record = TrialRecord(trial.number, passes, "running", machine=self.machine)
        with beating(self.study, trial.number):
            record = self._known(record) or self._judged(record)
        with held_back():
            record = self._written(trial, point, record)
            self.number = None
        return record

    def _written(self, trial: optuna.trial.Trial, point: Point, record: TrialRecord) -> TrialRecord:
        """The record as it was written down: as another trial where this one was ended meanwhile.

        A worker that doesn't come to run for a while is taken for dead by the others, and its list
        is in the queue again. What it has found is right all the same.
        """
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            write(self.study, trial, self._ending(record))
        except (UpdateFinishedTrialError, ValueError):
            if not is_ended(self.study, trial.number):
                raise
            kept = records(self.study)[trial.number]
            if kept.state != "lost":
                return kept  # ended by another just after its outcome was written
            known = self._known(record) or record
            return write_anew(self.study, self._ending(known), point, self.space)
        return record

    def _ending(self, record: TrialRecord) -> Ending:
        violation = None if record.metric is None else self.task.violation(record.metric)
        return Ending(record, self.task.objectives, violation)

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
            return Judging(self.task, record, self.turns, self.captures).run(rivals)
        except Exception as error:
            return replace(record, state="failed", reason=f"{type(error).__name__}: {error}")

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
