"""Facts through reductions, windows and norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.analyses.constant_channels.facts import Facts, Finding, Handler, handlers_of, size_of
from fxopt.analyses.constant_channels.known import (
    Known,
    either,
    product,
    spread,
    total,
    uniform,
)
from fxopt.operators.windows import WINDOWED

aten = torch.ops.aten


def _reduced(reduce: Callable[[Tensor, int], Tensor], sums: bool = False) -> Handler:
    """`reduce` of axes that are known whole; of one that is uniform, its value or a multiple."""

    def handle(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
        x, dims = facts.of(args["self"]), args.get("dim")
        if x is None:
            return None
        dims = range(x.ndim) if dims is None or dims == [] else dims
        axes = [axis % x.ndim for axis in ([dims] if isinstance(dims, int) else dims) if x.ndim]
        for axis in axes:
            if x.shape[axis] > 1:
                mask = x.mask.all(axis, keepdim=True)
                x = Known(mask, reduce(x.wide(), axis))
            elif sums:
                count = size_of(args["self"], axis)
                x = x.only(x.zeros) if count is None else Known(x.mask, x.wide() * count)
        if not args.get("keepdim"):
            x = x.map(lambda t: t.squeeze(axes))
        value = node.meta["val"]
        return x if isinstance(value, Tensor) else [x, *[None] * (len(value) - 1)]

    return handle


def _windowed(rank: int) -> Handler:
    """Maxima, means and interpolations over windows of the last `rank` axes: a constant stays."""

    def handle(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
        x = uniform(facts.of(node.args[0]), range(-rank, 0))
        if x is not None and _is_shifted(args):
            x = x.only(x.zeros)
        value = node.meta["val"]
        return x if isinstance(value, Tensor) else [x, *[None] * (len(value) - 1)]

    return handle


def _is_shifted(args: Mapping[str, Any]) -> bool:
    """Whether averages take zeros of the border in, or are divided by another count."""
    if args.get("divisor_override") is not None:
        return True
    padding = args.get("padding", 0)
    padded = any(padding) if isinstance(padding, (list, tuple)) else padding != 0
    return padded and bool(args.get("count_include_pad", False))


def _along_one_axis(compute: Callable[[Tensor, int], Tensor]) -> Handler:
    """softmax and the like: known where all is that it is taken over."""

    def handle(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
        x, axis = facts.of(args["self"]), args["dim"]
        whole = _whole(x, args["self"], [axis])
        return None if whole is None else Known(whole.mask, compute(whole.wide(), axis))

    return handle


def _whole(x: Known | None, source: fx.Node, axes: Sequence[int]) -> Known | None:
    """Facts in full length along `axes`, where all along them is known."""
    if x is None:
        return None
    for axis in axes:
        size = size_of(source, axis)
        if size is None:
            return None
        x = x.filled(axis, size)
    return x.only(x.mask.all(dim=tuple(axes), keepdim=True)) if axes else x


def _learning_norm(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    """A batch norm on batch statistics, of which it gives four more results."""
    after = args["input"].meta["val"].ndim - 2
    return [_affine(facts, None, args, after), None, None, None, None]


def _batch_norm(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    """In eval mode (x - mean) / sqrt(var + eps), per channel."""
    source = args["input"]
    after = source.meta["val"].ndim - 2
    x, mean, var = (facts.of(args[name]) for name in ("input", "running_mean", "running_var"))
    normalised = None
    if not args.get("training", args.get("use_input_stats")) and mean and var:
        shift = spread(Known(mean.mask, -mean.wide()), after)
        scale = spread(Known(var.mask, (var.wide() + args["eps"]).rsqrt()), after)
        normalised = product(total(x, shift), scale)
    return _affine(facts, normalised, args, after)


def _group_norm(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    return _affine(facts, None, args, args["input"].meta["val"].ndim - 2)


def _layer_norm(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    """Known where all that it is taken over is."""
    axes, x = _normalised_axes(args), facts.of(args["input"])
    whole = _whole(x, args["input"], axes)
    normalised = None
    if whole is not None:
        values = whole.wide()
        centred = values - values.mean(axes, keepdim=True)
        variance = centred.square().mean(axes, keepdim=True)
        normalised = Known(whole.mask, centred * (variance + args["eps"]).rsqrt())
    return _affine(facts, normalised, args)


def _rms_norm(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    """x / sqrt(mean(x^2) + eps): a zero stays."""
    axes, x, eps = _normalised_axes(args), facts.of(args["input"]), args["eps"]
    if eps is None:
        eps = torch.finfo(args["input"].meta["val"].dtype).eps
    whole = _whole(x, args["input"], axes)
    normalised = None
    if whole is not None:
        values = whole.wide()
        mean = values.square().mean(axes, keepdim=True)
        normalised = Known(whole.mask, values * (mean + eps).rsqrt())
    if x is not None and eps > 0:
        normalised = either(normalised, x.only(x.zeros))
    return _affine(facts, normalised, args)


def _normalised_axes(args: Mapping[str, Any]) -> list[int]:
    return list(range(-len(args["normalized_shape"]), 0))


def _affine(
    facts: Facts, normalised: Known | None, args: Mapping[str, Any], after: int | None = None
) -> Known | None:
    """normalised * weight + bias: where the weight is zero, the bias whatever the input is."""
    weight, bias = (
        facts.of(args[name]) if args.get(name) is not None else Known.everywhere(torch.tensor(one))
        for name, one in (("weight", 1.0), ("bias", 0.0))
    )
    if after is not None:
        weight, bias = (
            one if one is None or not one.ndim else spread(one, after) for one in (weight, bias)
        )
    return total(product(normalised, weight), bias)


_MEAN = _reduced(lambda values, axis: values.mean(axis, keepdim=True))
_SUM = _reduced(lambda values, axis: values.sum(axis, keepdim=True), sums=True)
_MAXIMUM = _reduced(lambda values, axis: values.amax(axis, keepdim=True))
_MINIMUM = _reduced(lambda values, axis: values.amin(axis, keepdim=True))

HANDLERS: dict[Any, Handler] = {
    **handlers_of(_MEAN, aten.mean.default, aten.mean.dim),
    **handlers_of(_SUM, aten.sum.default, aten.sum.dim_IntList),
    **handlers_of(_MAXIMUM, aten.amax.default, aten.max.default, aten.max.dim),
    **handlers_of(_MINIMUM, aten.amin.default, aten.min.default, aten.min.dim),
    **handlers_of(
        _along_one_axis(lambda values, axis: values.softmax(axis)),
        aten.softmax.int,
        aten._softmax.default,
    ),
    aten.log_softmax.int: _along_one_axis(lambda values, axis: values.log_softmax(axis)),
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    **handlers_of(_batch_norm, aten.batch_norm.default, aten.instance_norm.default),
    aten._native_batch_norm_legit_functional.default: _learning_norm,
    **{target: _windowed(rank) for rank, targets in WINDOWED.items() for target in targets},
}
