"""HalfValues: float32 values of a graph in half precision, each made once.

    half(copy(float32(y)))  =  copy(y)        for y in half already
    half(copy(W))           =  copy(W')       for a constant W, W' stored in half

`copy` is any chain of views and of operators that only pass values on.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.constant_expressions import is_computed_constant
from fxopt.operators import MAX_POOLINGS, PARTS, UNCHANGED, VIEWS
from fxopt.recipe import Recipe
from fxopt.rewriting import Edit

aten = torch.ops.aten

HALF = (torch.bfloat16, torch.float16)
"""The dtypes of half precision."""

_COPIES: frozenset[Any] = frozenset(
    {
        *VIEWS,
        *UNCHANGED,
        *(aten.relu.default, aten.neg.default, aten.abs.default),
        *MAX_POOLINGS,
    }
)
"""Operators whose results are values of their first operand, or these without their sign.

They read and write at most what a cast in their place would, even where the float32 result is
needed as well.
"""


class HalfValues:
    """The values of float32 nodes in `dtype`, each made once, as cheaply as it can be had."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def of(self, x: fx.Node, edit: Edit, root: fx.Node) -> fx.Node:
        """half(x), for use at `root`: stored, found, or cast there."""
        value, copies = self._origin(x)
        if self._is_rounded(value):
            result: Any = value.args[0]
        elif edit.program.is_constant(value) or self._is_computed(value, edit):
            result = self._constant(value, edit)
        else:
            return self.call(edit, root, aten.to.dtype, x, self.dtype)
        for copy in reversed(copies):
            if copy.target is operator.getitem:
                split: Any = copy.args[0]
                pieces = self.call(
                    edit, root, split.target, result, *split.args[1:], **split.kwargs
                )
                result = self.call(edit, root, operator.getitem, pieces, copy.args[1])
            else:
                result = self.call(
                    edit, root, copy.target, result, *copy.args[1:], **dict(copy.kwargs)
                )
        return result  # type: ignore[no-any-return]

    def finite(self, x: fx.Node, edit: Edit, root: fx.Node) -> fx.Node:
        """half(x), for use at `root`, where what is finite stays finite and an infinity stays one.

        Masks hold float32's least number, which a cast would turn into -inf, and a row of those
        into NaN or zeros.
        """
        if self.are_at_hand(x):
            return self.of(x, edit, root)
        limits = torch.finfo(self.dtype)
        inside = self.call(edit, root, aten.clamp.default, x, limits.min, limits.max)
        infinite = self.call(edit, root, aten.isinf.default, x)
        finite = self.call(edit, root, aten.where.self, infinite, x, inside)
        return self.call(edit, root, aten.to.dtype, finite, self.dtype)

    def are_at_hand(self, x: fx.Node) -> bool:
        """Whether `x` is float32(y) for y in half, or copied from it, so that half(x) is free."""
        return self._is_rounded(self._origin(x)[0])

    def _origin(self, x: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """What `x` is a chain of copies of, and the chain, its last link first."""
        copies: list[fx.Node] = []
        while True:
            source: Any = x.args[0] if x.args else None
            if x.target is operator.getitem and source.target in PARTS:
                source = source.args[0]
            elif x.target not in _COPIES:
                return x, copies
            copies.append(x)
            x = source

    def _is_rounded(self, x: fx.Node) -> bool:
        return is_cast(x, torch.float32) and is_tensor_of(x.args[0], self.dtype)

    def _is_computed(self, x: fx.Node, edit: Edit) -> bool:
        """Whether `x` is the same in every call, but no state."""
        return edit.program.mode == "eval" and is_computed_constant(x)

    def _constant(self, x: fx.Node, edit: Edit) -> fx.Node:
        name = str(x.target) if x.op == "get_attr" else x.name

        def make() -> fx.Node:
            half = f"{name}_{str(self.dtype).removeprefix('torch.')}"
            return edit.constant(half, rounded(edit.state(x), self.dtype), of=x)

        return edit.once((self, name), make)

    def call(
        self, edit: Edit, root: fx.Node, target: Any, x: fx.Node, *args: Any, **kwargs: Any
    ) -> fx.Node:
        """The call, or an equal one that is computed before `root`."""
        for user in x.users:
            same = user.target is target and user.args == (x, *args) and user.kwargs == kwargs
            if same and user < root:
                return user
        return edit.call(target, x, *args, **kwargs)


def rounded(tensor: Tensor | Recipe, dtype: torch.dtype) -> Recipe:
    """The tensor in `dtype`, computed when the program is done; trainable where the source is."""
    make = functools.partial(torch.Tensor.to, dtype=dtype)
    return Recipe(make, (tensor,), tensor.shape, dtype, tensor.device, tensor.requires_grad)


def is_cast(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether `node` is a conversion to `dtype` and nothing else."""
    return node.target is aten.to.dtype and tuple(node.args[1:]) == (dtype,) and not node.kwargs


def is_tensor_of(node: Any, dtype: torch.dtype, least_rank: int = 1) -> bool:
    """Whether `node` is a node whose value is a tensor of `dtype`, of rank `least_rank` or more."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype == dtype and value.ndim >= least_rank
