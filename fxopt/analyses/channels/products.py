"""Dims through what sums over channels: linears, convolutions, matrix products, attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.analyses.channels.dims import Dim
from fxopt.analyses.channels.pointwise import handlers_of
from fxopt.analyses.channels.walk import Axes, Handler, Walk, size_of, unfollowed
from fxopt.nodes import label
from fxopt.operators.convolutions import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from fxopt.operators.views import PERMUTATIONS
from fxopt.operators.windows import WINDOWED
from fxopt.program import Refusal

aten = torch.ops.aten

_NO_GROUPS = "query heads that don't group by key heads"


def _linear(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes:
    x, weight = args["input"], args["weight"]
    rows, columns = walk.of(weight)
    return _affine(walk, node, x, weight, (1, columns), rows, args["bias"])


def _addmm(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes | list[Axes]:
    if args["beta"] != 1 or args["alpha"] != 1:
        return unfollowed(walk, node, "a scaled sum")
    columns, rows = walk.of(args["mat2"])
    axes = _affine(walk, node, args["mat1"], args["mat2"], (0, columns), rows, None)
    return walk.broadcast([axes, walk.of(args["self"])], node)


def _affine(
    walk: Walk,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    column_axis: tuple[int, Dim],
    rows: Dim,
    bias: fx.Node | None,
) -> Axes:
    axis, columns = column_axis
    axes = (*walk.of(x)[:-1], walk.unify(walk.of(x)[-1], columns, node))
    walk.axes[x] = axes
    walk.read(node, _kind(weight), x, len(axes) - 1, weight, axis)
    for dim in walk.of(bias):
        walk.unify(dim, rows, node)
    return (*axes[:-1], rows)


def _kind(weight: fx.Node) -> Any:
    """A constant matrix is a weight; anything else makes it a product of two activations."""
    while weight.op == "call_function" and weight.target in PERMUTATIONS:
        weight = weight.args[0]  # type: ignore[assignment]
    return "weight" if weight.op == "get_attr" else "product"


def _matmul(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes | list[Axes]:
    one, other = node.args[:2]
    assert isinstance(one, fx.Node)
    assert isinstance(other, fx.Node)
    left, right = walk.of(one), walk.of(other)
    if len(left) < 2 or len(right) < 2:
        return unfollowed(walk, node, "a product with a vector")
    walk.unify(left[-1], right[-2], node)
    walk.read(node, _kind(other), one, len(left) - 1, other, len(right) - 2)
    batch = walk.broadcast([left[:-2], right[:-2]], node)
    for dim in batch:
        walk.dims.mark(dim, "heads")
    if _kind(other) == "product":
        walk.dims.mark(left[-1], "head_dim")
        walk.dims.mark(right[-1], "head_dim")
    return (*batch, left[-2], right[-1])


def _baddbmm(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes | list[Axes]:
    left, right = walk.of(args["batch1"]), walk.of(args["batch2"])
    walk.unify(left[2], right[1], node)
    walk.read(node, "product", args["batch1"], 2, args["batch2"], 1)
    batch = walk.unify(left[0], right[0], node)
    walk.dims.mark(batch, "heads")
    return walk.broadcast([(batch, left[1], right[2]), walk.of(args["self"])], node)


def _attention(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes | list[Axes]:
    query, key, value = (walk.of(args[name]) for name in ("query", "key", "value"))
    if len(query) < 3:
        return unfollowed(walk, node, "attention without heads")
    heads = walk.broadcast([key[:-2], value[:-2]], node)
    if args["enable_gqa"] and query[-3].size != heads[-1].size:
        if not _share_heads(walk, node, query[-3], heads[-1]):
            return unfollowed(walk, node, _NO_GROUPS)
        heads = (*walk.broadcast([query[:-3], heads[:-1]], node), query[-3])
    else:
        heads = walk.broadcast([query[:-2], heads], node)
    for dim in heads:
        walk.dims.mark(dim, "heads")
    walk.dims.mark(query[-1], "head_dim")
    walk.dims.mark(value[-1], "head_dim")
    walk.unify(query[-1], key[-1], node)
    walk.read(node, "product", args["query"], len(query) - 1, args["key"], len(key) - 1)
    over = walk.unify(key[-2], value[-2], node)
    mask = walk.of(args["attn_mask"])
    walk.broadcast([(*heads, query[-2], over), mask], node)
    walk.pin((over, query[-2]), Refusal("attention's positions", label(node)))
    for dim in (over, query[-2]):
        walk.dims.mark(dim, "place")
    return (*heads, query[-2], value[-1])


def _share_heads(walk: Walk, node: fx.Node, heads: Dim, key_heads: Dim) -> bool:
    """State that neighbouring query heads read one key head; False where they don't divide so."""
    count = key_heads.size
    halves = walk.dims.split(heads, (count, heads.size // count))
    if halves is None:
        return False
    walk.unify(halves[0], key_heads, node)
    walk.dims.mark(halves[1], "copied")
    return True


def _cached_attention(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes | list[Axes]:
    q, k, v, past_k, past_v = (walk.of(args[n]) for n in ("q", "k", "v", "past_k", "past_v"))
    for one, other in ((q, k), (q, past_k)):
        walk.unify(one[0], other[0], node)
        walk.unify(one[3], other[3], node)
    for one, other in ((k, v), (k, past_k), (v, past_v)):
        walk.broadcast([one[:2], other[:2]], node)
    walk.unify(v[3], past_v[3], node)
    if q[1].size == k[1].size:
        walk.unify(q[1], k[1], node)
    elif not _share_heads(walk, node, q[1], k[1]):
        return unfollowed(walk, node, _NO_GROUPS)
    for dim in walk.of(args["sinks"]):
        walk.unify(dim, q[1], node)
    walk.dims.mark(q[1], "heads")
    walk.dims.mark(q[3], "head_dim")
    walk.dims.mark(v[3], "head_dim")
    walk.read(node, "product", args["q"], 3, args["k"], 3)
    positions = (q[2], k[2], v[2], past_k[2], past_v[2])
    masks = (walk.of(args["past_seen"])[1], walk.of(args["seen"])[1])
    walk.pin((*positions, *masks), Refusal("attention's positions", label(node)))
    for dim in positions:
        walk.dims.mark(dim, "place")
    return (q[0], q[2], q[1], v[3])


def _convolution(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes | list[Axes]:
    x, weight, groups = args["input"], args["weight"], args["groups"]
    axes, taps = walk.of(x), walk.of(weight)
    if len(axes) != len(taps):
        return unfollowed(walk, node, "a convolution without a batch")
    transposed = node.target in TRANSPOSED_CONVOLUTIONS
    why = Refusal("a convolution slides along it", label(node))
    walk.pin((*taps[2:], *axes[2:]), why)
    for dim in (*taps[2:], *axes[2:]):
        walk.dims.mark(dim, "place")
    for dim in taps[:2]:
        walk.dims.mark(dim, "convolved")
    found = _channels(walk, node, axes[1], taps, groups, transposed)
    if found is None:
        return unfollowed(walk, node, "groups that can't be followed")
    summed, out = found
    walk.read(node, _kind(weight), x, 1, weight, 0 if transposed else 1, summed)
    for dim in walk.of(args["bias"]):
        out = walk.unify(out, dim, node)
    return (axes[0], out, *walk.fresh(node.meta["val"].shape[2:], why))


def _channels(
    walk: Walk, node: fx.Node, channels: Dim, taps: Axes, groups: int, transposed: bool
) -> tuple[Dim, Dim] | None:
    """The channels that a convolution sums over, and those that come out.

    The weight is [out, in / groups] or, transposed, [in, out / groups]: the axis it has in full is
    groups x its share, of which the groups are those of the channels on the other side.
    """
    if groups == 1:
        inner, outer = (taps[0], taps[1]) if transposed else (taps[1], taps[0])
        walk.unify(channels, inner, node)
        return inner, outer
    mine = walk.dims.split(channels, (groups, channels.size // groups))
    full = walk.dims.split(taps[0], (groups, taps[0].size // groups))
    if mine is None or full is None:
        return None
    walk.unify(mine[0], full[0], node)
    if transposed:
        walk.unify(mine[1], full[1], node)
        return mine[1], walk.dims.product((full[0], taps[1]))
    walk.unify(mine[1], taps[1], node)
    return mine[1], taps[0]


def _windowed(rank: int) -> Handler:
    """Pooling and resampling: the last `rank` axes are mixed, channels pass."""

    def handle(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes | list[Axes]:
        source = node.args[0]
        axes = walk.of(source)
        why = Refusal("a window slides along it", label(node))
        walk.pin(axes[-rank:], why)
        value = node.meta["val"]
        found = [
            (*axes[:-rank], *walk.fresh([size_of(s) for s in one.shape[-rank:]], why))
            for one in (value if isinstance(value, (tuple, list)) else [value])
        ]
        return found if isinstance(value, (tuple, list)) else found[0]

    return handle


def _grouped_mm(walk: Walk, node: fx.Node, args: dict[str, Any]) -> Axes | list[Axes]:
    """Rows of x [T, K], sorted by expert, by each expert's matrix of W [E, K, N]."""
    x, weight = node.args[0], node.args[1]
    axes, taps = walk.of(x), walk.of(weight)
    if len(axes) != 2 or len(taps) != 3:
        return unfollowed(walk, node, "a grouped product of other ranks")
    walk.pin(taps[:1], Refusal("experts are chosen by index", label(node)))
    walk.unify(axes[1], taps[1], node)
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    walk.read(node, _kind(weight), x, 1, weight, 1)
    return (axes[0], taps[2])


HANDLERS: dict[Any, Handler] = {
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    **handlers_of(_matmul, (aten.mm.default, aten.matmul.default, aten.bmm.default)),
    aten.baddbmm.default: _baddbmm,
    aten.scaled_dot_product_attention.default: _attention,
    **handlers_of(_convolution, (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)),
    **{target: _windowed(rank) for rank, targets in WINDOWED.items() for target in targets},
}

BY_NAME: dict[str, Handler] = {
    "transformers.grouped_mm_fallback.default": _grouped_mm,
    "aten._grouped_mm.default": _grouped_mm,
    "fxopt.cached_attention.default": _cached_attention,
}
"""Operators that are registered only once a library, or a room above, is loaded."""
