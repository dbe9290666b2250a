"""A transformation under way, as a value: each stage of the pipeline makes the next one of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import fx, nn

from fxopt.calls import Inputs
from fxopt.claim import Claim
from fxopt.errors import OutsideError
from fxopt.lower import Lowering
from fxopt.optimized import OptimizedStep
from fxopt.pipeline.evaluation import Rows
from fxopt.pipeline.pass_result import Outputs
from fxopt.pipeline.recording import StepTaken
from fxopt.pipeline.reference import Reference
from fxopt.program import Program
from fxopt.progress import Progress, silent
from fxopt.rewriting import Pass, Plan
from fxopt.verify import Trial

OnViolation = Literal["raise", "revert"]


@dataclass(frozen=True)
class Judging:
    """How a transformation is judged: not at all without `verify`.

    A pass that breaks its claim raises, or with `on_violation="revert"` is undone at the guilty
    nodes; `budget` is what the whole list is held to, left out the sum of the claims. `progress`
    is called with a line before each long step.
    """

    verify: bool = True
    on_violation: OnViolation = "raise"
    budget: Claim | None = None
    progress: Progress = silent


@dataclass(frozen=True)
class Run:
    """What has become of `model` so far: the `program`, what it is held to, and its record.

    It was captured on `inputs` in `capture_ms` milliseconds. Passes are judged on `trials`, on
    which `program` answers `outputs`, the whole list on `last_trials` too. `unrounded` holds, once
    a pass rounds, the outputs before it and the claims of all passes that do; `applied` are the
    passes that changed something, each with its plan; `joined` is the state that passes have put
    together; `elsewhere` are inputs that take another branch of the model's code. A run that was
    lowered has the `lowering` and what it made of the `module`.
    """

    model: nn.Module
    inputs: Inputs | None
    program: Program
    reference: Reference
    capture_ms: float
    trials: tuple[Trial, ...] = ()
    last_trials: tuple[Trial, ...] = ()
    outputs: Outputs = field(default_factory=list)
    unrounded: tuple[Claim, Outputs] | None = None
    steps: tuple[OptimizedStep, ...] = ()
    applied: tuple[tuple[Pass, Plan], ...] = ()
    joined: Mapping[str, Rows] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    elsewhere: tuple[tuple[Inputs, OutsideError], ...] = ()
    lowering: Lowering | None = None
    compiled: Callable[..., Any] | None = None
    module: fx.GraphModule | None = None

    def noting(self, *notes: str) -> Run:
        """This run with `notes` for the report."""
        return replace(self, notes=(*self.notes, *notes))

    def recording(self, taken: StepTaken, judging: Judging) -> Run:
        """This run with one step more in its record."""
        return replace(self, steps=(*self.steps, taken.recorded(judging.verify)))
