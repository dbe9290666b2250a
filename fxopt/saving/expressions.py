"""Symbolic sizes of a loaded graph, kept to a length that can be computed with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fxopt.errors import SaveError

_MOST_TERMS = 256
_MOST_TERMS_OF_A_SHAPE = 4096
_DEEPEST_EXPRESSION = 64


def check_shapes(values: Any) -> None:
    """Refuse shapes, and lists of sizes, whose product could not be written out."""
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Tensor):
            _check_product(leaf.shape)
        elif isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            terms(leaf.node.expr)


def _check_product(shape: Sequence[Any]) -> None:
    count = 1
    for size in shape:
        if isinstance(size, torch.SymInt):
            count *= terms(size.node.expr)
    if count > _MOST_TERMS_OF_A_SHAPE:
        raise SaveError("the saved graph computes sizes by expressions that are too long")


def terms(expression: sympy.Basic, depth: int = 0) -> int:
    """The terms of `expression` once it is multiplied out; `SaveError` where they are too many."""
    if not expression.args:
        return 1
    if depth > _DEEPEST_EXPRESSION:
        raise SaveError("the saved graph computes sizes by expressions that are nested too deeply")
    parts = [terms(part, depth + 1) for part in expression.args]
    if isinstance(expression, sympy.Mul):
        count = math.prod(parts)
    elif isinstance(expression, sympy.Pow):
        exponent = expression.args[1]
        power = int(exponent) if exponent.is_Integer else 1
        count = parts[0] ** min(abs(power), _MOST_TERMS)
    else:
        count = sum(parts)
    if count > _MOST_TERMS:
        raise SaveError("the saved graph computes sizes by expressions that are too long")
    return count
