"""Linear layers: of few rows by an instruction that reads the weight, of many by operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import fxopt.kernels  # noqa: F401  (registers the fxopt:: operators)
from fxopt.executor.arrays import Array, Buffer, contiguous
from fxopt.executor.instructions import POST_OPS, STORED, Called, Function, Kind, own
from fxopt.executor.layout import Layout, NotListedError, Rule
from fxopt.nodes import arguments

aten, ops = torch.ops.aten, torch.ops.fxopt

FEW_ROWS = 8
"""Rows that are multiplied as a weight is read: `kFewRows` of `few_rows.h`."""


@dataclass(frozen=True)
class _Product:
    """A linear layer of x: its weight, what scales it, and by which operator many rows go."""

    called: Called
    weight: Array
    bias: Array | None
    scale: Array | None = None
    group: int = 0


def _linear(called: Called) -> Rule:
    def rule(layout: Layout, node: fx.Node) -> Array:
        given = arguments(node)
        weight, bias = layout.array(given["weight"]), layout.maybe_array(given["bias"])
        x = layout.array(given.get("input", given.get("x")))
        post_op = given.get("post_op", "none")
        other = layout.maybe_array(given.get("other"))
        return _multiplied(layout, node, x, _Product(called, weight, bias), post_op, other)

    return rule


def _half_linear(layout: Layout, node: fx.Node) -> Array:
    given = arguments(node)
    weight = layout.array(given["weight"], torch.bfloat16, torch.float16)
    product = _Product(Called.HALF, weight, layout.maybe_array(given["bias"]))
    return _multiplied(layout, node, layout.array(given["x"]), product)


def _int8_linear(layout: Layout, node: fx.Node) -> Array:
    given = arguments(node)
    weight, scale = layout.array(given["weight"], torch.int8), layout.array(given["weight_scale"])
    if scale.count != weight.sizes[0]:
        raise NotListedError("scales of groups")
    product = _Product(Called.INT8, weight, layout.maybe_array(given["bias"]), scale)
    return _multiplied(layout, node, layout.array(given["x"]), product)


def _int4_linear(layout: Layout, node: fx.Node) -> Array:
    given = arguments(node)
    packed, scale = layout.array(given["packed"], torch.uint8), layout.array(given["scale"])
    inner = 2 * packed.sizes[1]
    group = inner // (scale.count // packed.sizes[0])
    if group % 32:  # the columns that a vector's bytes hold
        raise NotListedError(f"groups of {group} columns")
    bias = layout.maybe_array(given["bias"])
    product = _Product(Called.INT4, packed, bias, scale, group)
    return _multiplied(layout, node, layout.array(given["x"]), product)


def _multiplied(
    layout: Layout,
    node: fx.Node,
    x: Array,
    product: _Product,
    post_op: str = "none",
    other: Array | None = None,
) -> Array:
    tensors = [one for one in (product.weight, product.scale, product.bias) if one is not None]
    if any(one.buffer.place != "held" for one in tensors):
        raise NotListedError("a product of two values that are computed")
    x = layout.dense(x)
    inner = x.sizes[-1]
    rows = x.count // inner
    sizes = layout.sizes_of(node)
    if rows > FEW_ROWS:
        return _by_operator(layout, sizes, (rows, inner, sizes[-1]), x, product, post_op, other)
    result = own(sizes)
    weight, bias, scale, group = product.weight, product.bias, product.scale, product.group
    words = (STORED[weight.dtype], rows, inner, sizes[-1], result, x, weight, scale, bias, group)
    layout.listing.add(Kind.PRODUCT, *words)
    if post_op == "add":
        assert other is not None
        return layout.map(Function.ADD, sizes, result, other)
    return result if post_op == "none" else layout.map(_POST_OPS[post_op], sizes, result)


def _by_operator(
    layout: Layout,
    sizes: tuple[int, ...],
    shape: tuple[int, int, int],
    x: Array,
    product: _Product,
    post_op: str,
    other: Array | None,
) -> Array:
    result = Array(Buffer("result"), sizes, contiguous(sizes), torch.float32)
    held = (product.weight, product.scale, product.bias)
    layout.listing.add(
        Kind.OPERATOR_CALL,
        int(product.called),
        result.buffer,
        *shape,
        x,
        *(-1 if one is None else one.buffer.index for one in held),
        POST_OPS.index(post_op),
        None if other is None else layout.dense(other),
    )
    return result


_POST_OPS = {
    "relu": Function.RELU,
    "gelu": Function.GELU,
    "gelu_tanh": Function.GELU_TANH,
    "silu": Function.SILU,
}


PRODUCTS: dict[Any, Rule] = {
    aten.linear.default: _linear(Called.LINEAR),
    ops.packed_linear.default: _linear(Called.PACKED_LINEAR),
    ops.half_weight_only_linear.default: _half_linear,
    ops.int8_weight_only_linear.default: _int8_linear,
    ops.int4_weight_only_linear.default: _int4_linear,
}
