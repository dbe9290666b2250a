"""What sums over channels against a constant weight: linears in each spelling, convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.nodes import arguments
from fxopt.operators.convolutions import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from fxopt.operators.linears import LINEAR_TARGETS, as_linear

aten = torch.ops.aten

READERS = (*LINEAR_TARGETS, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that sums over `axis` of `x` against a constant weight.

    `columns` is the weight's axis that holds the K summed channels, or, with `groups` and
    `columns=1`, those of one group.
    """

    node: fx.Node
    x: fx.Node
    axis: int
    weight: fx.Node
    bias: fx.Node | None
    columns: int
    groups: int = 1

    @property
    def name(self) -> str:
        """The weight's name in the state."""
        return str(self.weight.target)

    @property
    def outputs(self) -> int:
        """N, the number of output channels."""
        shape = self.weight.meta["val"].shape
        return int(shape[0] if self.columns else shape[1] * self.groups)

    def aligned(self, channels: Tensor) -> Tensor:
        """A vector [K] over the summed channels so that it broadcasts against the weight."""
        shape = self.weight.meta["val"].shape
        if self.columns == 0:
            return channels.reshape(-1, *(1,) * (len(shape) - 1))
        rows = channels.reshape(self.groups, -1)
        if self.groups > 1:
            rows = rows.repeat_interleave(int(shape[0]) // self.groups, 0)
        return rows.reshape(*rows.shape, *(1,) * (len(shape) - 2))

    def read(self, weight: Tensor, channels: Tensor) -> Tensor:
        """What the weight holds for some of the summed channels (indices [n]): [n, entries]."""
        if self.columns == 0 or self.groups == 1:
            taken = weight.index_select(self.columns, channels)
            return taken.movedim(self.columns, 0).flatten(1)
        grouped: Tensor = weight.unflatten(0, (self.groups, -1))
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1)[channels]


def as_reader(node: fx.Node) -> Reader | None:
    """The layer that `node` computes, or None where its weight or bias isn't state."""
    linear = as_linear(node)
    if linear is not None:
        columns = 0 if linear.transposed else 1
        return Reader(node, linear.x, -1, linear.weight, linear.bias, columns)
    if node.target not in (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS):
        return None
    given = arguments(node)
    weight, bias = given["weight"], given["bias"]
    if any(one is not None and one.op != "get_attr" for one in (weight, bias)):
        return None
    x, axis = summed_axis(node)
    return Reader(node, x, axis, weight, bias, int(node.target in CONVOLUTIONS), given["groups"])


def summed_axis(node: fx.Node) -> tuple[fx.Node, int]:
    """The operand whose channels a call of one of `READERS` sums over, and their axis."""
    x = node.args[1 if node.target is aten.addmm.default else 0]
    assert isinstance(x, fx.Node)
    if node.target in LINEAR_TARGETS:
        return x, -1
    weight: Any = arguments(node)["weight"]
    return x, 1 - weight.meta["val"].ndim
