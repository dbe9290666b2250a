"""What a finished pipeline hands over: the program, its record, and how to run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxopt.graph_text import GraphText
from fxopt.lower import Lower
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
class Outcome:
    """A finished pipeline: `compiled` and `module` left out are made when they are needed.

    `config` is the model's, where cutting channels has changed its sizes; `source` makes further
    programs of the same model, where it can; `further` are those that exist already; `origins` are
    the tensors of the original from which passes derived others.
    """

    program: Program
    report: Report
    steps: tuple[OptimizedStep, ...]
    lowering: Lower | None = None
    compiled: Callable[..., Any] | None = None
    module: fx.GraphModule | None = None
    config: Any = None
    source: Source | None = None
    further: tuple[Outcome, ...] = ()
    origins: Origins | None = None
