"""One walk over a graph in order, a table of rules by operator."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.analyses.constant_channels import pointwise, products, reductions, views
from fxopt.analyses.constant_channels.facts import LARGEST, Facts, Handler
from fxopt.analyses.constant_channels.known import Known
from fxopt.nodes import arguments
from fxopt.program import Program

_HANDLERS: dict[Any, Handler] = {
    **pointwise.HANDLERS,
    **views.HANDLERS,
    **reductions.HANDLERS,
    **products.HANDLERS,
}


def constant_channels(program: Program) -> Mapping[fx.Node, Known]:
    """Which entries of each value are the same in every call, whatever the inputs are.

    By abstract interpretation of the graph, in real arithmetic: a zero row of a weight gives its
    bias, which goes through activations, casts, norms in eval mode, views, sums and products; a
    product with zero is zero. NaN and infinity are never constants.

    The result maps operations of `program.graph` to facts, and holds those alone that have any;
    state itself isn't listed, nor are values of more than 2^20 entries that hang on state alone.
    Facts are on the values' device. State that a call writes is unknown. In train mode parameters
    count as what they are now: a fact holds until the next step of training.

    Weights are read once and in place; the cost is linear in the graph.
    """
    facts = Facts(program)
    for node in program.graph.nodes:
        if node.op == "call_function":
            _visit(facts, node)
        facts.release(node)
    kept = {
        node: known
        for node, known in facts.found.items()
        if node.op == "call_function" and known.mask.numel() <= LARGEST
    }
    return MappingProxyType(kept)


def _visit(facts: Facts, node: fx.Node) -> None:
    handler = _handler(node.target)
    if handler is None:
        return
    named = arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}
    found = handler(facts, node, named)
    value = node.meta["val"]
    if isinstance(found, list):
        facts.lists[node] = list(map(facts.settle, found, value))
        return
    known = facts.settle(found, value) if isinstance(value, Tensor) else None
    if known is not None:
        facts.found[node] = known


def _handler(target: Any) -> Handler | None:
    known = _HANDLERS.get(target) or products.BY_NAME.get(str(target))
    return known or (pointwise.pointwise if pointwise.is_pointwise(target) else None)
