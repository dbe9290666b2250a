"""Masking channels: every reader is given zeros for them, and no type changes.

    x @ Wᵀ                 ->  x @ (W m)ᵀ
    sum(x)                 ->  sum(x m)
    mean(x)                ->  sum(x m) / n'
    layer_norm(x) w + b    ->  (x - mean') rstd' w + b,     mean' and rstd' over the n' kept

with m one for channels that stay and zero for those that are to leave. What cutting means to
compute, written without cutting.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.analyses.channels import Channels, Group, Reader
from fxopt.nodes import arguments
from fxopt.operators.linears import as_linear
from fxopt.program import Program
from fxopt.recipe import Recipe
from fxopt.rewriting import Build, Conversion, convert
from fxopt.weights.reconstruction import Fitted

aten = torch.ops.aten


def masked(
    program: Program,
    channels: Channels,
    keep: Mapping[str, Tensor],
    fitted: Mapping[str, Fitted] | None = None,
    norms: bool = True,
) -> Program:
    """`program` whose readers see zeros for the channels that `keep` leaves out.

    `keep` gives int64 indices by the group's name; `fitted` a reader's new weight and bias by its
    node's name. With `norms` False norms, means and sums stay as they are.
    """
    groups = [channels[name] for name, kept in keep.items() if len(kept) < channels[name].size]
    if not groups:
        return program
    return convert(program, _Masked(groups, keep, fitted or {}, norms), "MaskChannels")


class _Masked(Conversion):
    def __init__(
        self,
        groups: Sequence[Group],
        keep: Mapping[str, Tensor],
        fitted: Mapping[str, Fitted],
        norms: bool,
    ) -> None:
        self.fired = len(groups)
        self.zeroed: dict[str, list[tuple[int, Tensor]]] = {}
        self.refitted: dict[str, Tensor] = {}
        self.kept: dict[str, dict[int, Tensor]] = {}
        self.made: dict[str, Tensor | Recipe] = {}
        for group in groups:
            gone = torch.ones(group.size, dtype=torch.bool)
            gone[keep[group.name]] = False
            for reader in group.readers:
                if reader.kind == "weight":
                    self._zero(reader, gone, fitted.get(reader.node.name))
                elif norms and reader.kind in ("norm", "mean", "sum"):
                    self._mask(reader, gone)

    def _zero(self, reader: Reader, gone: Tensor, fitted: Fitted | None) -> None:
        assert reader.weight is not None
        if fitted is None:
            columns = reader.weight.positions[gone].flatten()
            self.zeroed.setdefault(reader.weight.name, []).append((reader.weight.axis, columns))
            return
        self.refitted[reader.weight.name] = fitted.weight
        bias = _bias(reader.node)
        if fitted.bias is not None and bias is not None:
            self.refitted[str(bias.target)] = fitted.bias

    def _mask(self, reader: Reader, gone: Tensor) -> None:
        place = reader.operand
        size = int(place.node.meta["val"].shape[place.axis])
        masks = self.kept.setdefault(reader.node.name, {})
        mask = masks.setdefault(place.axis, torch.ones(size, dtype=torch.bool))
        mask[place.positions[gone].flatten()] = False

    def constant(self, node: fx.Node, tensor: Tensor | Recipe) -> Tensor | Recipe:
        name = str(node.target)
        if name not in self.made:
            self.made[name] = self._new(name, tensor)
        return self.made[name]

    def _new(self, name: str, tensor: Tensor | Recipe) -> Tensor | Recipe:
        if name in self.refitted:
            return _recipe(tensor, functools.partial(_replaced, new=self.refitted[name]))
        if name in self.zeroed:
            return _recipe(tensor, functools.partial(_without, columns=self.zeroed[name]))
        return tensor

    def call(
        self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build
    ) -> fx.Node | None:
        masks = self.kept.get(node.name)
        return None if masks is None else _MASKED[node.target](node, args, masks, build)


def _recipe(tensor: Tensor | Recipe, make: Any) -> Recipe:
    return Recipe(make, (tensor,), tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad)


def _without(tensor: Tensor, columns: Sequence[tuple[int, Tensor]]) -> Tensor:
    tensor = tensor.clone()
    for axis, index in columns:
        tensor.index_fill_(axis, index.to(tensor.device), 0)
    return tensor


def _replaced(tensor: Tensor, new: Tensor) -> Tensor:
    return new.to(tensor)


def _bias(node: fx.Node) -> fx.Node | None:
    linear = as_linear(node)
    if linear is not None:
        return linear.bias
    bias = arguments(node).get("bias")
    return bias if isinstance(bias, fx.Node) else None


def _times_mask(x: fx.Node, masks: Mapping[int, Tensor], node: fx.Node, build: Build) -> fx.Node:
    """x m, with each mask along its axis."""
    value = x.meta["val"]
    for axis, mask in masks.items():
        shape = [1] * value.ndim
        shape[axis] = len(mask)
        kept = mask.to(value.dtype).reshape(shape).to(value.device)
        x = build(aten.mul.Tensor, x, build.constant(f"{node.name}_kept", kept))
    return x


def _sum(
    node: fx.Node, args: tuple[Any, ...], masks: Mapping[int, Tensor], build: Build
) -> fx.Node:
    return build(node.target, _times_mask(args[0], masks, node, build), *args[1:], **node.kwargs)


def _mean(
    node: fx.Node, args: tuple[Any, ...], masks: Mapping[int, Tensor], build: Build
) -> fx.Node:
    mean = _sum(node, args, masks, build)
    share = 1.0
    for mask in masks.values():
        share *= len(mask) / int(mask.sum())
    return build(aten.mul.Tensor, mean, share)


def _norm(
    node: fx.Node, args: tuple[Any, ...], masks: Mapping[int, Tensor], build: Build
) -> fx.Node:
    """layer_norm(x, shape, w, b, eps) and rms_norm(x, shape, w, eps), over their last axis."""
    named = arguments(node)
    centred = node.target is aten.layer_norm.default
    ((_, mask),) = masks.items()
    count, eps = int(mask.sum()), named["eps"]
    x = args[0]
    if eps is None:
        eps = torch.finfo(x.meta["val"].dtype).eps
    if centred:
        total = build(aten.sum.dim_IntList, _times_mask(x, masks, node, build), [-1], True)
        x = build(aten.sub.Tensor, x, build(aten.div.Tensor, total, count))
    x = _times_mask(x, masks, node, build)
    squares = build(aten.sum.dim_IntList, build(aten.mul.Tensor, x, x), [-1], True)
    variance = build(aten.add.Tensor, build(aten.div.Tensor, squares, count), eps)
    x = build(aten.mul.Tensor, x, build(aten.rsqrt.default, variance))
    operands = dict(zip((one.name for one in node.target._schema.arguments), args, strict=False))  # type: ignore[union-attr]
    if operands.get("weight") is not None:
        x = build(aten.mul.Tensor, x, operands["weight"])
    if operands.get("bias") is not None:
        x = build(aten.add.Tensor, x, operands["bias"])
    return x


_MASKED: dict[Any, Callable[..., fx.Node]] = {
    aten.layer_norm.default: _norm,
    aten.rms_norm.default: _norm,
    aten.mean.dim: _mean,
    aten.sum.dim_IntList: _sum,
}
