"""Cutting channels out of every tensor they stand in: one conversion of the whole graph.

The channels are unread when they are cut: what sums over them multiplies them by zero. So

    sum_j x_j w_ij  =  sum_{j kept} x_j w_ij

holds at every reader, and everything between a producer and its readers maps channels one by one
(that is what the analysis of channels has established). Parameters lose rows and columns under
their own names; sizes that the graph spells out are spelled anew.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.analyses.channels import Channels, Dim, Walk
from fxopt.nodes import arguments
from fxopt.operators.convolutions import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from fxopt.operators.views import SIZED_RESHAPES, SPLITS
from fxopt.program import Program
from fxopt.recipe import Recipe
from fxopt.rewriting import Build, Conversion, convert

aten = torch.ops.aten


def cut(
    program: Program,
    channels: Channels,
    keep: Mapping[str, Tensor],
    exact: bool = True,
    names: Mapping[str, str] | None = None,
) -> Program:
    """`program` without the channels that `keep` leaves out.

    `keep` maps the names of groups of `channels(program)` to the indices that stay, int64, sorted.
    With `exact` a mean or rms_norm over cut channels still counts them: they were zeros.
    `names` gives new names to state.
    """
    masks = {
        channels.walk.dims.find(channels[name].dim): _mask(channels[name].size, kept)
        for name, kept in keep.items()
        if len(kept) < channels[name].size
    }
    if not masks:
        return program
    return convert(program, _Cut(channels.walk, masks, exact, names or {}), "CutChannels")


def _mask(size: int, kept: Tensor) -> Tensor:
    return torch.zeros(size, dtype=torch.bool).index_fill_(0, kept, True)


class _Cut(Conversion):
    def __init__(
        self, walk: Walk, masks: Mapping[Dim, Tensor], exact: bool, names: Mapping[str, str]
    ) -> None:
        self.walk = walk
        self.masks = masks
        self.exact = exact
        self.names = names
        self.fired = len(masks)
        self.selected: dict[str, Tensor | Recipe] = {}

    def constant(self, node: fx.Node, tensor: Tensor | Recipe) -> Tensor | Recipe:
        name = str(node.target)
        if name not in self.selected:
            kept = [self.walk.dims.kept(dim, self.masks) for dim in self.walk.axes[node]]
            self.selected[name] = selected(tensor, kept)
        return self.selected[name]

    def name(self, node: fx.Node) -> str:
        return self.names.get(str(node.target), str(node.target))

    def call(
        self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build
    ) -> fx.Node | None:
        respell = _RESPELLED.get(node.target)
        if respell is None or not self._touches(node):
            return None
        return respell(self, node, args, kwargs, build)

    def size(self, dim: Dim) -> int:
        """How many indices of a dim of fixed size stay."""
        mask = self.walk.dims.kept(dim, self.masks)
        return int(dim.size) if mask is None else int(mask.sum())

    def is_cut(self, dim: Dim) -> bool:
        """Whether a dim loses any index."""
        return any(leaf in self.masks for leaf in self.walk.dims.leaves(dim))

    def axes(self, node: Any) -> tuple[Dim, ...]:
        """The dims of a node's value."""
        return self.walk.of(node)

    def _touches(self, node: fx.Node) -> bool:
        values = [self.axes(node), *self.walk.lists.get(node, ())]
        values += [self.axes(operand) for operand in node.all_input_nodes]
        return any(self.is_cut(dim) for axes in values for dim in axes)

    def halves(self, dim: Dim, groups: int) -> int:
        """How many of an axis's groups stay."""
        parts = self.walk.dims.split(dim, (groups, dim.size // groups))
        assert parts is not None
        return self.size(parts[0])


def selected(tensor: Tensor | Recipe, kept: Sequence[Tensor | None]) -> Tensor | Recipe:
    """The entries of a tensor that stay, given a mask (or None for all) for each axis."""
    indices = tuple(None if mask is None else mask.nonzero().flatten() for mask in kept)
    if all(index is None for index in indices):
        return tensor
    shape = torch.Size(
        size if index is None else len(index)
        for size, index in zip(tensor.shape, indices, strict=True)
    )
    make = functools.partial(_select, indices=indices)
    return Recipe(make, (tensor,), shape, tensor.dtype, tensor.device, tensor.requires_grad)


def _select(tensor: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    for axis, index in enumerate(indices):
        if index is not None:
            tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor.contiguous()


def _sizes(cut: _Cut, axes: Sequence[Dim], given: Sequence[Any]) -> list[Any]:
    """A spelled shape after the cut; what was computed at run time is left to be inferred."""
    found: list[Any] = []
    for dim, size in zip(axes, given, strict=True):
        if not cut.is_cut(dim) or (isinstance(size, int) and size == -1):
            found.append(size)
        else:
            found.append(-1 if isinstance(size, fx.Node) else cut.size(dim))
    return found


def _shape(
    cut: _Cut, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build
) -> fx.Node:
    """view, reshape and expand: x, shape."""
    return build(node.target, args[0], _sizes(cut, cut.axes(node), args[1]), *args[2:], **kwargs)


def _unflatten(
    cut: _Cut, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build
) -> fx.Node:
    axis = args[1] % len(cut.axes(node.args[0]))
    axes = cut.axes(node)[axis : axis + len(args[2])]
    return build(node.target, args[0], args[1], _sizes(cut, axes, args[2]))


def _split(
    cut: _Cut, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build
) -> fx.Node:
    named = arguments(node)
    axis = named["dim"] % len(cut.axes(node.args[0]))
    parts = [axes[axis] for axes in cut.walk.lists[node]]
    if not any(map(cut.is_cut, parts)):
        return build(node.target, *args, **kwargs)
    sizes = [cut.size(part) for part in parts]
    return build(aten.split_with_sizes.default, args[0], sizes, axis)


def _slice(
    cut: _Cut, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build
) -> fx.Node:
    terms = cut.walk.slices.get(node)
    if terms is None:
        return build(node.target, *args, **kwargs)
    before, inside, _ = terms
    start = cut.size(before)
    axis = arguments(node)["dim"]
    return build(node.target, args[0], axis, start, start + cut.size(inside))


def _interleave(
    cut: _Cut, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build
) -> fx.Node:
    named = arguments(node)
    axis = named["dim"]
    count = cut.axes(node.args[0])[axis].size
    parts = cut.walk.dims.split(cut.axes(node)[axis], (count, named["repeats"]))
    assert parts is not None
    return build(node.target, args[0], cut.size(parts[1]), axis)


def _layer_norm(
    cut: _Cut, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build
) -> fx.Node:
    return build(node.target, args[0], _normalized(cut, node), *args[2:], **kwargs)


def _rms_norm(
    cut: _Cut, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build
) -> fx.Node:
    """rms_norm over n channels, of which all but k are zeros, with s = n / k:

    x / sqrt(sum x² / n + eps)  =  sqrt(s) x / sqrt(sum x² / k + s eps)
    """
    named = arguments(node)
    shape = _normalized(cut, node)
    if not cut.exact:
        return build(node.target, args[0], shape, *args[2:], **kwargs)
    scale = math.prod(named["normalized_shape"]) / math.prod(shape)
    eps = named["eps"]
    if eps is None:
        eps = torch.finfo(node.meta["val"].dtype).eps
    weight = args[2] if len(args) > 2 else kwargs.get("weight")
    normed = build(node.target, args[0], shape, weight, eps * scale)
    return build(aten.mul.Tensor, normed, math.sqrt(scale))


def _normalized(cut: _Cut, node: fx.Node) -> list[int]:
    axes = cut.axes(node)[-len(arguments(node)["normalized_shape"]) :]
    return [cut.size(dim) for dim in axes]


def _group_norm(
    cut: _Cut, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build
) -> fx.Node:
    groups = cut.halves(cut.axes(node)[1], args[1])
    return build(node.target, args[0], groups, *args[2:], **kwargs)


def _convolution(
    cut: _Cut, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build
) -> fx.Node:
    named = {**arguments(node), **kwargs}
    for argument, value in zip(node.target._schema.arguments, args, strict=False):  # type: ignore[union-attr]
        named[argument.name] = value
    if named["groups"] != 1:
        named["groups"] = cut.halves(cut.axes(node.args[1])[0], named["groups"])
    return build(node.target, *named.values())


def _attention(
    cut: _Cut, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build
) -> fx.Node:
    """The default scale is that of the heads' dimensions before the cut."""
    inner = cut.axes(node.args[0])[-1]
    if arguments(node)["scale"] is None and cut.is_cut(inner):
        kwargs = {**kwargs, "scale": float(inner.size) ** -0.5}
    return build(node.target, *args, **kwargs)


def _mean(
    cut: _Cut, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build
) -> fx.Node:
    """mean over n channels, of which all but k are zeros  =  k / n * mean over the k."""
    axes = cut.axes(node.args[0])
    over = arguments(node)["dim"] or range(len(axes))
    share = 1.0
    for axis in over:
        if cut.is_cut(axes[axis]):
            share *= cut.size(axes[axis]) / int(axes[axis].size)
    mean = build(node.target, *args, **kwargs)
    return build(aten.mul.Tensor, mean, share) if cut.exact and share != 1.0 else mean


_Respell = Callable[[_Cut, fx.Node, tuple[Any, ...], dict[str, Any], Build], fx.Node]

_RESPELLED: dict[Any, _Respell] = {
    **dict.fromkeys((*SIZED_RESHAPES, aten.expand.default), _shape),
    aten.unflatten.int: _unflatten,
    **dict.fromkeys(SPLITS, _split),
    aten.slice.Tensor: _slice,
    aten.repeat_interleave.self_int: _interleave,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS), _convolution),
    aten.scaled_dot_product_attention.default: _attention,
    aten.mean.dim: _mean,
}
"""Operators that spell out sizes, numbers of groups or a scale."""
