"""One spelling for operators that have several.

view(x, s), _unsafe_view(x, s)      ->  reshape(x, s), which a rewrite of strides can't break
numpy_T(x), t(x), mT(x), ...        ->  transpose(x, a, b), for two axes
inner(x, W)                         ->  linear(x, W)
tensordot(x, W, [-1], [a])          ->  matmul(x, W), linear(x, W)
einsum("...k,nk->...n", x, W)       ->  linear(x, W), for a constant W in either order
einsum("...k,kn->...n", x, W)       ->  matmul(x, W)
_native_batch_norm_legit_no_training(...)[0], native_batch_norm(..., training=False)[0]
                                    ->  batch_norm(...), and so for layer and group norm
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.capture.einsum import linear_form, written_out
from fxopt.nodes import arguments
from fxopt.operators.views import REVERSALS, SIZED_RESHAPES, SWAPS

aten = torch.ops.aten

_LAST_TWO = frozenset(
    (aten.mT.default, aten.adjoint.default, aten.matrix_H.default, aten.mH.default)
)

Call = tuple[Any, tuple[Any, ...]]
"""An operator and its arguments."""


def respell(node: fx.Node) -> None:
    """Say what `node` computes in the first spelling, in place."""
    found = _first_spelling(node)
    if found is not None:
        node.target, node.args = found
        node.kwargs = {}


def _first_spelling(node: fx.Node) -> Call | None:
    target = node.target
    if target in SIZED_RESHAPES:
        return aten.reshape.default, tuple(arguments(node).values())
    if target in SWAPS:
        return aten.transpose.int, tuple(arguments(node).values())
    if target is aten.inner.default:
        return _inner(*node.args)
    if target is aten.tensordot.default:
        return _tensordot(**arguments(node))
    if target is aten.einsum.default:
        return _einsum(node)
    if target in REVERSALS or target in _LAST_TWO:
        return _transposed(node)
    return None


def _transposed(node: fx.Node) -> Call | None:
    (x,) = node.args
    value = x.meta["val"]  # type: ignore[union-attr]
    if value.ndim == 2 and not value.is_complex():
        return aten.transpose.int, (x, 0, 1)
    if node.target in _LAST_TWO and not value.is_complex():
        return aten.transpose.int, (x, -2, -1)
    return None


def _inner(x: Any, other: Any) -> Call | None:
    return (aten.linear.default, (x, other)) if _is_weight(other) and _rank(x) else None


def _tensordot(self: Any, other: Any, dims_self: Any, dims_other: Any) -> Call | None:
    rank = _rank(self)
    if not rank or not _is_weight(other) or len(dims_self) != 1 or len(dims_other) != 1:
        return None
    if dims_self[0] % rank != rank - 1:
        return None
    target = aten.linear.default if dims_other[0] % 2 else aten.matmul.default
    return target, (self, other)


def _einsum(node: fx.Node) -> Call | None:
    given = arguments(node)
    operands = list(given["tensors"])
    if len(operands) != 2:
        return None
    (left, right), output = written_out(str(given["equation"]))
    first, second = operands
    for x, weight, form in (
        (first, second, linear_form(left, right, output)),
        (second, first, linear_form(right, left, output)),
    ):
        if form is not None and _is_weight(weight) and _rank(x):
            return (aten.linear.default if form == "nk" else aten.matmul.default), (x, weight)
    return None


def _rank(value: Any) -> int:
    known = value.meta["val"] if isinstance(value, fx.Node) else None
    return known.ndim if isinstance(known, Tensor) else 0


def _is_weight(value: Any) -> bool:
    """Whether `value` is a matrix that depends on state alone."""
    if _rank(value) != 2:
        return False
    waiting, seen = [value], set()
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            return False
        if node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    return True


def _of_batch_norm(given: Mapping[str, Any]) -> Call | None:
    if given.get("training"):
        return None
    names = ("weight", "bias", "running_mean", "running_var")
    rest = (False, given.get("momentum", given.get("exponential_average_factor")))
    eps = given.get("eps", given.get("epsilon"))
    return aten.batch_norm.default, (
        given["input"],
        *(given[name] for name in names),
        *rest,
        eps,
        False,
    )


def _of_layer_norm(given: Mapping[str, Any]) -> Call | None:
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    return aten.layer_norm.default, tuple(given[name] for name in names)


def _of_group_norm(given: Mapping[str, Any]) -> Call | None:
    names = ("input", "group", "weight", "bias", "eps")
    return aten.group_norm.default, tuple(given[name] for name in names)


_WRITTEN_OUT: Mapping[Any, Callable[[Mapping[str, Any]], Call | None]] = MappingProxyType(
    {
        aten._native_batch_norm_legit_no_training.default: _of_batch_norm,
        aten.native_batch_norm.default: _of_batch_norm,
        aten.cudnn_batch_norm.default: _of_batch_norm,
        aten.miopen_batch_norm.default: _of_batch_norm,
        aten.native_layer_norm.default: _of_layer_norm,
        aten.native_group_norm.default: _of_group_norm,
    }
)


def brought_back(node: fx.Node) -> Call | None:
    """The norm, as the model calls it, whose written-out form `node` is, where nothing reads more
    of that than its first result."""
    make = _WRITTEN_OUT.get(node.target)
    if make is None:
        return None
    rest = [user for user in node.users if user.target is not operator.getitem or user.args[1]]
    return None if any(user.users for user in rest) else make(arguments(node))
