"""Dims through operators that keep the shape, norms, reductions, and what makes new tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.analyses.channels.walk import Axes, Handler, Walk, shape_of, unfollowed
from fxopt.nodes import label
from fxopt.operators import CASTS, UNCHANGED, UNTAGGED_POINTWISE, ZEROING_DROPOUT
from fxopt.program import Refusal

aten = torch.ops.aten

_POINTWISE = (
    *UNTAGGED_POINTWISE,
    *ZEROING_DROPOUT,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.masked_fill.Tensor,
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
)
"""Pointwise operators that torch doesn't tag as such."""

_ADDS = (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor)


def is_pointwise(target: Any) -> bool:
    """Whether an operator maps entries one by one, its operands broadcast."""
    return target in _POINTWISE or torch.Tag.pointwise in getattr(target, "tags", ())


def pointwise(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    """Operands aligned at the right, entry by entry."""
    operands = [one for one in _tensors(args) if walk.of(one)]
    rank = len(shape_of(node))
    joins = node.target in _ADDS and _streams(walk, operands) > 1
    found = walk.broadcast([walk.of(one) for one in operands], node)
    if joins:
        for dim in found:
            walk.dims.mark(dim, "added")
    return found[len(found) - rank :] if found else walk.fresh(shape_of(node))


def _streams(walk: Walk, operands: Sequence[fx.Node]) -> int:
    """How many activations meet that aren't known to have the same channels."""
    activations = [walk.of(one) for one in operands if one.op == "call_function"]
    return len({tuple(map(walk.dims.find, axes)) for axes in activations})


def _tensors(args: dict[str, Any]) -> list[fx.Node]:
    return [one for one in args.values() if isinstance(one, fx.Node)]


def _first(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    return walk.of(node.args[0])


def _prelu(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    axes, weight = walk.of(args["self"]), walk.of(args["weight"])
    if len(axes) > 1:
        walk.unify(axes[1], weight[0], node)
    return axes


def _batch_norm(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes | list[Axes]:
    axes = walk.of(args["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        for dim in walk.of(args[name]):
            walk.unify(axes[1], dim, node)
    if node.target is aten.instance_norm.default:
        walk.pin(axes[2:], Refusal("instance norm takes statistics along it", label(node)))
    if node.target is aten._native_batch_norm_legit_functional.default:
        return [axes, *[(axes[1],)] * 4]
    return axes


def _stored(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    """State after a call has the channels of what was written to it."""
    axes = walk.of(args["self"])
    for one, other in zip(axes, walk.of(args["src"]), strict=True):
        walk.unify(one, other, node)
    return axes


def _layer_norm(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    axes = walk.of(args["input"])
    count = len(args["normalized_shape"])
    first = len(axes) - count
    for name in ("weight", "bias"):
        for axis, dim in enumerate(walk.of(args.get(name))):
            walk.unify(axes[first + axis], dim, node)
    if count > 1:
        walk.pin(axes[first:], Refusal("a norm over several axes", label(node)))
    for axis in range(first, len(axes)):
        walk.read(node, "norm", args["input"], axis)
    return axes


def _group_norm(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    axes = walk.of(args["input"])
    groups, channels = args["num_groups"], axes[1]
    for name in ("weight", "bias"):
        for dim in walk.of(args[name]):
            walk.unify(channels, dim, node)
    halves = walk.dims.split(channels, (groups, channels.size // groups))
    why = Refusal("a group norm takes statistics along it", label(node))
    walk.pin((channels,) if halves is None else halves[1:], why)
    walk.pin(axes[2:], why)
    return axes


def _mixed_along(name: str = "dim") -> Handler:
    """An operator such as softmax: entries along `dim` depend on each other."""

    def handle(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes | list[Axes]:
        axes = walk.of(args["self"])
        if not isinstance(args[name], int):
            return unfollowed(walk, node, f"{node.target} over all axes")
        why = Refusal(f"{_name(node)} is taken along it", label(node))
        walk.pin((axes[args[name]],) if axes else (), why)
        value = node.meta["val"]
        return axes if isinstance(value, Tensor) else [axes for _ in value]

    return handle


def _reduced(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes | list[Axes]:
    """Axes summed over, averaged over, or (all other reductions) pinned."""
    axes = walk.of(args["self"])
    given = args.get("dim")
    over = range(len(axes)) if given is None or given == [] else given
    gone = {axis % len(axes) for axis in ([over] if isinstance(over, int) else over) if axes}
    kind = {aten.mean.dim: "mean", aten.sum.dim_IntList: "sum"}.get(node.target)  # type: ignore[call-overload]
    for axis in sorted(gone):
        if kind is None or not isinstance(axes[axis].size, int):
            walk.pin((axes[axis],), Refusal(f"{_name(node)} is taken along it", label(node)))
        else:
            walk.read(node, kind, args["self"], axis)
    if args.get("keepdim"):
        kept = tuple(walk.dims.new(1) if axis in gone else dim for axis, dim in enumerate(axes))
    else:
        kept = tuple(dim for axis, dim in enumerate(axes) if axis not in gone)
    value = node.meta["val"]
    return kept if isinstance(value, Tensor) else [kept for _ in value]


def _created(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    why = Refusal(f"{_name(node)} makes it", label(node))
    return walk.fresh(node.meta["val"].shape, why)


def _glu(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes | list[Axes]:
    axes = list(walk.of(args["self"]))
    axis = args["dim"] % len(axes)
    half = axes[axis].size // 2
    terms = walk.dims.terms(axes[axis], (half, half))
    if terms is None:
        return unfollowed(walk, node, "its halves are not followed")
    axes[axis] = walk.unify(terms[0], terms[1], node)
    return tuple(axes)


def _embedding(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    rows, columns = walk.of(args["weight"])
    walk.pin((rows,), Refusal("rows are looked up by index", label(node)))
    walk.dims.mark(rows, "place")
    walk.dims.mark(columns, "added")
    return (*walk.of(args["indices"]), columns)


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


def handlers_of(handler: Handler, targets: Sequence[Any]) -> dict[Any, Handler]:
    """A table that gives each of `targets` one handler."""
    return dict.fromkeys(targets, handler)


HANDLERS: dict[Any, Handler] = {
    **handlers_of(pointwise, _POINTWISE),
    **handlers_of(_first, (*CASTS, *UNCHANGED)),
    aten.prelu.default: _prelu,
    aten.glu.default: _glu,
    aten.batch_norm.default: _batch_norm,
    aten.instance_norm.default: _batch_norm,
    aten._native_batch_norm_legit_functional.default: _batch_norm,
    aten.copy_.default: _stored,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _layer_norm,
    aten.group_norm.default: _group_norm,
    aten.embedding.default: _embedding,
    **handlers_of(
        _mixed_along(),
        (
            aten.softmax.int,
            aten._softmax.default,
            aten.log_softmax.int,
            aten.cumsum.default,
            aten.cumprod.default,
            aten.sort.default,
            aten.argsort.default,
            aten.flip.default,
        ),
    ),
    **handlers_of(
        _reduced,
        (
            aten.mean.dim,
            aten.sum.dim_IntList,
            aten.amax.default,
            aten.amin.default,
            aten.max.dim,
            aten.min.dim,
            aten.argmax.default,
            aten.argmin.default,
            aten.any.dim,
            aten.all.dim,
            aten.logsumexp.default,
            aten.var.dim,
            aten.var.correction,
            aten.std.correction,
            aten.linalg_vector_norm.default,
            aten.norm.ScalarOpt_dim,
            aten.prod.dim_int,
        ),
    ),
    **handlers_of(
        _created,
        (
            aten.arange.default,
            aten.arange.start,
            aten.arange.start_step,
            aten.full.default,
            aten.zeros.default,
            aten.ones.default,
            aten.empty.memory_format,
            aten.new_ones.default,
            aten.new_zeros.default,
            aten.new_full.default,
            aten.new_empty.default,
            aten.scalar_tensor.default,
        ),
    ),
}
