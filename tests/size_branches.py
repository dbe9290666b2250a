"""Hypothesis strategies for models whose Python code branches on sizes, and calls for them.

A drawn model is a list of statements over `y = Linear(x)`. Each asks about the sizes of its inputs,
as forward code does, and by the answer takes one list of statements or another.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 6
Sizes = tuple[int, int, int]
"""Batch, length, and the length of the second input."""

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Asked:
    """A question about sizes: `kind` over the axes `of`, compared with `number`."""

    kind: str
    of: tuple[int, int]
    compare: str
    number: int

    def __call__(self, sizes: Sequence[Any]) -> Any:
        one, other = sizes[self.of[0]], sizes[self.of[1]]
        compare = _COMPARE[self.compare]
        if self.kind == "size":
            return compare(one, self.number)
        if self.kind == "parity":
            return compare(one % (2 + self.number % 3), self.number % 2)
        if self.kind == "truth":
            return one % (2 + self.number % 3)
        if self.kind == "two":
            return compare(one, other)
        if self.kind == "product":
            return compare(one * other, 2 * self.number)
        if self.kind == "half":
            return compare((one + 1) // 2, other)
        return compare(one / (other + 1), self.number / 3)


@dataclass(frozen=True)
class Choice:
    """`if asked: do then; else: do otherwise`."""

    asked: Asked
    then: tuple[Any, ...]
    otherwise: tuple[Any, ...]


class Branching(nn.Module):
    """Computes a list of statements; each asks anew of the sizes that the inputs came with."""

    def __init__(self, statements: tuple[Any, ...], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.statements = statements

    def extra_repr(self) -> str:
        return "\n".join(map(repr, self.statements))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        sizes = (x.shape[0], x.shape[1], z.shape[0])
        return self._run(self.statements, self.linear(x), z, sizes)

    def _run(self, statements: tuple[Any, ...], y: Tensor, z: Tensor, sizes: Any) -> Tensor:
        for statement in statements:
            if isinstance(statement, Choice):
                if statement.asked(sizes):
                    y = self._run(statement.then, y, z, sizes)
                else:
                    y = self._run(statement.otherwise, y, z, sizes)
            else:
                y = _ACTIONS[statement](y, z)
        return y


_ACTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "double": lambda y, z: y * 2,
    "shift": lambda y, z: y + z.sum(0),
    "center": lambda y, z: y - y.mean(-2, keepdim=True),
    "pad": lambda y, z: functional.pad(y, (0, 0, 0, 1)),
    "crop": lambda y, z: y[..., :-1, :],
    "squeeze": lambda y, z: y.squeeze(0),
    "flatten": lambda y, z: y.reshape(-1, WIDTH),
    "tanh": lambda y, z: torch.tanh(y),
}


def questions() -> st.SearchStrategy[Asked]:
    axes = st.integers(0, 2)
    kinds = st.sampled_from(("size", "parity", "truth", "two", "product", "half", "ratio"))
    return st.builds(
        Asked, kinds, st.tuples(axes, axes), st.sampled_from(sorted(_COMPARE)), st.integers(0, 7)
    )


def statements(depth: int = 2) -> st.SearchStrategy[tuple[Any, ...]]:
    action = st.sampled_from(sorted(_ACTIONS))
    if depth == 0:
        return st.lists(action, max_size=2).map(tuple)
    inner = statements(depth - 1)
    return st.lists(action | st.builds(Choice, questions(), inner, inner), max_size=2).map(tuple)


def branching_models() -> st.SearchStrategy[Branching]:
    """Models that ask at least once."""
    first = st.builds(Choice, questions(), statements(1), statements(1))
    lists = st.tuples(first, statements(1)).map(lambda pair: (pair[0], *pair[1]))
    return st.builds(Branching, lists, st.integers(0, 3))


def sizes(least: int = 1) -> st.SearchStrategy[Sizes]:
    return st.tuples(st.integers(least, 5), st.integers(least, 9), st.integers(least, 5))


def inputs(of: Sizes) -> tuple[Tensor, Tensor]:
    """The inputs of these sizes; the same numbers each time."""
    generator = torch.Generator().manual_seed(sum(of))
    batch, length, other = of
    return (
        torch.randn(batch, length, WIDTH, generator=generator),
        torch.randn(other, WIDTH, generator=generator),
    )
