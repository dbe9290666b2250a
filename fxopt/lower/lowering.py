"""Lowering: the kind of pass that ends a list and makes a callable of the program."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from fxopt.program import Program
from fxopt.progress import Progress
from fxopt.rewriting import Pass, Plan, Stage


@dataclass(frozen=True)
class Lowered:
    """A compiled program: the callable over the graph's input tensors, and how it came out.

    `kernels` counts the calls of each kernel in the generated code, `asked` those that the graph
    asked for; `warnings` names what is missing; `seconds` is how long the compilation took.
    """

    callable: Callable[..., Any]
    warnings: tuple[str, ...] = ()
    kernels: Mapping[str, int] = field(default_factory=dict)
    asked: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0


class Lowering(Pass):
    """A pass that leaves the graph as it is and makes a callable of it; it ends a list."""

    stage: ClassVar[Stage] = Stage.LOWER

    @abstractmethod
    def lower(self, module: fx.GraphModule, program: Program, progress: Progress) -> Lowered:
        """`module`, the materialised `program`, compiled now, and what was generated looked at.

        Raises `LowerError` where that can't be done here.
        """

    @abstractmethod
    def compile(self, module: fx.GraphModule) -> Callable[..., Any]:
        """`module` as a callable that is compiled at its first call, nothing of it looked at."""

    def apply(self, program: Program, plan: Plan) -> Program:
        """The program itself."""
        return program
