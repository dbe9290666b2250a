"""Parts of a mask that are known without computing them: what is true everywhere.

    x >= c              =  ones_like(x)     x counts from c or more: arange, plus constants, viewed
    ones and x          =  expand(x)

A model's mask is put together of such parts (all queries are at positions of at least 0), and a
mask made to the full [batch, heads, queries, keys] costs as much as a layer's attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.nodes import arguments, same_sizes
from fxopt.operators.views import VIEWS
from fxopt.rewriting import Edit, Match, Rule
from fxopt.rewriting.pattern import Target
from fxopt.sharing import reaches_output

aten = torch.ops.aten

_ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_ONES = (aten.ones.default, aten.ones_like.default, aten.new_ones.default)
_ANDS = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)


class FoldArangeCompare(Rule):
    """x >= c = ones_like(x) where x can't be less"""

    def targets(self) -> tuple[Target, ...]:
        return (aten.ge.Scalar,)

    def match(self, node: fx.Node) -> Match | None:
        x, bound = node.args
        least = _least(x)
        if least is None or not isinstance(bound, (int, float)) or not least >= bound:
            return None
        return Match((node,), {"x": x})

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        return edit.call(aten.ones_like.default, match["x"], dtype=torch.bool)


class DropTrue(Rule):
    """ones and x = expand(x)"""

    def targets(self) -> tuple[Target, ...]:
        return _ANDS

    def match(self, node: fx.Node) -> Match | None:
        for ones, x in (node.args[:2], node.args[1::-1]):
            if not isinstance(x, fx.Node) or not isinstance(ones, fx.Node):
                continue
            if _is_true(ones) and _is_bool(x) and _fills(x, ones, node):
                return Match((node,), {"ones": ones, "x": x})
        return None

    def refuse(self, match: Match) -> str | None:
        if reaches_output(match.root):
            return "it is an output, which must not share memory with another value"
        return None

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        x, ones, shape = match["x"], match["ones"], match.root.meta["val"].shape
        if same_sizes(x.meta["val"].shape, shape):
            return x  # type: ignore[no-any-return]
        rank = len(shape)
        sizes = [
            _size(edit, ones if _is_one(x, axis - rank) else x, axis - rank) for axis in range(rank)
        ]
        return edit.call(aten.expand.default, x, sizes)


def _size(edit: Edit, source: fx.Node, axis: int) -> int | fx.Node:
    """The size of an axis counted from the last, as an argument."""
    value = source.meta["val"]
    if -axis > value.ndim:
        return 1
    size = value.shape[axis]
    if isinstance(size, int):
        return size
    return edit.call(aten.sym_size.int, source, axis + value.ndim)


def _is_one(x: fx.Node, axis: int) -> bool:
    value = x.meta["val"]
    if -axis > value.ndim:
        return True
    size = value.shape[axis]
    return isinstance(size, int) and size == 1


def _fills(x: fx.Node, ones: fx.Node, node: fx.Node) -> bool:
    """Whether each axis of the result is as long as in `x`, or as in `ones` where that is 1."""
    shape = node.meta["val"].shape
    for axis in range(-len(shape), 0):
        source = ones if _is_one(x, axis) else x
        value = source.meta["val"]
        size = value.shape[axis] if -axis <= value.ndim else 1
        if not same_sizes((size,), (shape[axis],)):
            return False
    return True


def _is_bool(x: fx.Node) -> bool:
    value = x.meta["val"]
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def _is_true(x: Any) -> bool:
    """Whether `x` is true everywhere."""
    while isinstance(x, fx.Node) and x.target in VIEWS:
        x = x.args[0]
    return isinstance(x, fx.Node) and x.target in _ONES and _is_bool(x)


def _least(x: Any) -> int | None:
    """What no entry of `x` is less than, where `x` counts up; None where nothing is known."""
    added = 0
    while isinstance(x, fx.Node) and (x.target in VIEWS or x.target is aten.add.Tensor):
        if x.target is aten.add.Tensor:
            other = x.args[1]
            if not isinstance(other, int) or arguments(x)["alpha"] != 1:
                return None
            added += other
        x = x.args[0]
    if not isinstance(x, fx.Node) or x.target not in _ARANGES or x.meta["val"].is_floating_point():
        return None
    given = arguments(x)
    start, step = given.get("start", 0), given.get("step", 1)
    counts_up = isinstance(start, int) and isinstance(step, int) and step > 0
    return start + added if counts_up else None
