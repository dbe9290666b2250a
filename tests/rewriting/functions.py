"""Plain functions as models, and their programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from fxopt.capture import capture
from fxopt.program import Program


class Function(nn.Module):
    """A function of tensors as a module without state."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def program_of(function: Callable[..., Any], *inputs: Tensor) -> Program:
    """The captured program of `function` on `inputs`."""
    return capture(Function(function), inputs)


def calls(program: Program, target: Any = None) -> list[fx.Node]:
    """The operations of a program, or those of one operator, in order."""
    return [
        node
        for node in program.graph.nodes
        if node.op == "call_function" and (target is None or node.target is target)
    ]


def operators(program: Program) -> list[str]:
    """The operators of a program by their short names, in order."""
    return [str(node.target).removeprefix("aten.").partition(".")[0] for node in calls(program)]
