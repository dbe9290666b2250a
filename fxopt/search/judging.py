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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from fxopt.comparison.pareto import dominates
from fxopt.errors import FxoptError, SearchError
from fxopt.optimized import Optimized
from fxopt.pass_list import resolve_passes
from fxopt.rewriting import Pass, Stage
from fxopt.search.found import TrialRecord
from fxopt.search.measuring import parameter_bytes
from fxopt.search.objectives import Measure, Measured, checked_measured
from fxopt.search.quiet import Turns
from fxopt.search.static_cost import least_milliseconds, least_ratios
from fxopt.transform import transform

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

    def __init__(self, task: Task, record: TrialRecord, turns: Turns) -> None:
        self.task, self.record, self.turns = task, record, turns

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
        numerics, kernels, lowering = _stages(resolve_passes(self.record.passes))
        rewritten = self._transformed(self.task.model, numerics)
        milliseconds = None
        if isinstance(rewritten, Optimized):
            milliseconds = least_milliseconds(rewritten.program)
        ready = self._transformed(rewritten, kernels)
        if lowering and isinstance(ready, Optimized):
            reason = self._hopeless(milliseconds, parameter_bytes(ready), rivals)
            if reason is not None:
                self._end("pruned", reason)
                return None
        if isinstance(ready, Optimized) and not self._keeps_metric(ready):
            return None
        if lowering:
            ready = self._transformed(ready, lowering)
            if not self._keeps_metric(ready):
                return None
        assert isinstance(ready, Optimized)
        return ready

    def _transformed(self, model: nn.Module, passes: Sequence[Pass]) -> nn.Module:
        if not passes:
            return model
        return transform(
            model,
            passes,
            example_inputs=self.task.inputs,
            calibration=self.task.calibration,
            measure_cost=False,
        )

    def _hopeless(
        self, milliseconds: float | None, size: int, rivals: Sequence[TrialRecord]
    ) -> str | None:
        """Why the list can't beat the front, whatever a compiler makes of it."""
        if not rivals:
            return None
        objectives = self.task.objectives
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


def _stages(passes: Iterable[Pass]) -> tuple[list[Pass], list[Pass], list[Pass]]:
    """The list cut in three: numerics, kernels, lowering."""
    cut: tuple[list[Pass], list[Pass], list[Pass]] = ([], [], [])
    place = 0
    for pass_ in passes:
        place = max(place, 2 if pass_.stage is Stage.LOWER else int(pass_.stage is Stage.KERNELS))
        cut[place].append(pass_)
    return cut
