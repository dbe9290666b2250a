"""One list of passes taken as far as it deserves: rewritten, bounded, judged, compiled, measured.

Each stage costs more than the one before it, so that most lists end early:

    rewrite    without kernels and lowering; what doesn't hold ends here
    bound      the static cost; what can't beat the front ends here
    judge      the metric on the rewritten graph, uncompiled; what doesn't keep it ends here
    lower      compiled, and judged once more, since that is what will run
    measure    beside the original, in turns
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from fxopt.comparison.pareto import dominates
from fxopt.errors import FxoptError, SearchError
from fxopt.optimized import Optimized
from fxopt.program import Program
from fxopt.search.found import TrialRecord
from fxopt.search.objectives import Measure, Measured, checked_measured
from fxopt.search.quiet import Turns
from fxopt.search.staged import Captures, Staged
from fxopt.search.static_cost import least_milliseconds, least_ratios

Direction = Literal["maximize", "minimize"]
Metric = Callable[[Any, Any], float]


@dataclass(frozen=True)
class Task:
    """What is searched for: the same in every worker."""

    model: nn.Module
    data: Any
    metric: Metric
    inputs: Any
    calibration: Any
    objectives: tuple[str, ...]
    direction: Direction
    threshold: float
    measure: Measure

    def violation(self, value: float) -> float:
        """How far a metric is beyond what is allowed: above 0 it doesn't keep it."""
        return self.threshold - value if self.direction == "maximize" else value - self.threshold


def judge_metric(metric: Metric, model: Any, data: Any) -> float:
    """The metric as a float, gradients not recorded.

    Raises `SearchError` where it is no number, and where the metric raises what isn't fxopt's.
    """
    try:
        with torch.no_grad():
            found = metric(model, data)
    except FxoptError:
        raise
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        raise SearchError(f"metric= raised {type(error).__name__}: {error}") from error
    try:
        value = float(found)
    except (TypeError, ValueError):
        value = math.nan
    if math.isnan(value):
        raise SearchError(f"metric= returned {found!r:.60}; it must return a number, not NaN")
    return value


class Judging:
    """One trial under way; `record` grows with each stage."""

    def __init__(self, task: Task, record: TrialRecord, turns: Turns, captures: Captures) -> None:
        self.task, self.record, self.turns, self.captures = task, record, turns, captures

    def run(self, rivals: Sequence[TrialRecord]) -> TrialRecord:
        """Take the record's list of passes as far as it deserves.

        `rivals` are the trials that this machine has measured. An error that isn't fxopt's is let
        through.
        """
        started = time.perf_counter()
        try:
            with self.turns.beside_others():
                candidate = self._candidate(rivals)
            if candidate is not None:
                with self.turns.alone():
                    self._measure(candidate)
        except SearchError:
            raise  # of the metric or the measuring, not of the list
        except FxoptError as error:
            self._end("pruned", f"{type(error).__name__}: {error}")
        return replace(self.record, seconds=round(time.perf_counter() - started, 2))

    def _candidate(self, rivals: Sequence[TrialRecord]) -> Optimized | None:
        """The finished model; None where the list ended before."""
        task = self.task
        staged = Staged(self.captures, self.record.passes, task.inputs, task.calibration)
        numerics, ready = staged.numerics(), staged.kernels()
        if staged.lowers and staged.rewrites:
            reason = self._hopeless(numerics, ready.parameter_bytes(), rivals)
            if reason is not None:
                self._end("pruned", reason)
                return None
        if staged.rewrites:
            module = staged.module()
            if not self._keeps_metric(module):
                return None
        if staged.lowers:
            module = staged.lowered()
            if not self._keeps_metric(module):
                return None
        return module

    def _hopeless(self, numerics: Program, size: int, rivals: Sequence[TrialRecord]) -> str | None:
        """Why the list can't beat the front, whatever a compiler makes of it."""
        if not rivals:
            return None
        objectives = self.task.objectives
        milliseconds = least_milliseconds(numerics)
        least = least_ratios(objectives, milliseconds, size, rivals[-1].original)
        for rival in rivals:
            if dominates([rival.ratios[name] for name in objectives], least):
                bounds = ", ".join(
                    f"{name} at least {bound:.2f}x"
                    for name, bound in zip(objectives, least, strict=True)
                )
                return (
                    f"not compiled: its products and parameters alone take {bounds}, and trial "
                    f"{rival.number} is below that"
                )
        return None

    def _keeps_metric(self, model: nn.Module) -> bool:
        value = judge_metric(self.task.metric, model, self.task.data)
        self.record = replace(self.record, metric=value)
        kept = self.task.violation(value) <= 0
        if not kept:
            sign = "<" if self.task.direction == "maximize" else ">"
            self._end("infeasible", f"{value:.4g} {sign} {self.task.threshold:.4g} allowed")
        return kept

    def _measure(self, candidate: Optimized) -> None:
        task = self.task
        found: Measured = task.measure(task.model, candidate, task.inputs, task.objectives)
        found = checked_measured(found, task.objectives)
        self.record = replace(
            self.record,
            state="measured",
            values=found.values,
            original=found.original,
            ratios=found.ratios,
        )

    def _end(self, state: Literal["pruned", "infeasible"], reason: str) -> None:
        self.record = replace(self.record, state=state, reason=reason)
