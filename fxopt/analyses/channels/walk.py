"""The walk over a graph that gives each axis of each value its dim."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxopt.analyses.channels.dims import Dim, Dims, Size, quotient
from fxopt.nodes import label
from fxopt.operators.views import PERMUTATIONS, permutation
from fxopt.program import Program, Refusal

Axes: TypeAlias = tuple[Dim, ...]
"""The dims of one tensor, one for each axis."""

ReaderKind = Literal["weight", "product", "norm", "mean", "sum"]


@dataclass(frozen=True)
class Read:
    """`node` sums over `dim`, (a part of) axis `axis` of `operand`.

    It is met by `other_axis` of `other`, if there is one.
    """

    node: fx.Node
    kind: ReaderKind
    dim: Dim
    operand: fx.Node
    axis: int
    other: fx.Node | None = None
    other_axis: int = 0


@dataclass
class Walk:
    """The dims found so far: `axes` of each tensor, `lists` of each result with several tensors.

    `reads` are the sums over channels; `slices` gives the terms before, in and after each slice.
    """

    program: Program
    dims: Dims = field(default_factory=Dims)
    axes: dict[fx.Node, Axes] = field(default_factory=dict)
    lists: dict[fx.Node, list[Axes]] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    slices: dict[fx.Node, tuple[Dim, Dim, Dim]] = field(default_factory=dict)

    def of(self, operand: Any) -> Axes:
        """The dims of an operand; none for a number."""
        return self.axes.get(operand, ()) if isinstance(operand, fx.Node) else ()

    def fresh(self, shape: Sequence[Any], why: Refusal | None = None) -> Axes:
        """New dims of these sizes, pinned where there is a reason."""
        axes = tuple(self.dims.new(size_of(size)) for size in shape)
        if why is not None:
            self.pin(axes, why)
        return axes

    def pin(self, axes: Sequence[Dim], why: Refusal) -> None:
        """Forbid cutting any channel of these dims."""
        for dim in axes:
            self.dims.pin(dim, why)

    def unify(self, one: Dim, other: Dim, node: fx.Node) -> Dim:
        """State that two dims are the same channels; one of size 1 is broadcast and says nothing.

        Returns the one that is not broadcast.
        """
        if one.size == 1 or other.size == 1:
            return other if one.size == 1 else one
        if one.size != other.size:
            why = Refusal("sizes that are equal only at run time", label(node))
            one, other = self.of_size(one, other.size, why), self.of_size(other, one.size, why)
            if one.size != other.size:  # two expressions: nothing that is cut
                self.pin((one, other), why)
                return one
        clash = Refusal("its operands split this axis in ways that can't be matched", label(node))
        self.dims.unify(one, other, clash)
        return one

    def of_size(self, dim: Dim, size: Size, why: Refusal) -> Dim:
        """`dim`, of a run-time size that is known to be the number `size`, as a dim of that number.

        Flattening 4 channels of h x w into 100 features makes h w 25, whatever h is.
        """
        factors = self.dims.parts(dim, "product")
        fixed = [isinstance(factor.size, int) for factor in factors]
        if all(fixed) or not isinstance(size, int):
            return dim
        first, last = fixed.index(False), len(fixed) - fixed[::-1].index(False)
        known = math.prod(factor.size for factor in (*factors[:first], *factors[last:]))
        self.pin(factors[first:last], why)
        rest = self.fresh((quotient(size, known),), why)
        self.dims.mark(rest[0], "place")
        return self.dims.product([*factors[:first], *rest, *factors[last:]])

    def broadcast(self, operands: Sequence[Axes], node: fx.Node) -> Axes:
        """The dims of operands aligned at the right, unified axis by axis."""
        rank = max(map(len, operands), default=0)
        found: list[Dim] = []
        for back in range(rank, 0, -1):
            here = [axes[-back] for axes in operands if len(axes) >= back]
            dim = here[0]
            for other in here[1:]:
                dim = self.unify(dim, other, node)
            found.append(dim)
        return tuple(found)

    def read(
        self,
        node: fx.Node,
        kind: ReaderKind,
        operand: fx.Node,
        axis: int,
        other: fx.Node | None = None,
        other_axis: int = 0,
        part: Dim | None = None,
    ) -> None:
        """Record that `node` sums over an axis, or over `part` of it.

        What meets it, where it is a permuted constant, is told as the constant's own axis.
        """
        while other is not None and other.target in PERMUTATIONS:
            other_axis = permutation(other)[other_axis]
            other = other.args[0]  # type: ignore[assignment]
        dim = part or self.of(operand)[axis]
        self.reads.append(Read(node, kind, dim, operand, axis, other, other_axis))


Handler: TypeAlias = Callable[[Walk, fx.Node, dict[str, Any]], "Axes | list[Axes]"]
"""What the dims of a node's value are, given its arguments by schema name."""


def size_of(size: Any) -> Size:
    """A size, symbolic or already an expression, as an int or an expression; records no guard."""
    if isinstance(size, int):
        return size
    expression = size.node.expr if isinstance(size, torch.SymInt) else size
    return int(expression) if expression.is_Integer else expression


def shape_of(node: fx.Node) -> tuple[Size, ...]:
    """The sizes of a node's tensor."""
    return tuple(map(size_of, node.meta["val"].shape))


def unfollowed(walk: Walk, node: fx.Node, reason: str) -> Axes | list[Axes]:
    """Pin all that `node` takes and gives."""
    why = Refusal(reason, label(node))
    for operand in node.all_input_nodes:
        walk.pin(walk.of(operand), why)
        for axes in walk.lists.get(operand, ()):
            walk.pin(axes, why)
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return walk.fresh(value.shape, why)
    leaves = pytree.tree_leaves(value)
    return [walk.fresh(one.shape, why) if isinstance(one, Tensor) else () for one in leaves]
