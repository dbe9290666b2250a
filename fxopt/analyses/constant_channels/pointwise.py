"""Facts through operators that work entry by entry, through casts, and of new tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxopt.analyses.constant_channels.facts import Facts, Finding, Handler, handlers_of, size_of
from fxopt.analyses.constant_channels.known import Known, chosen, product, spread
from fxopt.nodes import draws_random
from fxopt.operators import CASTS, UNCHANGED, UNTAGGED_POINTWISE, ZEROING_DROPOUT

aten = torch.ops.aten

_MOST_ENTRIES = 1 << 26
"""More aren't computed: facts of two axes that broadcast to both."""


def is_pointwise(target: Any) -> bool:
    """Whether an operator of torch is tagged as working entry by entry."""
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "aten"
        and torch.Tag.pointwise in target.tags
        and not target._schema.is_mutable
    )


def pointwise(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    """f(x, y, ...): f of the known entries, where all operands are known.

    From state alone it is computed in the program's dtypes, as the program does; else in float64.
    """
    found = {operand: facts.of(operand) for operand in node.all_input_nodes}
    known = {operand: fact for operand, fact in found.items() if fact is not None}
    if not found or len(known) < len(found) or draws_random(node):
        return None
    shape = torch.broadcast_shapes(*(fact.shape for fact in known.values()))
    if math.prod(shape) > _MOST_ENTRIES:
        return None
    as_it_is = all(known[n].values.dtype == n.meta["val"].dtype for n in known)
    call_args, call_kwargs = fx.map_arg(
        (node.args, node.kwargs), lambda n: known[n].values if as_it_is else known[n].wide()
    )
    values = node.target(*call_args, **call_kwargs)  # type: ignore[operator]
    if not isinstance(values, torch.Tensor):
        return None
    if all(fact.is_complete for fact in known.values()):
        return Known.everywhere(values)
    mask = functools.reduce(torch.logical_and, (fact.mask for fact in known.values()))
    return Known(mask, values)


def _mul(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    one, other = facts.of(args["self"]), facts.of(args["other"])
    if one is not None and other is not None and one.is_complete and other.is_complete:
        return pointwise(facts, node, args)
    return product(one, other)


def _where(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    return chosen(*(facts.of(args[name]) for name in ("condition", "self", "other")))


def _masked_fill(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    return chosen(*(facts.of(args[name]) for name in ("mask", "value", "self")))


def _prelu(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    x, slope = facts.of(args["self"]), facts.of(args["weight"])
    if x is None:
        return None
    slope = spread(slope, max(x.ndim - 2, 0))
    below = product(x, slope)
    above = x.only(x.values >= 0)
    return chosen(Known(x.mask, x.values >= 0), above, below)


def _glu(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    x, axis = facts.of(args["self"]), args["dim"]
    if x is None:
        return None
    value, gate = x, x
    if x.shape[axis] > 1:
        half = x.shape[axis] // 2
        value, gate = (x.map(lambda t, at=at: t.narrow(axis, at, half)) for at in (0, half))  # type: ignore[misc]
    return product(value, Known(gate.mask, gate.wide().sigmoid()))


def _cast(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    """Rounded as the program rounds."""
    x, dtype = facts.of(node.args[0]), node.meta["val"].dtype
    if x is None or dtype.is_complex:
        return None
    source: Any = node.args[0]
    values = x.values.to(dtype)
    if x.values.dtype != source.meta["val"].dtype and dtype.is_floating_point:
        values = values.double()
    return Known(x.mask, values)


def _same(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    return facts.of(node.args[0])


def _dropout(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
    """What is dropped is scaled and zeroed: zero stays."""
    x = facts.of(args["input"])
    return x if x is None or not args["train"] or args["p"] == 0 else x.only(x.zeros)


def _created(name: str | float) -> Handler:
    """A new tensor of one value: the argument called `name`, or a number."""

    def handle(facts: Facts, node: fx.Node, args: Mapping[str, Any]) -> Finding:
        fill = args[name] if isinstance(name, str) else name
        if not isinstance(fill, (bool, int, float)):
            return None
        value = node.meta["val"]
        dtype = torch.float64 if value.is_floating_point() else value.dtype
        if any(size_of(node, axis) == 0 for axis in range(value.ndim)):
            return None
        filled = torch.full((1,) * value.ndim, fill, dtype=dtype, device=value.device)
        return Known.everywhere(filled)

    return handle


HANDLERS: dict[Any, Handler] = {
    **handlers_of(pointwise, *UNTAGGED_POINTWISE),
    **handlers_of(_mul, aten.mul.Tensor, aten.multiply.Tensor),
    **handlers_of(
        _where,
        aten.where.self,
        aten.where.ScalarOther,
        aten.where.ScalarSelf,
        aten.where.Scalar,
    ),
    **handlers_of(_masked_fill, aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    aten.prelu.default: _prelu,
    aten.glu.default: _glu,
    **handlers_of(_cast, *CASTS),
    **handlers_of(_same, *UNCHANGED),
    **handlers_of(_dropout, *ZEROING_DROPOUT),
    **handlers_of(
        _created("fill_value"),
        aten.full.default,
        aten.full_like.default,
        aten.new_full.default,
    ),
    **handlers_of(
        _created(0.0), aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default
    ),
    **handlers_of(_created(1.0), aten.ones.default, aten.ones_like.default, aten.new_ones.default),
    aten.scalar_tensor.default: _created("s"),
}
