"""Facts through operators that move entries and compute nothing."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.analyses.constant_channels.facts import (
    Facts,
    Finding,
    Handler,
    fixed_size,
    handlers_of,
    size_of,
)
from fxopt.analyses.constant_channels.known import Known, uniform
from fxopt.analyses.constant_channels.reshaping import reshaped
from fxopt.nodes import fake
from fxopt.operators import EXPANSIONS, PERMUTATIONS, REGROUPINGS, RESHAPES_LIKE, SPLITS, SQUEEZES

aten = torch.ops.aten


def _moved(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    """An operator that also takes the shapes that facts have, where all axes are there."""
    x, target = facts.of(node.args[0]), node.target
    if x is None or len(node.all_input_nodes) > 1 or not callable(target):
        return None
    return x.map(lambda t: target(t, *node.args[1:], **node.kwargs))


def _rolled(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    return _moved(facts, node, args) if args["dims"] else None


def _squeezed(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    x, source, dim = facts.of(args["self"]), args["self"], args.get("dim")
    if x is None:
        return None
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    ones = [axis % x.ndim for axis in dims if size_of(source, axis) == 1] if x.ndim else []
    return x.map(lambda t: t.squeeze(ones))


def _expanded(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    """New positions are copies: the facts broadcast as the value does."""
    return facts.of(args["self"])


def _reshaped(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    x = facts.of(args["self"])
    return None if x is None else reshaped(x, fake(args["self"]).shape, node.meta["val"].shape)


def _concatenated(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    rank = node.meta["val"].ndim
    parts = [one for one in args["tensors"] if fake(one).ndim == rank]
    return joined([(facts.of(one), size_of(one, args["dim"])) for one in parts], args["dim"] % rank)


def _stacked(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    axis = args["dim"] % node.meta["val"].ndim
    parts = [facts.of(one) for one in args["tensors"]]
    lifted = [None if x is None else x.map(lambda t: t.unsqueeze(axis)) for x in parts]
    return joined([(x, 1) for x in lifted], axis)


def joined(parts: Sequence[tuple[Known | None, int | None]], axis: int) -> Known | None:
    """Facts one after the other along `axis`, each with its length there (None: not fixed)."""
    known = [x for x, _ in parts if x is not None]
    if not known:
        return None
    shape = list(torch.broadcast_shapes(*(x.along(axis).shape for x in known)))
    if any(size is None for _, size in parts):
        if len(known) < len(parts):
            return None
        pieces = [x.along(axis).map(lambda t: t.expand(shape)) for x in known]
    else:
        pieces = [_piece(x, [*shape[:axis], size, *shape[axis + 1 :]], known) for x, size in parts]
    whole = Known(
        torch.cat([x.mask for x in pieces], axis), torch.cat([x.values for x in pieces], axis)
    )
    return (
        whole.compressed(axis) if all(size is not None for _, size in parts) else whole.along(axis)
    )


def _piece(known: Known | None, shape: list[Any], others: Sequence[Known]) -> Known:
    if known is not None:
        return known.map(lambda t: t.expand(shape))
    like = others[0]
    return Known(like.mask.new_zeros(()).expand(shape), like.values.new_zeros(()).expand(shape))


def _parted(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    """The parts of a split: runs of one axis, as long as the parts are."""
    x = facts.of(args["self"])
    if x is None:
        return None
    axis = args["dim"] % x.ndim
    found: list[Known | None] = []
    start = 0
    for part in node.meta["val"]:
        size = fixed_size(part.shape[axis])
        if x.shape[axis] == 1 or size is None:
            found.append(x.along(axis))
            continue
        found.append(x.map(lambda t, at=start, size=size: t.narrow(axis, at, size)))  # type: ignore[misc]
        start += size
    return found


def _unbound(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    x = facts.of(args["self"])
    if x is None:
        return None
    axis, count = args["dim"] % x.ndim, len(node.meta["val"])
    at = range(count) if x.shape[axis] > 1 else [0] * count
    return [x.map(lambda t, index=index: t.select(axis, index)) for index in at]  # type: ignore[misc]


def _item(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    source, index = node.args
    found = facts.lists.get(source) if isinstance(source, fx.Node) else None
    return found[index] if found and isinstance(index, int) else None


def _sliced(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    x, axis = facts.of(args["self"]), args["dim"]
    bounds = args["start"], args["end"], args["step"]
    if x is None or x.shape[axis] == 1:
        return x
    if any(isinstance(bound, fx.Node) for bound in bounds):
        return x.along(axis)
    return x.map(lambda t: aten.slice.Tensor(t, axis, *bounds))


def _selected(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    x, axis, index = facts.of(args["self"]), args["dim"], args["index"]
    if x is None:
        return None
    if x.shape[axis] == 1 or isinstance(index, fx.Node):
        return x.along(axis).map(lambda t: t.select(axis, 0))
    return x.map(lambda t: t.select(axis, index))


def _indexed(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    """x[:, i]: what holds at every position that can be picked, or those that are."""
    at = [axis for axis, index in enumerate(args["indices"]) if index is not None]
    return (
        _picked(facts, node, args["self"], at[0], args["indices"][at[0]]) if len(at) == 1 else None
    )


def _index_select(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    rank = fake(args["self"]).ndim
    return _picked(facts, node, args["self"], args["dim"] % rank, args["index"])


def _picked(facts: Facts, node: fx.Node, source: fx.Node, axis: int, index: fx.Node) -> Finding:
    x, picked, value = facts.of(source), facts.of(index), fake(index)
    if x is None or value.dtype in (torch.bool, torch.uint8):
        return None
    if picked is None or not picked.is_complete or x.shape[axis] == 1:
        x, shape = x.along(axis), (1,) * value.ndim
        return x.map(lambda t: t.reshape(*t.shape[:axis], *shape, *t.shape[axis + 1 :]))
    where = picked.values.long()
    return x.map(
        lambda t: t.index_select(axis, where.reshape(-1) % t.shape[axis]).reshape(
            *t.shape[:axis], *where.shape, *t.shape[axis + 1 :]
        )
    )


def _padded(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    x, source, pad = facts.of(args["self"]), args["self"], list(args["pad"])
    rank = node.meta["val"].ndim
    wide = [rank - 1 - at // 2 for at in range(0, len(pad), 2) if pad[at : at + 2] != [0, 0]]
    if args.get("mode", "constant") != "constant":
        return uniform(x, wide)  # the border repeats what is inside
    fill = float(args["value"] or 0.0)
    for axis in wide:
        before, after = pad[2 * (rank - 1 - axis) : 2 * (rank - axis)]
        x = _padded_axis(x, axis, rank, (before, size_of(source, axis), after), fill)
    return x


def _padded_axis(
    x: Known | None, axis: int, rank: int, sizes: tuple[Any, Any, Any], fill: float
) -> Known | None:
    """Facts between two runs of `fill`, as long as `sizes` says."""
    if x is not None and x.shape[axis] == 1 and bool((x.mask & (x.values == fill)).all()):
        return x
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        return None if x is None else x.only(x.values == fill).along(axis)
    border = Known.everywhere(torch.full((1,) * rank, fill, dtype=torch.float64))
    if x is not None:
        border = border.map(lambda t: t.to(x.mask.device))
    return joined([(border, sizes[0]), (x, sizes[1]), (border, sizes[2])], axis)


def _repeated(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    """repeat: each axis whole, several times over."""
    x, times = facts.of(args["self"]), args["repeats"]
    if x is None:
        return None
    x = x.map(lambda t: t.reshape((1,) * (len(times) - t.ndim) + tuple(t.shape)))
    for axis, count in enumerate(times):
        if not isinstance(count, int):
            x = x.along(axis)
    counts = [1 if size == 1 else count for size, count in zip(x.shape, times, strict=True)]
    return x.map(lambda t: t.repeat(counts))


def _interleaved(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    """repeat_interleave: each position several times in a row."""
    x, axis, times = facts.of(args["self"]), args["dim"], args["repeats"]
    if x is None or not isinstance(axis, int):
        return None
    if x.shape[axis] == 1 or not isinstance(times, int):
        return x.along(axis)
    return x.map(lambda t: t.repeat_interleave(times, axis))


HANDLERS: dict[Any, Handler] = {
    operator.getitem: _item,
    **handlers_of(_moved, *PERMUTATIONS, aten.unsqueeze.default, aten.flip.default),
    aten.roll.default: _rolled,
    **handlers_of(_squeezed, *SQUEEZES),
    **handlers_of(_expanded, *EXPANSIONS),
    **handlers_of(_reshaped, *REGROUPINGS, *RESHAPES_LIKE),
    **handlers_of(_concatenated, aten.cat.default, aten.concat.default, aten.concatenate.default),
    aten.stack.default: _stacked,
    **handlers_of(_parted, *SPLITS),
    aten.unbind.int: _unbound,
    aten.slice.Tensor: _sliced,
    aten.select.int: _selected,
    aten.index.Tensor: _indexed,
    aten.index_select.default: _index_select,
    **handlers_of(_padded, aten.pad.default, aten.constant_pad_nd.default),
    aten.repeat.default: _repeated,
    aten.repeat_interleave.self_int: _interleaved,
}
