"""Facts through what sums over channels: linears, convolutions, matrix products, attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.analyses.constant_channels.contraction import (
    PROBED,
    contracted,
    dead_rows,
    placed,
)
from fxopt.analyses.constant_channels.facts import Facts, Finding, Handler, handlers_of, size_of
from fxopt.analyses.constant_channels.known import Known, either, spread, total, uniform
from fxopt.operators import (
    CASTS,
    CONVOLUTIONS,
    EXPANSIONS,
    RESHAPES,
    RESHAPES_LIKE,
    TRANSPOSED_CONVOLUTIONS,
    UNCHANGED,
)

aten = torch.ops.aten

_MOST_PRODUCTS = 1 << 27


def _weight(facts: Facts, operand: Any, rank: int | None = 2) -> Tensor | None:
    """The operand's entries, where all of them are constants."""
    known = facts.of(operand)
    if known is None or (rank is not None and known.ndim != rank) or not known.is_complete:
        return None
    whole = tuple(known.shape) == tuple(operand.meta["val"].shape)
    return known.values if whole and known.values.is_floating_point() else None


def _with_bias(facts: Facts, known: Known | None, bias: Any, after: int = 0) -> Known | None:
    return known if bias is None else total(known, spread(facts.of(bias), after))


def _linear(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    weight = _weight(facts, args["weight"])
    if weight is None:
        return None
    return _with_bias(facts, contracted(weight, facts.of(args["input"])), args["bias"])


def _addmm(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    if args["beta"] != 1 or args["alpha"] != 1:
        return None
    names = ("mat1", "mat2") if "mat1" in args else ("batch1", "batch2")
    return total(matmul(facts, *(args[name] for name in names)), facts.of(args["self"]))


def _matmul(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    return matmul(facts, node.args[0], node.args[1])


def matmul(facts: Facts, one: Any, other: Any) -> Known | None:
    """Facts of x @ y for two tensors of which either may be a constant matrix."""
    ranks = [operand.meta["val"].ndim for operand in (one, other)]
    right = _weight(facts, other)
    if right is not None:
        return contracted(right.t(), facts.of(one))
    if min(ranks) < 2:
        return None
    x, y = facts.of(one), facts.of(other)
    left = _weight(facts, one)
    if left is not None:
        turned = contracted(left, None if y is None else y.map(lambda t: t.mT))
        if turned is not None and turned.ndim == 1:
            turned = turned.map(lambda t: t[None])
        return None if turned is None else turned.map(lambda t: t.mT)
    found = _summed_products(x, y, size_of(one, -1))
    if y is not None and rows_sum_to_one(one):
        found = either(found, y.along(-2))
    return found


def _summed_products(x: Known | None, y: Known | None, size: int | None) -> Known | None:
    """A sum of `size` products (None: not fixed) is known where each of its terms is."""
    if (x is None or y is None) and not _has_zeros(x or y):
        return None
    x, y = x or _nothing(y), y or _nothing(x)
    if x.shape[-1] < y.shape[-2]:
        x = x.filled(-1, y.shape[-2])
    elif y.shape[-2] < x.shape[-1]:
        y = y.filled(-2, x.shape[-1])
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    if math.prod((*batch, x.shape[-2], *y.shape[-2:])) > _MOST_PRODUCTS:
        return None
    live = (~x.zeros).float() @ (~y.zeros).float()
    sure = (x.mask & ~x.zeros).float() @ (y.mask & ~y.zeros).float()
    found = Known(live == sure, x.wide() @ y.wide())
    if size == x.shape[-1]:
        return found
    if size is None:
        return found.only(found.values == 0) if x.shape[-1] == 1 else None
    return Known(found.mask, found.values * size)


def _has_zeros(known: Known | None) -> bool:
    return known is not None and bool(known.zeros.any())


def _nothing(like: Known | None) -> Known:
    assert like is not None
    mask = torch.zeros((1, 1), dtype=torch.bool, device=like.mask.device)
    return Known(mask, mask.double())


def rows_sum_to_one(node: Any) -> bool:
    """Whether `node` is a softmax over its last axis, seen through casts and leading axes."""
    while isinstance(node, fx.Node) and node.target not in _SOFTMAXES:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or node.target not in _KEEP_ROWS:
            return False
        if not node.meta["val"].is_floating_point():
            return False
        sizes = [one.meta["val"].shape[-1:] for one in (node, source)]
        if len(sizes[0]) != 1 or not _same_expression(sizes[0][0], sizes[1][0]):
            return False
        node = source
    if not isinstance(node, fx.Node):
        return False
    axis, rank = node.args[1], node.meta["val"].ndim
    return isinstance(axis, int) and axis % rank == rank - 1


def _same_expression(one: Any, other: Any) -> bool:
    return all(
        a == b for a, b in [[s if isinstance(s, int) else s.node.expr for s in (one, other)]]
    )


def _attention(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    """Weights that sum to one: what is the same at all keys comes out.

    Under a mask that isn't known to leave each row a key, one may be zero; dropout changes the sum.
    Zero stays in any case.
    """
    value = uniform(facts.of(args["value"]), [-2])
    if value is None:
        return None
    if args["dropout_p"] or not _leaves_a_key(facts, args["attn_mask"]):
        value = value.only(value.zeros)
    query_heads, heads = (
        size_of(args[name], -3) if args[name].meta["val"].ndim > 2 else 1
        for name in ("query", "value")
    )
    if args["enable_gqa"] and value.ndim > 2 and value.shape[-3] > 1 and query_heads != heads:
        if query_heads is None or heads is None:
            return value.along(-3)
        return value.map(lambda t: t.repeat_interleave(query_heads // heads, -3))
    return value


def _leaves_a_key(facts: Facts, mask: fx.Node | None) -> bool:
    """Whether each query sees a key for certain."""
    if mask is None:
        return True
    known = facts.of(mask)
    if known is None:
        return False
    seen = known.values if known.values.dtype == torch.bool else known.wide() > -torch.inf
    return bool((known.mask & seen).any(-1).all())


def _convolution(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    """As a linear whose columns are channels; taps that reach into the border see zeros there."""
    weight, groups = _weight(facts, args["weight"], None), args["groups"]
    if weight is None:
        return None
    window = weight.ndim - 2
    channels = _channel_facts(facts.of(args["input"]), window, weight.shape[1] * groups, weight)
    if is_padded(args, weight.shape[2:]):
        channels = channels.only(channels.zeros)
    return _with_bias(
        facts, _grouped(weight.flatten(1), channels, groups, window), args["bias"], window
    )


def _transposed(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    """The same, but positions of the output see different taps: only zeros are followed."""
    weight, groups = _weight(facts, args["weight"], None), args["groups"]
    if weight is None:
        return None
    window, inner = weight.ndim - 2, weight.shape[0] // groups
    channels = _channel_facts(facts.of(args["input"]), window, weight.shape[0], weight)
    channels = channels.only(channels.zeros)
    rows = weight.unflatten(0, (groups, inner)).transpose(1, 2).flatten(0, 1).flatten(1)
    return _with_bias(facts, _grouped(rows, channels, groups, window), args["bias"], window)


def _channel_facts(x: Known | None, window: int, size: int, like: Tensor) -> Known:
    if x is None:
        nothing = torch.zeros(size, dtype=torch.bool, device=like.device)
        return Known(nothing, nothing.double())
    return x.channels(-window - 1, size)


def _grouped(rows: Tensor, channels: Known, groups: int, window: int) -> Known | None:
    """Facts [N, 1, ...] of rows [N, C / groups * taps] summed against channels [C]."""
    count, inner = rows.shape
    taps = inner * groups // len(channels.mask) if len(channels.mask) else 1
    masks, values = (
        t.reshape(groups, -1).repeat_interleave(taps, 1) for t in (channels.mask, channels.wide())
    )
    owner = torch.arange(count, device=rows.device) // (count // groups)
    dead = dead_rows(rows, ~(masks if groups == 1 else masks[owner]))
    sums = (rows[dead].double() * values[owner[dead]]).sum(1)
    return spread(placed(dead, sums, count, rows), window)


def is_padded(args: Mapping[str, Any], kernel: torch.Size) -> bool:
    """Whether a convolution reads zeros beyond the border; `args` by schema name."""
    padding = args["padding"]
    if padding == "same":
        return any(size > 1 for size in kernel)
    return padding != "valid" and any(size != 0 for size in padding)


def _grouped_mm(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    """Rows of x [T, K] by one of the matrices W [E, K, N]: zero where all of them give zero."""
    weight, x = _weight(facts, node.args[1], 3), facts.of(node.args[0])
    if weight is None or node.meta["val"].ndim != 2:
        return None
    zeros = None if x is None else x.only(x.zeros)
    found: Known | None = None
    for expert in weight:
        one = contracted(expert.t(), zeros)
        if one is None:
            return None
        found = one if found is None else found.only(one.mask)
    return found


def _embedding(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    """A column that is the same in every row; the rows themselves where the indices are known."""
    weight, indices = _weight(facts, args["weight"]), facts.of(args["indices"])
    if weight is None or not len(weight):
        return None
    if indices is not None and indices.is_complete:
        return Known.everywhere(weight[indices.values.long()])
    columns = (weight[:PROBED] == weight[0]).all(0).nonzero().flatten()
    if len(columns):
        columns = columns[(weight[:, columns] == weight[0, columns]).all(0)]
    return placed(columns, weight[0, columns].double(), weight.shape[1], weight)


_SOFTMAXES = (aten.softmax.int, aten._softmax.default)
_KEEP_ROWS = frozenset((*CASTS, *UNCHANGED, *RESHAPES, *RESHAPES_LIKE, *EXPANSIONS))

HANDLERS: dict[Any, Handler] = {
    aten.linear.default: _linear,
    **handlers_of(_addmm, aten.addmm.default, aten.baddbmm.default),
    **handlers_of(_matmul, aten.mm.default, aten.matmul.default, aten.bmm.default),
    aten.scaled_dot_product_attention.default: _attention,
    **handlers_of(_convolution, *CONVOLUTIONS),
    **handlers_of(_transposed, *TRANSPOSED_CONVOLUTIONS),
    aten.embedding.default: _embedding,
}

BY_NAME: dict[str, Handler] = {
    "transformers.grouped_mm_fallback.default": _grouped_mm,
    "aten._grouped_mm.default": _grouped_mm,
}
"""Operators that are registered only once a library is loaded."""
