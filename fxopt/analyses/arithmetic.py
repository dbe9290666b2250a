"""Arithmetic: the multiply-adds of a program's products, and what a selection of channels leaves.

    linear, matmul     entries of the result x channels summed over
    convolution        entries of the result x entries of one filter
    attention          those of q kᵀ and of p v, without regard to what a mask spares

One multiply-add (MAC) is two floating-point operations (FLOPs). Recurrent layers, norms, softmax
and what works entry by entry are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from fxopt.analyses.channels import Dim, channels
from fxopt.nodes import size_at_capture
from fxopt.operators.convolutions import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from fxopt.program import Program

FLOPS_PER_MULTIPLY_ADD = 2

Sizes: TypeAlias = Callable[[Any], Sequence[int]]
"""The shape of a node's tensor."""


@dataclass(frozen=True)
class Cost:
    """Size of a program: entries of its floating-point state, each tensor once, and multiply-adds
    of one call at the sizes of the example."""

    parameters: int
    multiply_adds: int

    @property
    def flops(self) -> int:
        """Floating-point operations, two for each multiply-add."""
        return FLOPS_PER_MULTIPLY_ADD * self.multiply_adds

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters, {self.flops:,} FLOPs"


def multiply_adds(program: Program) -> dict[str, int]:
    """The multiply-adds of each product of `program`, by node name, at the example's sizes."""
    return {node.name: rule(node, _sizes) for node, rule in _products(program)}


def flops(program: Program) -> int:
    """The floating-point operations of one call at the example's sizes: two a multiply-add."""
    return FLOPS_PER_MULTIPLY_ADD * sum(multiply_adds(program).values())


def cut_cost(program: Program, kept: Mapping[str, Tensor]) -> Cost:
    """The cost of `program` once each of its groups of channels keeps only those of `kept`.

    `kept` gives int64 indices by the names of `channels(program)`; a group that isn't named keeps
    all. Nothing is cut: sizes alone are followed, so that a tensor shrinks along each axis that
    some group cuts. Raises `KeyError` for a name that no group has.
    """
    return CutCosts(program).after(kept)


class CutCosts:
    """`cut_cost` of one program for many selections."""

    def __init__(self, program: Program) -> None:
        self._channels = channels(program)
        self._products = list(_products(program))
        self._state = {
            str(node.target): node
            for node in program.graph.nodes
            if node.op == "get_attr" and node.meta["val"].dtype.is_floating_point
        }

    def after(self, kept: Mapping[str, Tensor]) -> Cost:
        """The cost with the channels `kept` of each group."""
        walk = self._channels.walk
        keep: dict[Dim, Tensor] = {}
        for name, indices in kept.items():
            group = self._channels[name]
            keep[group.dim] = torch.zeros(group.size, dtype=torch.bool)
            keep[group.dim][indices] = True
        counted: dict[Dim, int | None] = {}

        def left(dim: Dim) -> int | None:
            """How many indices of a dim stay; None where all do."""
            dim = walk.dims.find(dim)
            if dim not in counted:
                mask = walk.dims.kept(dim, keep)
                counted[dim] = None if mask is None else int(mask.sum())
            return counted[dim]

        def sizes(node: fx.Node) -> list[int]:
            full = _sizes(node)
            cut = [left(dim) for dim in walk.axes.get(node, ())] or [None] * len(full)
            return [size if some is None else some for size, some in zip(full, cut, strict=True)]

        return Cost(
            sum(math.prod(sizes(node)) for node in self._state.values()),
            sum(rule(node, sizes) for node, rule in self._products),
        )


def _sizes(node: Any) -> list[int]:
    return [size_at_capture(size) for size in node.meta["val"].shape]


def _products(program: Program) -> Iterator[tuple[fx.Node, Callable[[fx.Node, Sizes], int]]]:
    for node in program.graph.nodes:
        rule = _RULES.get(str(node.target)) if node.op == "call_function" else None
        if rule is not None:
            yield node, rule


def _summed(first: int) -> Callable[[fx.Node, Sizes], int]:
    """A product that sums over the last axis of its operand `first`."""

    def rule(node: fx.Node, sizes: Sizes) -> int:
        return math.prod(sizes(node)) * sizes(node.args[first])[-1]

    return rule


def _convolution(node: fx.Node, sizes: Sizes) -> int:
    return math.prod(sizes(node)) * math.prod(sizes(node.args[1])[1:])


def _transposed_convolution(node: fx.Node, sizes: Sizes) -> int:
    return math.prod(sizes(node.args[0])) * math.prod(sizes(node.args[1])[1:])


def _attention(node: fx.Node, sizes: Sizes) -> int:
    positions = sizes(node.args[1])[-2]
    return (math.prod(sizes(node.args[0])) + math.prod(sizes(node))) * positions


def _cached_attention(node: fx.Node, sizes: Sizes) -> int:
    positions = sizes(node.args[1])[-2] + sizes(node.args[3])[-2]
    return (math.prod(sizes(node.args[0])) + math.prod(sizes(node))) * positions


def _einsum(node: fx.Node, sizes: Sizes) -> int:
    equation, operands = node.args[:2]
    inputs, _, result = str(equation).replace(" ", "").partition("->")
    summed: dict[str, int] = {}
    for labels, operand in zip(inputs.split(","), operands, strict=True):  # type: ignore[arg-type]
        # Labels before an ellipsis count from the left, those after it from the right.
        before, _, after = labels.partition("...")
        shape = sizes(operand)
        named = zip(before + after, _ends(shape, len(before), len(after)), strict=True)
        summed.update((name, size) for name, size in named if name not in result)
    return math.prod(sizes(node)) * math.prod(summed.values())


def _ends(shape: Sequence[int], first: int, last: int) -> list[int]:
    return [*shape[:first], *shape[len(shape) - last :]]


_RULES: Mapping[str, Callable[[fx.Node, Sizes], int]] = MappingProxyType(
    {
        "aten.linear.default": _summed(0),
        "aten.addmm.default": _summed(1),
        "aten.baddbmm.default": _summed(1),
        **{f"aten.{name}.default": _summed(0) for name in ("mm", "bmm", "matmul", "mv", "dot")},
        "aten._grouped_mm.default": _summed(0),
        "transformers.grouped_mm_fallback.default": _summed(0),
        "aten.einsum.default": _einsum,
        "aten.scaled_dot_product_attention.default": _attention,
        "fxopt.cached_attention.default": _cached_attention,
        "fxopt.int8_cached_attention.default": _cached_attention,
        **dict.fromkeys(map(str, CONVOLUTIONS), _convolution),
        **dict.fromkeys(map(str, TRANSPOSED_CONVOLUTIONS), _transposed_convolution),
    }
)
"""By name, since some operators are registered only once a library is loaded."""
