"""Linear layers: instructions that read the weight; float32 weights of many rows by operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import fxopt.kernels  # noqa: F401  (registers the fxopt:: operators)
from fxopt.executor.arrays import Array, Buffer, contiguous
from fxopt.executor.instructions import POST_OPS, STORED, Function, Kind, own
from fxopt.executor.layout import Layout, NotListedError, Rule
from fxopt.nodes import arguments

aten, ops = torch.ops.aten, torch.ops.fxopt

FEW_ROWS = 8
"""Rows that are multiplied as a weight is read: `kFewRows` of `few_rows.h`."""


@dataclass(frozen=True)
class _Weight:
    """A weight [N, K], its bias [N], and by groups of columns its scales and zero points.

    Where it `rounds`, the groups of its input become int8.
    """

    stored: Array
    bias: Array | None
    scale: Array | None = None
    zero: Array | None = None
    group: int = 0
    rounds: bool = False

    @property
    def tensors(self) -> tuple[Array | None, ...]:
        """All of it."""
        return self.stored, self.bias, self.scale, self.zero


def _linear(layout: Layout, node: fx.Node) -> Array:
    given = arguments(node)
    weight = _Weight(layout.array(given["weight"]), layout.maybe_array(given["bias"]))
    x, sizes = layout.array(given.get("input", given.get("x"))), layout.sizes_of(node)
    post_op, other = given.get("post_op", "none"), layout.maybe_array(given.get("other"))
    if x.count // x.sizes[-1] > FEW_ROWS:
        packed = node.target is ops.packed_linear.default
        return _by_operator(layout, sizes, x, weight, packed, post_op, other)
    result = _multiplied(layout, node, x, weight)
    if post_op == "add":
        assert other is not None
        return layout.map(Function.ADD, sizes, result, other)
    return result if post_op == "none" else layout.map(_POST_OPS[post_op], sizes, result)


def _half_linear(layout: Layout, node: fx.Node) -> Array:
    given = arguments(node)
    stored = layout.array(given["weight"], torch.bfloat16, torch.float16)
    weight = _Weight(stored, layout.maybe_array(given["bias"]))
    return _multiplied(layout, node, layout.array(given["x"]), weight)


def _int8_linear(layout: Layout, node: fx.Node) -> Array:
    given = arguments(node)
    stored = layout.array(given["weight"], torch.int8)
    scale = layout.array(given["weight_scale"], torch.float32, torch.float16)
    one_a_row = scale.count == stored.sizes[0] and scale.dtype == torch.float32
    by_row = one_a_row and node.target not in _ROUNDING
    group = 0 if by_row else _group(stored.sizes[1], stored.sizes[0], scale, _VECTOR)
    rounds = _rounds(node, group)
    weight = _Weight(stored, layout.maybe_array(given["bias"]), scale, None, group, rounds)
    return _multiplied(layout, node, layout.array(given["x"]), weight)


def _int4_linear(layout: Layout, node: fx.Node) -> Array:
    given = arguments(node)
    stored = layout.array(given["packed"], torch.uint8)
    scale = layout.array(given["scale"], torch.float32, torch.float16)
    zero = layout.maybe_array(given["zero_point"], scale.dtype)
    group = _group(2 * stored.sizes[1], stored.sizes[0], scale, 2 * _VECTOR)
    rounds = _rounds(node, group)
    weight = _Weight(stored, layout.maybe_array(given["bias"]), scale, zero, group, rounds)
    return _multiplied(layout, node, layout.array(given["x"]), weight)


def _group(inner: int, outputs: int, scale: Array, least: int) -> int:
    """The columns of a group, which are a whole number of vectors."""
    group = inner // (scale.count // outputs)
    if group % least:
        raise NotListedError(f"groups of {group} columns, no multiple of {least}")
    return group


def _rounds(node: fx.Node, group: int) -> bool:
    """Whether the input is rounded too, in groups that the kernel has: `rounds_in`."""
    if node.target not in _ROUNDING:
        return False
    if group not in (32, 64) and (group == 0 or group % 128):
        raise NotListedError(f"rounded groups of {group} columns: not 32, 64 or a multiple of 128")
    return True


def _multiplied(layout: Layout, node: fx.Node, x: Array, weight: _Weight) -> Array:
    _check_held(weight)
    x, sizes = layout.dense(x), layout.sizes_of(node)
    inner = x.sizes[-1]
    result = own(sizes)
    half = weight.scale is not None and weight.scale.dtype == torch.float16
    shape = (x.count // inner, inner, sizes[-1])
    tensors = (result, x, *weight.tensors)
    layout.listing.add(
        Kind.PRODUCT,
        STORED[weight.stored.dtype],
        *shape,
        *tensors,
        half,
        weight.group,
        weight.rounds,
    )
    return result


def _by_operator(
    layout: Layout,
    sizes: tuple[int, ...],
    x: Array,
    weight: _Weight,
    packed: bool,
    post_op: str,
    other: Array | None,
) -> Array:
    _check_held(weight)
    x = layout.dense(x)
    inner = x.sizes[-1]
    result = Array(Buffer("result"), sizes, contiguous(sizes), torch.float32)
    layout.listing.add(
        Kind.OPERATOR_CALL,
        packed,
        result.buffer,
        x.count // inner,
        inner,
        sizes[-1],
        x,
        weight.stored.buffer.index,
        -1 if weight.bias is None else weight.bias.buffer.index,
        POST_OPS.index(post_op),
        None if other is None else layout.dense(other),
    )
    return result


def _check_held(weight: _Weight) -> None:
    if any(one is not None and one.buffer.place != "held" for one in weight.tensors):
        raise NotListedError("a product of two values that are computed")


_POST_OPS = {
    "relu": Function.RELU,
    "gelu": Function.GELU,
    "gelu_tanh": Function.GELU_TANH,
    "silu": Function.SILU,
}
_VECTOR = 16
"""Entries of the widest vector: groups are whole numbers of it, whatever the CPU."""

_ROUNDING = {ops.int8_grouped_linear.default, ops.int4_grouped_linear.default}

PRODUCTS: dict[Any, Rule] = {
    aten.linear.default: _linear,
    ops.packed_linear.default: _linear,
    ops.half_weight_only_linear.default: _half_linear,
    ops.int8_weight_only_linear.default: _int8_linear,
    ops.int4_weight_only_linear.default: _int4_linear,
    ops.int8_grouped_linear.default: _int8_linear,
    ops.int4_grouped_linear.default: _int4_linear,
}
