"""Work of a program at given sizes: floating-point operations and bytes moved, by operator.

    operations   two a multiply-add of a product, of aten and of `fxopt::` alike; what works entry
                 by entry counts as none
    bytes        each operand read once, constants included, each result written once
    views        free, and reading through one moves no more than what lies under it
    look-ups     (embedding, gather) read the entries that they give, not their whole table

Every operator is taken by itself. What a compiler fuses stays in registers and isn't moved, and
what is small stays in a cache, so that the bytes are the bound of unfused execution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxopt.analyses.arithmetic import FLOPS_PER_MULTIPLY_ADD, multiply_adds
from fxopt.errors import FxoptError
from fxopt.nodes import arguments, fake, label, module_path
from fxopt.operators.views import RESHAPES_BY_STRIDES
from fxopt.program import Program

aten = torch.ops.aten

_Sizes: TypeAlias = dict[Any, int]


class UnsizedError(FxoptError):
    """A size isn't known from the inputs' sizes alone."""


@dataclass(frozen=True)
class Work:
    """What one operator does: `flops` in products of `dtype`, and the `bytes` that it moves."""

    node: str
    path: str
    flops: int
    dtype: str
    bytes: int


def count_work(program: Program, tensors: Sequence[Tensor]) -> tuple[Work, ...]:
    """The work of each operator of `program` called on `tensors`, in order; views and the
    arithmetic of sizes left out.

    `tensors` are the inputs in placeholder order; only their sizes matter. Raises `UnsizedError`
    where the size of a value depends on the values of others.
    """
    sized = at_sizes(program, tensors)
    products = multiply_adds(sized)
    return tuple(
        _work(node, products.get(node.name))
        for node in sized.graph.nodes
        if node.op == "call_function" and _is_work(node)
    )


def at_sizes(program: Program, tensors: Sequence[Tensor]) -> Program:
    """`program` with values of the sizes that it has on `tensors`, all on the meta device."""
    known = _known_sizes(program, tensors)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        copy = copies[node] = graph.node_copy(node, copies.__getitem__)
        if "val" in node.meta:
            copy.meta = {**node.meta, "val": _sized(node, known)}
    return replace(program, graph=graph)


def _known_sizes(program: Program, tensors: Sequence[Tensor]) -> _Sizes:
    known: _Sizes = {}
    for node, tensor in zip(program.placeholders, tensors, strict=True):
        for size, actual in zip(node.meta["val"].shape, tensor.shape, strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                known[size.node.expr] = actual
    return known


def _sized(node: fx.Node, known: _Sizes) -> Any:
    def number(size: Any) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        value = size.node.expr.xreplace(known)
        if getattr(value, "free_symbols", ()):
            raise UnsizedError(f"{label(node)} has a size that the inputs' sizes don't tell")
        return int(value)

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            shape, stride = map(number, value.shape), map(number, value.stride())
            return torch.empty_strided(
                tuple(shape), tuple(stride), dtype=value.dtype, device="meta"
            )
        return number(value) if isinstance(value, torch.SymInt) else value

    return pytree.tree_map(leaf, node.meta["val"])


def _work(node: fx.Node, products: int | None) -> Work:
    rule = _KERNELS.get(str(node.target))
    count = products if products is not None else rule(node) if rule is not None else 0
    operations = FLOPS_PER_MULTIPLY_ADD * count
    return Work(node.name, module_path(node), operations, _product_dtype(node), _moved(node))


def _product_dtype(node: fx.Node) -> str:
    """The dtype that is multiplied: that of the left operand, 8 bits wide only with the right."""
    dtypes = [fake(n).dtype for n in node.all_input_nodes if isinstance(fake(n), Tensor)]
    eight = [dtype for dtype in dtypes if dtype.itemsize == 1]
    if not dtypes:
        return ""
    if dtypes[0] == torch.uint8 and torch.int8 in eight:
        return _name(torch.int8)
    return _name(dtypes[0])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _moved(node: fx.Node) -> int:
    operands = [n for n in node.all_input_nodes if isinstance(fake(n), Tensor)]
    written = _bytes(node)
    if node.target in _LOOK_UPS:
        table = arguments(node)[_LOOK_UPS[node.target]]
        return 2 * written + sum(_touched(n) for n in operands if n is not table)
    if node.target is aten.copy_.default:
        operands = [n for n in operands if n is not node.args[0]]
    return written + sum(map(_touched, operands))


def _touched(node: fx.Node) -> int:
    """Bytes that reading the value moves: a broadcast view's are those of what it shows."""
    own = _bytes(node)
    return min(own, _touched(_source(node))) if _is_view(node) else own


def _is_work(node: fx.Node) -> bool:
    results = pytree.tree_leaves(node.meta.get("val"))
    computes = isinstance(node.target, torch._ops.OpOverload) and not _is_view(node)
    return computes and any(isinstance(result, Tensor) for result in results)


def _bytes(node: fx.Node) -> int:
    leaves = pytree.tree_leaves(node.meta["val"])
    return sum(v.numel() * v.dtype.itemsize for v in leaves if isinstance(v, Tensor))


def _is_view(node: fx.Node) -> bool:
    """Whether the value is its operand's memory, seen otherwise."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.returns:
        return False
    aliases = [returned.alias_info for returned in target._schema.returns]
    if any(alias is None or alias.is_write for alias in aliases):
        return False
    before, after = fake(_source(node)), node.meta["val"]
    if not isinstance(after, Tensor) or target is aten.view.dtype:
        return True
    if before.dtype != after.dtype:
        return False
    return _shows(before, after) if target in _MAY_COPY else True


def _source(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def _shows(before: Tensor, after: Tensor) -> bool:
    """Whether `after` can be a view of `before`; else the operator copies."""
    if before.shape == after.shape:
        return before.stride() == after.stride()
    try:
        before.view(after.shape)
    except RuntimeError:
        return False
    return True


def _entries(node: Any) -> int:
    return math.prod(map(int, fake(node).shape))


def _linear(node: fx.Node) -> int:
    return _entries(node) * int(fake(node.args[0]).shape[-1])


def _linear_of_tokens(node: fx.Node) -> int:
    codes, *_ = node.meta["val"]
    return _entries(codes) * int(fake(node.args[0]).shape[-1])


def _sparse_linear(node: fx.Node) -> int:
    # Of four neighbouring weights two are stored, and only they are multiplied with.
    return _linear(node) // 2


def _attention(node: fx.Node) -> int:
    positions = int(fake(node.args[1]).shape[-2])
    return (_entries(node.args[0]) + _entries(node)) * positions


_MAY_COPY = frozenset({*RESHAPES_BY_STRIDES, aten.contiguous.default})
_LOOK_UPS: Mapping[Any, str] = MappingProxyType(
    {
        aten.embedding.default: "weight",
        aten.index_select.default: "self",
        aten.gather.default: "self",
        aten.index.Tensor: "self",
    }
)
"""Operator -> its argument of which only some entries are read."""

_KERNELS: Mapping[str, Callable[[fx.Node], int]] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "fxopt.float8_linear.default",
                "fxopt.half_weight_only_linear.default",
                "fxopt.int4_grouped_linear.default",
                "fxopt.int4_weight_only_linear.default",
                "fxopt.int8_grouped_linear.default",
                "fxopt.int8_linear.default",
                "fxopt.int8_linear_fused.default",
                "fxopt.int8_product.default",
                "fxopt.int8_weight_only_linear.default",
                "fxopt.packed_int8_linear.default",
                "fxopt.packed_linear.default",
            ),
            _linear,
        ),
        "fxopt.int8_linear_fused_tokens.default": _linear_of_tokens,
        "fxopt.linear_sparse24.default": _sparse_linear,
        "fxopt.attention.default": _attention,
        "fxopt.packed_int8_linear_tokens.default": _linear_of_tokens,
        "fxopt.quantized_attention.default": _attention,
        "fxopt.written_attention.default": _attention,
    }
)
"""Multiply-adds of our own products."""
