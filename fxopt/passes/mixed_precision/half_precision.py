"""The rules by which chosen nodes compute in half precision, whatever chose them.

    op(x, W, b)  ~  float32(op(half(x), half(W), half(b)))       half: bfloat16 or float16
    half(copy(float32(y)))  =  copy(y)                           for y in half already

`copy` is any chain of views and of operators that only pass values on. A constant is stored in half
once, as `<name>_bfloat16` or `<name>_float16`; in train mode it stays a float32 parameter, the
master copy, under a differentiable cast: Micikevicius et al., "Mixed Precision Training" (2018).
Products of half operands are summed in float32 by the libraries: oneDNN's accumulation mode is
`strict`, float32, unless asked otherwise (oneDNN developer guide, "Data Types"), and so is cuBLAS's
compute type; it may add partial sums of a split K in half (torch's notes, "CUDA semantics").
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxopt.passes.mixed_precision.half_values import HALF, HalfValues, is_cast, is_tensor_of
from fxopt.rewriting import Edit, Match, Rule, arguments
from fxopt.rewriting.pattern import Target
from fxopt.sharing import is_returned_in_place

aten = torch.ops.aten

_STATISTICS: frozenset[Any] = frozenset(
    {
        aten.batch_norm.default,
        aten.instance_norm.default,
        aten.native_batch_norm.default,
        aten._native_batch_norm_legit.default,
        aten._native_batch_norm_legit_functional.default,
        aten._native_batch_norm_legit_no_training.default,
    }
)
"""Operators that take x in half with float32 statistics and parameters."""

_CHOICES: frozenset[Any] = frozenset({aten.where.self, aten.masked_fill.Tensor})
"""Operators that store a tensor of rank 0 as it is."""

_FILLS: frozenset[Any] = frozenset(
    {
        *(aten.masked_fill.Scalar, aten.full.default, aten.full_like.default, aten.fill.Scalar),
        *(aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar),
        *(aten.constant_pad_nd.default, aten.pad.default),
    }
)
"""Operators that store a number as it is: one past the range of half would not be finite there."""


def can_be_half(node: fx.Node) -> bool:
    """Whether `ComputeInHalf` can take `node`: it makes tensors, of float32 ones or asked for them.

    False as well for what writes, and for a node whose result is in half already.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    leaves = pytree.tree_leaves(node.meta["val"])
    results = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not results or any(result.dtype in HALF for result in results):
        return False
    reads = any(is_tensor_of(operand, torch.float32) for operand in node.all_input_nodes)
    return reads or torch.float32 in _constants(node)


class ComputeInHalf(Rule):
    """op(x, W, b) ~ float32(op(half(x), half(W), half(b)))

    Takes the nodes named in `chosen` for which `can_be_half`, in topological order. Operands of
    rank 0 stay float32: torch's type promotion ignores them beside others. A `dtype=torch.float32`
    of the operator becomes half. A batch norm keeps its float32 statistics and parameters; numbers
    that are stored and attention's mask stay finite where they are.
    """

    def __init__(self, chosen: Collection[str], dtype: torch.dtype) -> None:
        self.chosen = frozenset(chosen)
        self.dtype = dtype
        self.values = HalfValues(dtype)

    def targets(self) -> tuple[Target, ...]:
        return ()

    def match(self, node: fx.Node) -> Match | None:
        if node.name not in self.chosen or not can_be_half(node):
            return None
        return self.match_of(node)

    @staticmethod
    def match_of(node: fx.Node) -> Match | None:
        """The match that takes `node`, or the results of it that are used where it has several."""
        if isinstance(node.meta["val"], Tensor):
            return Match((node,), {"node": node})
        items = tuple(user for user in node.users if user.target is operator.getitem)
        return Match(items, {"node": node}, (node,)) if items else None

    def refuse(self, match: Match) -> str | None:
        node = match["node"]
        for operand in node.all_input_nodes:
            value = operand.meta["val"]
            known = (torch.float32, self.dtype)
            if isinstance(value, Tensor) and value.is_floating_point() and value.dtype not in known:
                return f"its operand {operand.name} is {value.dtype}; only float32 is rounded"
        if any(is_returned_in_place(root) for root in match.roots):
            return "it is returned as a view of an input or of state, which a rounded copy isn't"
        return None

    def rewrite(self, match: Match, edit: Edit) -> Sequence[fx.Node]:
        node, roots = match["node"], match.roots
        args, kwargs = self._arguments(node, min(roots), edit)
        if node.target is aten.to.dtype and is_tensor_of(args[0], self.dtype):
            return [self._widened(args[0], node, edit)]
        result = edit.call(node.target, *args, **kwargs)
        if node in roots:
            return [self._widened(result, node, edit)]
        items = [edit.item(result, root.args[1]) for root in roots]  # type: ignore[arg-type]
        return [self._widened(item, root, edit) for item, root in zip(items, roots, strict=True)]

    def _arguments(
        self, node: fx.Node, root: fx.Node, edit: Edit
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        """The arguments of `node` in half."""
        limits = torch.finfo(self.dtype)

        def halved(value: Any) -> Any:
            if is_tensor_of(value, torch.float32):
                return self.values.of(value, edit, root)
            if value is torch.float32:
                return self.dtype
            if node.target in _FILLS and isinstance(value, float) and math.isfinite(value):
                return min(max(value, limits.min), limits.max)
            return value

        if node.target in _STATISTICS:
            return (halved(node.args[0]), *node.args[1:]), dict(node.kwargs)
        if node.target is aten.scaled_dot_product_attention.default:
            given = arguments(node)
            mask = given["attn_mask"]
            if is_tensor_of(mask, torch.float32):
                given["attn_mask"] = self.values.finite(mask, edit, root)
            named = {name: given.pop(name) for name in ("scale", "enable_gqa")}
            return [*map(halved, given.values())], {k: v for k, v in named.items() if v}
        args, kwargs = pytree.tree_map(halved, (tuple(node.args), dict(node.kwargs)))
        if node.target in _CHOICES:
            args = [self.values.finite(v, edit, root) if _is_number(v) else v for v in args]
        return args, kwargs

    def _widened(self, result: fx.Node, root: fx.Node, edit: Edit) -> fx.Node:
        """float32(result) where the node that it replaces is float32."""
        if is_tensor_of(root, torch.float32, 0) and is_tensor_of(result, self.dtype, 0):
            return edit.call(aten.to.dtype, result, torch.float32)
        return result


class CancelCasts(Rule):
    """half(copy(float32(y))) = copy(y)"""

    exclusive = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.values = HalfValues(dtype)

    def targets(self) -> tuple[Target, ...]:
        return (aten.to.dtype,)

    def match(self, node: fx.Node) -> Match | None:
        if not is_cast(node, self.values.dtype) or not self.values.are_at_hand(node.args[0]):  # type: ignore[arg-type]
            return None
        return Match((node,), {"x": node.args[0]})

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        return self.values.of(match["x"], edit, match.root)


def _is_number(node: Any) -> bool:
    return is_tensor_of(node, torch.float32, 0) and node.meta["val"].ndim == 0


def _constants(node: fx.Node) -> list[Any]:
    return pytree.tree_leaves((tuple(node.args), dict(node.kwargs)))
