"""Writing through a view: what a tensor holds after one of its views got other values.

select(p, d, i)      <- v      select_scatter(p, v, d, i)
slice(p, d, a, b, s) <- v      slice_scatter(p, v, d, a, b, s), or v where it is all of p
permute(p, axes)     <- v      permute(v, inverse axes)
reshape(p, sizes)    <- v      reshape(v, sizes of p)
split(p)[i]          <- v      cat of the pieces with v in place of the i-th
unbind(p, d)[i]      <- v      select_scatter(p, v, d, i)
diagonal(p, ...)     <- v      diagonal_scatter(p, v, ...)
to, contiguous, ...  <- v      v, where they gave p itself
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.capture.writes import Build
from fxopt.nodes import same_sizes
from fxopt.operators import (
    ALIASES,
    CASTS,
    EXPANSIONS,
    PERMUTATIONS,
    RESHAPES,
    RESHAPES_LIKE,
    SPLITS,
    permutation_of,
)

aten = torch.ops.aten

_LAST = torch.iinfo(torch.int64).max
_RESHAPES = frozenset((*RESHAPES, *RESHAPES_LIKE))
_UNCHANGED = frozenset((*ALIASES, *CASTS, *EXPANSIONS))


@dataclass(frozen=True)
class View:
    """A call whose result shares memory with its operand: `operand` as it stands in `args`, and
    the `parent` that it named when the call ran."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operand: fx.Node
    parent: fx.Node

    def given(self, read: Callable[[fx.Node], fx.Node]) -> dict[str, Any]:
        """The arguments but the operand by the names of the schema, as they are read now."""
        schema = self.target._schema.arguments
        named: dict[str, Any] = {one.name: one.default_value for one in schema[1:]}
        named.update(zip((one.name for one in schema[1:]), self.args[1:], strict=False))
        named.update(self.kwargs)
        return {name: fx.map_arg(value, read) for name, value in named.items()}


def parent_after(
    view: View, old: fx.Node, new: fx.Node, read: Callable[[fx.Node], fx.Node], build: Build
) -> fx.Node | None:
    """The value of a view's parent, `old` before, after the view was given the value `new`.

    None for a view that has no inverse here.
    """
    target, kept = view.target, old.meta["val"]
    if target is operator.getitem:
        return _piece(view, old, new, read, build)
    if target in _UNCHANGED:
        return new if same_sizes(new.meta["val"].shape, kept.shape) else None
    if target in _RESHAPES:
        return _reshaped(new, old, build)
    if target in PERMUTATIONS:
        return _permuted(view, new, kept.ndim, build)
    given = view.given(read) if isinstance(target, torch._ops.OpOverload) else {}
    if target is aten.select.int:
        return build(aten.select_scatter.default, old, new, given["dim"], given["index"])
    if target is aten.slice.Tensor:
        return _sliced(old, new, build, *(given[n] for n in ("dim", "start", "end", "step")))
    if target is aten.narrow.default:
        start, length = given["start"], given["length"]
        return _sliced(old, new, build, given["dim"], start, _end(start, length, build), 1)
    if target is aten.diagonal.default:
        places = (given[n] for n in ("offset", "dim1", "dim2"))
        return build(aten.diagonal_scatter.default, old, new, *places)
    return None


def _sliced(
    old: fx.Node, new: fx.Node, build: Build, dim: Any, start: Any, end: Any, step: Any
) -> fx.Node:
    if start in (0, None) and step == 1 and _same(old, new):
        return new
    start, end = 0 if start is None else start, _LAST if end is None else end
    places = (dim, start, end) if step == 1 else (dim, start, end, step)
    return build(aten.slice_scatter.default, old, new, *places)


def _end(start: Any, length: Any, build: Build) -> Any:
    if not isinstance(start, int) or not isinstance(length, int):
        return build(operator.add, start, length)
    return _LAST if start < 0 and start + length >= 0 else start + length


def _same(one: fx.Node, other: fx.Node) -> bool:
    return same_sizes(one.meta["val"].shape, other.meta["val"].shape)


def _reshaped(value: fx.Node, like: fx.Node, build: Build) -> fx.Node:
    """`value` with the sizes of `like`; one size that is dynamic is what is left."""
    if _same(value, like):
        return value
    sizes = like.meta["val"].shape
    dynamic = [axis for axis, size in enumerate(sizes) if not isinstance(size, int)]
    asked = dynamic if len(dynamic) > 1 else ()
    spelled = [size if isinstance(size, int) else -1 for size in sizes]
    for axis in asked:
        spelled[axis] = build(aten.sym_size.int, like, axis)  # type: ignore[call-overload]
    return build(aten.reshape.default, value, spelled)


def _permuted(view: View, value: fx.Node, rank: int, build: Build) -> fx.Node:
    order = permutation_of(view.target, rank, view.args[1:], view.kwargs)
    axes = [order.index(axis) for axis in range(rank)]
    if rank == 2 and axes == [1, 0]:
        return build(aten.transpose.int, value, 0, 1)
    return build(aten.permute.default, value, axes)


def _piece(
    view: View, old: fx.Node, new: fx.Node, read: Callable[[fx.Node], fx.Node], build: Build
) -> fx.Node | None:
    """`view` is an item of a list; `old` is what was taken apart."""
    pieces, index = view.operand, view.args[1]
    args = fx.map_arg(pieces.args[1:], read)
    given = dict(zip((one.name for one in pieces.target._schema.arguments[1:]), args, strict=False))  # type: ignore[union-attr]
    given.update(fx.map_arg(dict(pieces.kwargs), read))
    dim = given.get("dim", 0)
    if pieces.target is aten.unbind.int:
        return build(aten.select_scatter.default, old, new, dim, index)
    if pieces.target not in SPLITS:
        return None
    parts = build(pieces.target, old, *args, **fx.map_arg(dict(pieces.kwargs), read))
    count = len(pieces.meta["val"])
    whole = [new if i == index else build(operator.getitem, parts, i) for i in range(count)]
    return build(aten.cat.default, whole, dim)
