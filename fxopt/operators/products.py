"""Matrix products that are no linear layer, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxopt.constant_expressions import is_computed_constant
from fxopt.program import Mode

aten = torch.ops.aten

_SECOND_AND_THIRD = (
    aten.addmm.default,
    aten.baddbmm.default,
    aten.addbmm.default,
    aten.addmv.default,
)
_FIRST_TWO = (
    aten.linear.default,
    aten.mm.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.mv.default,
    aten.dot.default,
    aten.inner.default,
    aten.tensordot.default,
    aten.linalg_matmul.default,
    aten.linalg_vecdot.default,
)
_LISTS = (aten.einsum.default, aten.linalg_multi_dot.default, aten.chain_matmul.default)

PRODUCT_TARGETS = (*_FIRST_TWO, *_SECOND_AND_THIRD, *_LISTS, aten.bilinear.default)
"""The operators that sum products of two tensors, but convolutions and attention."""


def why_no_linear(node: fx.Node, mode: Mode) -> str | None:
    """Why a product that `as_linear` gives None for is no linear layer with a constant weight.

    None for a product of a weight that some pass has stored otherwise already, and for one that is
    the same in every call: it is part of a weight.
    """
    if is_computed_constant(node):
        return None
    sides = list(_sides(node))
    constants = [side for side in sides if side.op == "get_attr" or is_computed_constant(side)]
    if not constants:
        of_state = [side for side in sides if _depends_on_state(side)]
        if not of_state:
            return "both of its sides are computed from the inputs"
        stored = any(_calls_own_operator(side) for side in of_state)
        return None if stored else f"its weight {of_state[0].name} isn't the same in every call"
    if mode == "train" and all(constant.op != "get_attr" for constant in constants):
        return "its weight is computed from parameters, which train"
    return _misfit(node, sides, constants[-1])


def _misfit(node: fx.Node, sides: list[fx.Node], constant: fx.Node) -> str:
    if node.target is aten.einsum.default:
        return f"einsum({node.args[0]!r}) is more than x @ W over the last axis of x"
    scales = (node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta"))
    if any(scales):
        return "it scales its addend or its product (alpha, beta)"
    rank = constant.meta["val"].ndim
    if rank != 2:
        return f"its constant {constant.name} is of rank {rank}, not a matrix"
    if sides[0] is constant:
        return f"its constant {constant.name} is the left side"
    return "its addend is no vector of one number for each output channel"


def _sides(node: fx.Node) -> Iterator[fx.Node]:
    operands: Any = node.args[:2]
    if node.target in _SECOND_AND_THIRD:
        operands = node.args[1:3]
    elif node.target in _LISTS:
        operands = node.args[-1]
    elif node.target is aten.bilinear.default:
        operands = node.args[:3]
    yield from (operand for operand in operands if isinstance(operand, fx.Node))


def _depends_on_state(node: fx.Node) -> bool:
    ancestors = _ancestors(node)
    return all(one.op != "placeholder" for one in ancestors) and any(
        one.op == "get_attr" for one in ancestors
    )


def _calls_own_operator(node: fx.Node) -> bool:
    return any(getattr(one.target, "namespace", "") == "fxopt" for one in _ancestors(node))


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += one.all_input_nodes
    return found
