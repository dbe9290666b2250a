"""Dims through operators that move entries and compute nothing."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxopt.analyses.channels.dims import Dim, quotient
from fxopt.analyses.channels.pointwise import handlers_of
from fxopt.analyses.channels.walk import (
    Axes,
    Handler,
    Walk,
    shape_of,
    size_of,
    unfollowed,
)
from fxopt.analyses.view_axes import blocks
from fxopt.nodes import label
from fxopt.operators.views import PERMUTATIONS, RESHAPES, SPLITS, permutation
from fxopt.program import Refusal

aten = torch.ops.aten


def _permuted(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    axes = walk.of(args["self"])
    return tuple(axes[axis] for axis in permutation(node))


def _reshaped(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    """Runs of axes that hold the same entries, each split and merged anew."""
    source = walk.of(args["self"])
    have, want = args["self"].meta["val"].shape, node.meta["val"].shape
    old_axes = [axis for axis, dim in enumerate(source) if dim.size != 1]
    new_axes = [axis for axis, size in enumerate(want) if size_of(size) != 1]
    found = {axis: walk.dims.new(1) for axis in range(len(want))}
    why = Refusal("a reshape mixes it with other axes", label(node))
    followed: set[int] = set()
    for old, new in blocks([have[a] for a in old_axes], [want[a] for a in new_axes]):
        sizes = [size_of(want[new_axes[place]]) for place in new]
        factors = [source[old_axes[place]] for place in old]
        merged = walk.of_size(walk.dims.product(factors), math.prod(sizes), why)
        parts = [merged] if len(new) == 1 else walk.dims.split(merged, sizes)
        if parts is None:
            walk.pin((merged,), why)
            parts = list(walk.fresh(sizes, why))
        found.update({new_axes[place]: part for place, part in zip(new, parts, strict=True)})
        followed.update(old_axes[place] for place in old)
    walk.pin([source[axis] for axis in old_axes if axis not in followed], why)
    for axis in new_axes:
        if found[axis].size == 1:
            (found[axis],) = walk.fresh(want[axis : axis + 1], why)
    axes = tuple(found[axis] for axis in range(len(want)))
    _pin_unspellable(walk, node, axes)
    return axes


def _pin_unspellable(walk: Walk, node: fx.Node, axes: Axes) -> None:
    """A reshape can leave one size to be inferred; a second run-time size can't be rewritten."""
    sizes = node.args[1] if len(node.args) > 1 else None
    if not isinstance(sizes, (list, tuple)) or len(sizes) != len(axes):
        return
    inferred = any(size == -1 for size in sizes if isinstance(size, int))
    for size, dim in zip(sizes, axes, strict=True):
        mixed = isinstance(size, fx.Node) and any(
            isinstance(leaf.size, int) and leaf.size != 1 for leaf in walk.dims.leaves(dim)
        )
        if mixed and inferred:
            walk.pin((dim,), Refusal("its size is computed at run time", label(node)))
        inferred |= mixed


def _expanded(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    source, shape = walk.of(args["self"]), shape_of(node)
    added = len(shape) - len(source)
    found = []
    for axis, size in enumerate(shape):
        copied = axis < added or (source[axis - added].size == 1 and size != 1)
        found.append(walk.dims.new(size) if copied else source[axis - added])
        if copied and node.meta["val"].is_floating_point():
            walk.dims.mark(found[-1], "copied")
    return tuple(found)


def _concatenated(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes | list[Axes]:
    parts = [walk.of(one) for one in args["tensors"]]
    rank = len(shape_of(node))
    parts = [axes for axes in parts if len(axes) == rank]  # cat skips empty vectors
    axis = args["dim"] % rank
    found = list(parts[0])
    for other in range(rank):
        for axes in parts[1:]:
            if other != axis:
                found[other] = walk.unify(found[other], axes[other], node)
    found[axis] = walk.dims.sum([axes[axis] for axes in parts])
    return tuple(found)


def _stacked(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    axis = args["dim"] % len(shape_of(node))
    axes = list(walk.broadcast([walk.of(one) for one in args["tensors"]], node))
    axes.insert(axis, walk.fresh((len(args["tensors"]),), _place(node))[0])
    return tuple(axes)


def _parted(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes | list[Axes]:
    """The parts of a split: terms of one axis."""
    axes = walk.of(args["self"])
    axis = args["dim"] % len(axes)
    sizes = [size_of(part.shape[axis]) for part in node.meta["val"]]
    terms = walk.dims.terms(axes[axis], sizes) if isinstance(axes[axis].size, int) else None
    if terms is None:
        why = Refusal("it is split where its parts don't end", label(node))
        walk.pin((axes[axis],), why)
        terms = list(walk.fresh(sizes, why))
    return [(*axes[:axis], term, *axes[axis + 1 :]) for term in terms]


def _unbound(walk: Walk, node: fx.Node, args: dict[str, Any]) -> list[Axes]:
    rest = _without(walk, args["self"], args["dim"], node)
    return [rest for _ in node.meta["val"]]


def _selected(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    return _without(walk, args["self"], args["dim"], node)


def _without(walk: Walk, operand: fx.Node, dim: int, node: fx.Node) -> Axes:
    axes = walk.of(operand)
    axis = dim % len(axes)
    walk.pin((axes[axis],), _place(node))
    return (*axes[:axis], *axes[axis + 1 :])


def _sliced(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    axes = walk.of(args["self"])
    axis = args["dim"] % len(axes)
    dim, size = axes[axis], shape_of(node)[axis]
    if size == dim.size:
        return axes
    start, end = args["start"] or 0, args["end"]
    whole = isinstance(size, int) and isinstance(dim.size, int) and args["step"] == 1
    if whole and isinstance(start, int) and (end is None or isinstance(end, int)):
        before = start + dim.size if start < 0 else start
        terms = walk.dims.terms(dim, (before, size, dim.size - before - size))
        if terms is not None:
            walk.slices[node] = (terms[0], terms[1], terms[2])
            return (*axes[:axis], terms[1], *axes[axis + 1 :])
    why = Refusal("a slice takes positions of it", label(node))
    walk.pin((dim,), why)
    return (*axes[:axis], *walk.fresh((size,), why), *axes[axis + 1 :])


def _indexed(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    """x[i, :, j]: axes that are indexed are pinned, the others pass."""
    axes = walk.of(args["self"])
    indices = [*args["indices"], *[None] * (len(axes) - len(args["indices"]))]
    at = [axis for axis, index in enumerate(indices) if index is not None]
    why = Refusal("it is indexed", label(node))
    walk.pin([axes[axis] for axis in at], why)
    for axis in at:
        walk.pin(walk.of(indices[axis]), why)
    rest = [dim for axis, dim in enumerate(axes) if axis not in at]
    shape = node.meta["val"].shape
    adjacent = at == list(range(at[0], at[-1] + 1))
    place = at[0] if adjacent else 0
    count = len(shape) - len(rest)
    return (*rest[:place], *walk.fresh(shape[place : place + count], why), *rest[place:])


def _index_put(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes | list[Axes]:
    axes, values = walk.of(args["self"]), walk.of(args["values"])
    count = len(args["indices"])
    if any(index is None for index in args["indices"]):
        return unfollowed(walk, node, "it is written by index")
    why = Refusal("it is written by index", label(node))
    walk.pin(axes[:count], why)
    rest = axes[count:]
    walk.pin(values[: len(values) - len(rest)], why)
    walk.broadcast([rest, values[len(values) - min(len(rest), len(values)) :]], node)
    return axes


def _index_select(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    axes = walk.of(args["self"])
    axis = args["dim"] % len(axes)
    walk.pin((axes[axis],), _place(node))
    fresh = walk.fresh(node.meta["val"].shape[axis : axis + 1], _place(node))
    return (*axes[:axis], *fresh, *axes[axis + 1 :])


def _gathered(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    """Entries of one axis by index; along the others entry i is taken from entry i."""
    axes, index = walk.of(args["self"]), walk.of(args["index"])
    axis = args["dim"] % len(axes)
    walk.pin((axes[axis], index[axis]), _place(node))
    found = []
    for place, (dim, other) in enumerate(zip(axes, index, strict=True)):
        if place != axis and dim.size == other.size:
            other = walk.unify(dim, other, node)
        elif place != axis:
            walk.pin((dim, other), _place(node))
        found.append(other)
    return tuple(found)


def _padded(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    axes = list(walk.of(args["self"]))
    pad: Sequence[Any] = args["pad"]
    why = Refusal("it is padded", label(node))
    for back in range(len(pad) // 2):
        axis = len(axes) - 1 - back
        before, after = pad[2 * back], pad[2 * back + 1]
        if before == 0 and after == 0:
            continue
        walk.pin((axes[axis],), why)
        (axes[axis],) = walk.fresh(node.meta["val"].shape[axis : axis + 1], why)
    return tuple(axes)


def _repeated(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    """repeat: an axis n times over, whole; its dim is n x dim."""
    axes, shape = walk.of(args["self"]), shape_of(node)
    added = len(shape) - len(axes)
    found: list[Dim] = []
    for axis, size in enumerate(shape):
        dim = axes[axis - added] if axis >= added else walk.dims.new(1)
        times = quotient(size, dim.size)
        if times is None:
            walk.pin((dim,), _place(node))
            found += walk.fresh((size,), _place(node))
        else:
            copies = walk.fresh((times,), _place(node))
            found.append(walk.dims.product((*copies, dim)))
    return tuple(found)


def _interleaved(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes | list[Axes]:
    """repeat_interleave: each index n times in a row; its dim is dim x n."""
    axes = list(walk.of(args["self"]))
    if not isinstance(args["dim"], int) or not isinstance(args["repeats"], int):
        return unfollowed(walk, node, "it is repeated over all axes")
    axis = args["dim"] % len(axes)
    times = walk.fresh((args["repeats"],))
    walk.dims.mark(times[0], "copied")
    axes[axis] = walk.dims.product((axes[axis], *times))
    return tuple(axes)


def _item(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    source, index = node.args
    return walk.lists[source][index]  # type: ignore[index]


def _place(node: fx.Node) -> Refusal:
    return Refusal("a certain place of it is taken", label(node))


HANDLERS: dict[Any, Handler] = {
    operator.getitem: _item,
    **handlers_of(_permuted, PERMUTATIONS),
    **handlers_of(_reshaped, RESHAPES),
    aten.expand.default: _expanded,
    aten.cat.default: _concatenated,
    aten.stack.default: _stacked,
    **handlers_of(_parted, SPLITS),
    aten.unbind.int: _unbound,
    aten.select.int: _selected,
    aten.slice.Tensor: _sliced,
    aten.index.Tensor: _indexed,
    aten.gather.default: _gathered,
    aten.index_put.default: _index_put,
    aten.index_select.default: _index_select,
    aten.constant_pad_nd.default: _padded,
    aten.pad.default: _padded,
    aten.repeat.default: _repeated,
    aten.repeat_interleave.self_int: _interleaved,
}
