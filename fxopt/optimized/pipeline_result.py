"""What a finished pipeline hands over: the program, its record, and how to run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxopt.claim import Claim
from fxopt.graph_text import GraphText
from fxopt.lower import Lowering
from fxopt.optimized.origins import Origins
from fxopt.optimized.source import Source
from fxopt.program import Program
from fxopt.report import Report, Step


@dataclass(frozen=True)
class OptimizedStep:
    """One step as it was taken: its record and the graph after it."""

    record: Step
    graph: GraphText

    def __str__(self) -> str:
        return f"{self.record.spec}: {self.record.measured}"


@dataclass(frozen=True)
class Evaluation:
    """A model in evaluation: `program` left out is the training program's own evaluation graph.

    `missing` says why there is none. `make` gives the program for other arguments of a call, over
    the tensors of a training program; None where the model is gone.
    """

    program: Program | None = None
    missing: str = ""
    make: Callable[[tuple[Any, ...], dict[str, Any], Program], Program] | None = None

    @classmethod
    def saved(cls, kept: Program | str | None) -> Evaluation:
        """The evaluation that was saved as a program, or as the reason why there is none."""
        return cls(missing=kept) if isinstance(kept, str) else cls(kept)


@dataclass(frozen=True)
class PipelineResult:
    """A finished pipeline: `compiled` and `module` left out are made when they are needed.

    `config` is the model's, where cutting channels has changed its sizes; `evaluation` is what the
    model of a program that trains computes in evaluation; `source` makes further programs of the
    same model, where it can; `further` are those that exist already; `origins` are the tensors of
    the original from which passes derived others; `claim` is what the whole list was held to
    against the original; None where it was held to something else.
    """

    program: Program
    report: Report
    steps: tuple[OptimizedStep, ...]
    lowering: Lowering | None = None
    compiled: Callable[..., Any] | None = None
    module: fx.GraphModule | None = None
    config: Any = None
    evaluation: Evaluation = Evaluation()
    source: Source[PipelineResult] | None = None
    further: tuple[PipelineResult, ...] = ()
    origins: Origins | None = None
    claim: Claim | None = None
