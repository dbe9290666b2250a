"""Several nodes that are one instruction.

w * (x / sqrt(mean(x²) + eps))                        one norm of rows, w left out or not
x * cos + [-right, left] * sin                        one rotation, x = [left, right]
f(x) * y                                              f: silu, gelu
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

import fxopt.kernels  # noqa: F401  (registers the fxopt:: operators)
from fxopt.executor.arrays import Array
from fxopt.executor.instructions import Function, Kind, own
from fxopt.executor.layout import Layout
from fxopt.executor.rules import rows_of
from fxopt.rewriting import Match, constant, find, hole, op

aten, ops = torch.ops.aten, torch.ops.fxopt

Fused = Callable[[Layout, Match], Array]


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def _is_last(axes: Any) -> bool:
    return list(axes) == [-1]


_SQUARES = op(aten.pow.Tensor_Scalar, hole("x"), 2)
_MEAN = op(aten.mean.dim, _SQUARES, hole("axes", _is_last), True)
_UNIT = op(aten.rsqrt.default, op(aten.add.Tensor, _MEAN, hole("eps", lambda x: not _is_node(x))))
_NORM = op(aten.mul.Tensor, hole("x"), _UNIT, commutes=True)
_SCALED_NORM = op(aten.mul.Tensor, constant("w"), _NORM, commutes=True)


def _rms_norm(layout: Layout, match: Match) -> Array:
    x = layout.array(match["x"])
    weight = layout.maybe_array(match.bound.get("w"))
    flat, rows, pitch = rows_of(layout, x)
    result = own(x.sizes)
    epsilon = float(match["eps"])
    layout.listing.add(Kind.RMS_NORM, rows, x.sizes[-1], epsilon, result, flat, pitch, weight)
    return result


_ROTATION = op(
    aten.add.Tensor,
    op(aten.mul.Tensor, hole("x", _is_node), hole("cos", _is_node)),
    op(aten.mul.Tensor, hole("turned", lambda value: _turned(value) is not None), hole("sin")),
)


def _turned(value: Any) -> fx.Node | None:
    """What `value` is the turned halves of, [-right, left]; None where it is something else."""
    if not _is_node(value) or value.target is not aten.cat.default:
        return None
    parts, axis = value.args[0], value.args[1] if len(value.args) > 1 else 0
    rank = value.meta["val"].dim()
    if len(parts) != 2 or axis % rank != rank - 1 or parts[0].target is not aten.neg.default:
        return None
    right, left = parts[0].args[0], parts[1]
    size = value.meta["val"].shape[-1]
    if not isinstance(size, int) or size % 2:
        return None
    halves = (_last_axis(left), _last_axis(right))
    whole, half = slice(0, size // 2), slice(size // 2, size)
    if None in halves or halves[0] != (left.args[0], whole) or halves[1] != (left.args[0], half):
        return None
    source = left.args[0]
    return source if source.meta["val"].shape[-1] == size else None


def _last_axis(node: Any) -> tuple[fx.Node, slice] | None:
    """Of which node and entries of the last axis `node` is a slice."""
    if not _is_node(node) or node.target is not aten.slice.Tensor or len(node.args) != 4:
        return None
    source, axis, start, end = node.args
    value = source.meta["val"]
    size = value.shape[-1]
    numbers = isinstance(start, int) and isinstance(end, int) and isinstance(size, int)
    if axis % value.dim() != value.dim() - 1 or not numbers or start < 0 or end < 0:
        return None
    return source, slice(start, min(end, size))


def _rotated(layout: Layout, match: Match) -> Array:
    x = layout.rows_dense(layout.array(match["x"]))
    cosine, sine = (layout.rows_dense(layout.array(match[name])) for name in ("cos", "sin"))
    result = own(layout.sizes_of(match.root))
    layout.listing.add(Kind.ROTATE, *layout.rows_loop(result, x, cosine, sine))
    return result


def _times(function: Function, inner: Any) -> tuple[Any, Fused]:
    def fused(layout: Layout, match: Match) -> Array:
        x, y = (layout.array(match[name]) for name in ("x", "y"))
        return layout.map(function, layout.sizes_of(match.root), x, y)

    return op(aten.mul.Tensor, inner, hole("y", _is_node), commutes=True), fused


FUSIONS: tuple[tuple[Any, Fused], ...] = (
    (_SCALED_NORM, _rms_norm),
    (_NORM, _rms_norm),
    (_ROTATION, _rotated),
    _times(Function.SILU_TIMES, op(aten.silu.default, hole("x"))),
    _times(Function.GELU_TANH_TIMES, op(aten.gelu.default, hole("x"), approximate="tanh")),
    _times(Function.GELU_TIMES, op(aten.gelu.default, hole("x"))),
    _times(Function.GELU_TIMES, op(ops.gelu.default, hole("x"))),
)


def fusions_of(graph: fx.Graph) -> Mapping[fx.Node, Callable[[Layout], Array] | None]:
    """For the last node of each group that is one instruction, how it is written; None for the
    others of the group, which nothing else reads."""
    found: dict[fx.Node, Callable[[Layout], Array] | None] = {}
    for node in reversed(graph.nodes):
        if node in found:
            continue
        for pattern, fused in FUSIONS:
            match = find((pattern,), node)
            inner = None if match is None else _inner(match)
            if match is None or inner is None or any(one in found for one in inner):
                continue
            found[node] = _bound(fused, match)
            found.update(dict.fromkeys(inner, None))
            break
    return found


def _bound(fused: Fused, match: Match) -> Callable[[Layout], Array]:
    return lambda layout: fused(layout, match)


def _inner(match: Match) -> set[fx.Node] | None:
    """The nodes of a match but its root; None where others read them, a turned half is of something
    else than what is turned, or a weight isn't one of each entry of a row."""
    inner = set(match.inner) - {match.root}
    weight, turned = match.bound.get("w"), match.bound.get("turned")
    if weight is not None and weight.meta["val"].shape != match["x"].meta["val"].shape[-1:]:
        return None
    if turned is not None:
        if _turned(turned) is not match["x"]:
            return None
        negative, left = turned.args[0]
        inner |= {turned, negative, negative.args[0], left}
    allowed = inner | {match.root}
    return inner if all(user in allowed for one in inner for user in one.users) else None
