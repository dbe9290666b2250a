"""What each operator is in a listing: another view of an array, or instructions."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

import fxopt.kernels  # noqa: F401  (registers the fxopt:: operators)
from fxopt.executor.arrays import Array
from fxopt.executor.instructions import STORED, Function, Kind, Word, own
from fxopt.executor.layout import PREFIX, Layout, NotListedError, Prefix, Rule
from fxopt.executor.products import PRODUCTS
from fxopt.nodes import arguments
from fxopt.operators.views import PERMUTATIONS, RESHAPES, permutation

aten, ops = torch.ops.aten, torch.ops.fxopt

_NO_WINDOW = 1 << 62


def _axis(axis: int, count: int) -> int:
    return axis % count


def _reshape(layout: Layout, node: fx.Node) -> Array:
    array, sizes = layout.array(node.args[0], *_ANY), layout.sizes_of(node)
    viewed = array.viewed(sizes)
    if viewed is None:
        viewed = layout.dense(layout.array(node.args[0])).viewed(sizes)
    assert viewed is not None
    return viewed


def _unsqueeze(layout: Layout, node: fx.Node) -> Array | Prefix:
    value = layout.value(node.args[0])
    if not isinstance(value, Prefix):
        return _reshape(layout, node)
    axes, axis = list(value.axes), arguments(node)["dim"]
    axes.insert(_axis(axis, len(axes) + 1), -1)
    return Prefix(value.index, tuple(axes))


def _permute(layout: Layout, node: fx.Node) -> Array | Prefix:
    value, axes = layout.value(node.args[0]), permutation(node)
    if isinstance(value, Prefix):
        return Prefix(value.index, tuple(value.axes[axis] for axis in axes))
    return layout.array(node.args[0], *_ANY).permuted(axes)


def _contiguous(layout: Layout, node: fx.Node) -> Array:
    return layout.dense(layout.array(node.args[0]))


def _expand(layout: Layout, node: fx.Node) -> Array:
    return layout.array(node.args[0], *_ANY).expanded(layout.sizes_of(node))


def _slice(layout: Layout, node: fx.Node) -> Array:
    array, given = layout.array(node.args[0], *_ANY), arguments(node)
    axis = _axis(given["dim"], len(array.sizes))
    size = array.sizes[axis]
    start = 0 if given["start"] is None else layout.number(given["start"])
    start = min(max(0, start + size if start < 0 else start), size)
    step = layout.number(given["step"])
    return array.cut(axis, start, layout.sizes_of(node)[axis], step)


def _select(layout: Layout, node: fx.Node) -> Array:
    array, given = layout.array(node.args[0], *_ANY), arguments(node)
    axis = _axis(given["dim"], len(array.sizes))
    index = layout.number(given["index"])
    index = index + array.sizes[axis] if index < 0 else index
    viewed = array.cut(axis, index, 1).viewed(layout.sizes_of(node))
    assert viewed is not None
    return viewed


def _parts(layout: Layout, node: fx.Node) -> list[Array]:
    array, given = layout.array(node.args[0], *_ANY), arguments(node)
    axis = _axis(given["dim"], len(array.sizes))
    parts, start = [], 0
    for part in node.meta["val"]:
        size = layout.number(part.shape[axis])
        parts.append(array.cut(axis, start, size))
        start += size
    return parts


def _item(layout: Layout, node: fx.Node) -> Any:
    index: Any = node.args[1]
    return layout.value(node.args[0])[index]


def _cast(layout: Layout, node: fx.Node) -> Array:
    array = layout.array(node.args[0], *_ANY, *NARROW)
    wanted = node.meta["val"].dtype
    if wanted == array.dtype:
        return array
    if wanted != torch.float32 or array.dtype == torch.bool:
        raise NotListedError(f"it turns {array.dtype} into {wanted}")
    if array.dtype != torch.int64:
        return _widened(layout, array)
    result = own(array.sizes)
    layout.listing.add(Kind.WHOLE_MAP, int(Function.REAL), result, *layout.loop(array))
    return result


def _widened(layout: Layout, array: Array) -> Array:
    if not array.is_dense:
        raise NotListedError(f"{array.dtype} that doesn't lie together")
    result = own(array.sizes)
    layout.listing.add(Kind.WIDEN, STORED[array.dtype], array.count, result, array)
    return result


def _dequantize(layout: Layout, node: fx.Node) -> Array:
    given = arguments(node)
    if given["dtype"] != torch.float32 or given["zero_point"] is not None:
        raise NotListedError(f"int8 with a zero point, or as {given['dtype']}")
    x = _widened(layout, layout.array(given["q"], torch.int8))
    return layout.map(Function.MUL, x.sizes, x, layout.array(given["scale"]))


def _repeat(layout: Layout, node: fx.Node) -> Array:
    array, given = layout.array(node.args[0]), arguments(node)
    if given["dim"] is None or _axis(given["dim"], len(array.sizes)) != len(array.sizes) - 1:
        raise NotListedError("it repeats along another axis than the last")
    sizes, repeats = array.sizes, layout.number(given["repeats"])
    each = array.viewed((*sizes, 1))
    assert each is not None
    whole = layout.map(Function.COPY, (*sizes, repeats), each.expanded((*sizes, repeats)))
    repeated = whole.viewed((*sizes[:-1], sizes[-1] * repeats))
    assert repeated is not None
    return repeated


def _cat(layout: Layout, node: fx.Node) -> Array:
    given: Any = node.args[0]
    result = own(layout.sizes_of(node))
    axis, start = _axis(arguments(node)["dim"], len(result.sizes)), 0
    for one in given:
        array = layout.array(one)
        part = result.cut(axis, start, array.sizes[axis])
        layout.map_into(part, Function.COPY, array)
        start += array.sizes[axis]
    return result


def _map(function: Function) -> Rule:
    """One operand, and no option but for what it is computed in."""

    def rule(layout: Layout, node: fx.Node) -> Array:
        return layout.map(function, layout.sizes_of(node), layout.array(node.args[0]))

    return rule


def _map_of_two(function: Function) -> Rule:
    def rule(layout: Layout, node: fx.Node) -> Array:
        if node.meta["val"].dtype == torch.int64:
            return _whole(layout, node, function)
        given, sizes = arguments(node), layout.sizes_of(node)
        if given.get("rounding_mode") is not None:
            raise NotListedError("it rounds a quotient")
        left, right = _operand(layout, given["self"]), _operand(layout, given["other"])
        alpha = given.get("alpha", 1)
        if alpha != 1:
            right = layout.map(Function.MUL, right.sizes, right, layout.constant(float(alpha)))
        return layout.map(function, sizes, left, right)

    return rule


def _whole(layout: Layout, node: fx.Node, function: Function) -> Array:
    given, sizes = arguments(node), layout.sizes_of(node)
    if given.get("alpha", 1) != 1 or function not in (Function.ADD, Function.SUB, Function.MUL):
        raise NotListedError("it computes in int64")
    result = own(sizes, torch.int64)
    operands = [_whole_operand(layout, given[name]) for name in ("self", "other")]
    words = layout.loop(result, *operands)
    layout.listing.add(Kind.WHOLE_MAP, int(function), *words)
    return result


def _operand(layout: Layout, argument: Any) -> Array:
    if isinstance(argument, fx.Node):
        return layout.array(argument)
    if isinstance(argument, bool) or not isinstance(argument, int | float):
        raise NotListedError(f"{argument!r} is no number")
    return layout.constant(float(argument))


def _whole_operand(layout: Layout, argument: Any) -> Array:
    if isinstance(argument, fx.Node):
        return layout.array(argument, torch.int64)
    if type(argument) is not int:
        raise NotListedError(f"{argument!r} stands beside int64")
    return layout.constant(argument)


def _power(layout: Layout, node: fx.Node) -> Array:
    x, exponent, sizes = layout.array(node.args[0]), node.args[1], layout.sizes_of(node)
    roots = {0.5: Function.SQUARE_ROOT, -0.5: Function.RECIPROCAL_ROOT, -1: Function.RECIPROCAL}
    if exponent in roots:
        return layout.map(roots[exponent], sizes, x)  # type: ignore[index]
    if exponent not in (2, 3):
        raise NotListedError(f"the power {exponent}")
    square = layout.map(Function.MUL, sizes, x, x)
    return square if exponent == 2 else layout.map(Function.MUL, sizes, square, x)


def _clamp(layout: Layout, node: fx.Node) -> Array:
    given, sizes = arguments(node), layout.sizes_of(node)
    x = layout.array(given["self"])
    for name, function in (("min", Function.MAXIMUM), ("max", Function.MINIMUM)):
        if given[name] is not None:
            x = layout.map(function, sizes, x, layout.constant(float(given[name])))
    return x


def _gelu(layout: Layout, node: fx.Node) -> Array:
    tanh = arguments(node).get("approximate", "none") == "tanh"
    function = Function.GELU_TANH if tanh else Function.GELU
    return layout.map(function, layout.sizes_of(node), layout.array(node.args[0]))


def _zeros(layout: Layout, node: fx.Node) -> Array:
    dtype = node.meta["val"].dtype
    if dtype not in _ANY:
        raise NotListedError(f"it makes {dtype}")
    result = own(layout.sizes_of(node), dtype)
    layout.listing.add(Kind.CLEAR, result.count * dtype.itemsize, result)
    return result


def _count(layout: Layout, node: fx.Node) -> Array:
    if node.meta["val"].dtype != torch.int64:
        raise NotListedError(f"it counts in {node.meta['val'].dtype}")
    given = arguments(node)
    start, step = (layout.number(given.get(name, at)) for name, at in (("start", 0), ("step", 1)))
    result = own(layout.sizes_of(node), torch.int64)
    layout.listing.add(Kind.COUNT, result.count, start, step, result)
    return result


def rows_of(layout: Layout, array: Array) -> tuple[Array, int, int]:
    """An array whose rows lie evenly apart, how many these are, and the step between them."""
    array = layout.rows_dense(array)
    size = array.sizes[-1]
    rows = array.count // size
    flat = array.viewed((rows, size))
    if flat is None:
        flat = layout.dense(array).viewed((rows, size))
        assert flat is not None
    return flat, rows, size if rows == 1 else flat.strides[0]


def _mean(layout: Layout, node: fx.Node) -> Array:
    given = arguments(node)
    x = layout.array(given["self"])
    axes = [_axis(axis, len(x.sizes)) for axis in given["dim"] or range(len(x.sizes))]
    if axes != [len(x.sizes) - 1]:
        raise NotListedError(f"a mean over the axes {axes}")
    flat, rows, pitch = rows_of(layout, x)
    result = own(layout.sizes_of(node))
    layout.listing.add(Kind.MEAN, rows, x.sizes[-1], result, flat, pitch)
    return result


def _layer_norm(layout: Layout, node: fx.Node) -> Array:
    given = arguments(node)
    x = layout.array(given.get("input", given.get("x")))
    shape = given.get("normalized_shape", [x.sizes[-1]])
    if list(shape) != [x.sizes[-1]]:
        raise NotListedError(f"a norm over {shape}")
    weight, bias = (layout.maybe_array(given[name]) for name in ("weight", "bias"))
    flat, rows, pitch = rows_of(layout, x)
    result = own(x.sizes)
    layout.listing.add(
        Kind.LAYER_NORM, rows, x.sizes[-1], float(given["eps"]), result, flat, pitch, weight, bias
    )
    return result


def _embedding(layout: Layout, node: fx.Node) -> Array:
    given = arguments(node)
    table = layout.dense(layout.array(given["weight"], torch.float32, *NARROW))
    indices = layout.dense(layout.array(given["indices"], torch.int64))
    length, size = table.sizes
    return _gathered(layout, node, table, indices, (1, length, size), wraps=False)


def _index(layout: Layout, node: fx.Node) -> Array:
    x: Any
    indices: Any
    x, indices = node.args[:2]
    if sum(one is not None for one in indices) != 1 or indices[-1] is None:
        raise NotListedError("it takes entries along several axes")
    array = layout.dense(layout.array(x))
    axis = len(indices) - 1
    index = layout.array(indices[-1], torch.int64)
    inner = math.prod(array.sizes[axis + 1 :])
    outer = math.prod(array.sizes[:axis])
    sizes = (outer, array.sizes[axis], inner)
    return _gathered(layout, node, array, layout.dense(index), sizes, wraps=True)


def _gathered(
    layout: Layout,
    node: fx.Node,
    x: Array,
    indices: Array,
    sizes: tuple[int, int, int],
    wraps: bool,
) -> Array:
    """Rows of x [outer, length, size]; where `wraps`, a negative index counts from the end."""
    outer, length, size = sizes
    result = own(layout.sizes_of(node), x.dtype)
    row = size * x.dtype.itemsize
    words = (outer, indices.count, length, row, wraps, result, x, indices)
    layout.listing.add(Kind.GATHER, *words)
    return result


def _attention(layout: Layout, node: fx.Node) -> Array:
    given = arguments(node)
    q, k, v = (layout.rows_dense(layout.array(given[name])) for name in ("q", "k", "v"))
    seen = layout.dense(layout.array(given["seen"], torch.bool))
    sinks = layout.maybe_array(given["sinks"])
    past_seen, *past = (_prefix(layout, given[name]) for name in PREFIX if name in given)
    batch, heads, queries, size = q.sizes
    result = own((batch, queries, heads, v.sizes[3]))
    sizes = (batch, heads, k.sizes[1], queries, size, v.sizes[3])
    window = _NO_WINDOW if given["window"] is None else given["window"]
    options = (float(given["scale"]), window, float(given["softcap"] or 0.0))
    tensors: list[Word] = []
    for one in (q, k, v):
        tensors += (one, *one.strides[:3])
    prefix = [word for one in past for word in (one.index, *one.axes[:3])]
    layout.listing.add(
        Kind.ATTENTION,
        past_seen.index,
        len(past) > 2,
        *sizes,
        *options,
        result,
        *tensors,
        seen,
        sinks,
        *prefix,
    )
    return result


def _prefix(layout: Layout, argument: Any) -> Prefix:
    value = layout.value(argument)
    if not isinstance(value, Prefix) or value.axes[3:] not in ((), (3,), (-1,)):
        raise NotListedError("its prefix is computed")
    return value


_ANY = (torch.float32, torch.int64, torch.bool)
NARROW = (torch.bfloat16, torch.float16, torch.int8)

RULES: dict[Any, Rule] = {
    **dict.fromkeys(RESHAPES, _reshape),
    aten.unsqueeze.default: _unsqueeze,
    **dict.fromkeys(PERMUTATIONS, _permute),
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _parts,
    aten.split_with_sizes.default: _parts,
    aten.chunk.default: _parts,
    operator.getitem: _item,
    aten.cat.default: _cat,
    aten.zeros_like.default: _zeros,
    aten.zeros.default: _zeros,
    aten.arange.default: _count,
    aten.arange.start: _count,
    aten.arange.start_step: _count,
    aten.to.dtype: _cast,
    aten.add.Tensor: _map_of_two(Function.ADD),
    aten.sub.Tensor: _map_of_two(Function.SUB),
    aten.mul.Tensor: _map_of_two(Function.MUL),
    aten.div.Tensor: _map_of_two(Function.DIV),
    aten.maximum.default: _map_of_two(Function.MAXIMUM),
    aten.minimum.default: _map_of_two(Function.MINIMUM),
    aten.contiguous.default: _contiguous,
    aten.clone.default: _map(Function.COPY),
    aten.neg.default: _map(Function.NEGATIVE),
    aten.reciprocal.default: _map(Function.RECIPROCAL),
    aten.sqrt.default: _map(Function.SQUARE_ROOT),
    aten.rsqrt.default: _map(Function.RECIPROCAL_ROOT),
    aten.exp.default: _map(Function.EXPONENTIAL),
    aten.tanh.default: _map(Function.TANH),
    aten.sigmoid.default: _map(Function.SIGMOID),
    aten.silu.default: _map(Function.SILU),
    aten.relu.default: _map(Function.RELU),
    aten.cos.default: _map(Function.COSINE),
    aten.sin.default: _map(Function.SINE),
    aten.gelu.default: _gelu,
    ops.gelu.default: _gelu,
    aten.pow.Tensor_Scalar: _power,
    aten.clamp.default: _clamp,
    aten.mean.dim: _mean,
    aten.layer_norm.default: _layer_norm,
    ops.layer_norm.default: _layer_norm,
    aten.embedding.default: _embedding,
    aten.repeat_interleave.self_int: _repeat,
    ops.dequantize.default: _dequantize,
    aten.index.Tensor: _index,
    **PRODUCTS,
    ops.cached_attention.default: _attention,
    ops.int8_cached_attention.default: _attention,
}
