"""The dynamic sizes of a loaded graph: symbols made from the names in its signature, and kept.

Equal names are one size. A name that is an expression over others (`2*s27`, `s94 + 1`) becomes that
expression, so that what the capture knew of them is known again.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from fxopt.errors import SaveError
from fxopt.saving.expressions import terms
from fxopt.signature import Range, Signature

_UNBOUNDED = 2**62
_LONGEST_NAME = 200
_SYMBOL = re.compile(r"s(\d{1,9})")
_OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


class NamedSizes(ShapeEnv):
    """A shape environment that gives a symbol the name that its size has in the signature."""

    def _generate_unique_id(self, source_name: str) -> int:
        named = _SYMBOL.fullmatch(source_name)
        if named is None or int(named[1]) in self.unique_ids:
            return super()._generate_unique_id(source_name)
        self.unique_ids.add(int(named[1]))
        return int(named[1])


def fake_inputs(
    mode: FakeTensorMode, signature: Signature, example: tuple[Tensor, ...]
) -> list[Tensor]:
    """Fake tensors for the placeholders, with the symbols that `signature` names.

    Raises `SaveError` where `example` doesn't fit the signature.
    """
    if len(example) != len(signature.tensors):
        raise SaveError(
            f"{len(example)} example tensors were saved for {len(signature.tensors)} inputs"
        )
    hints: dict[str, int] = {}
    for expected, tensor in zip(signature.tensors, example, strict=True):
        if tensor.dtype != expected.dtype or tensor.ndim != len(expected.sizes):
            raise SaveError(f"the example of {expected.path} doesn't fit {expected}")
        for size, hint in zip(expected.sizes, tensor.shape, strict=True):
            if isinstance(size, str):
                hints.setdefault(size, hint)
    sizes = _sizes(mode, hints, signature.ranges)
    inputs = []
    for expected in signature.tensors:
        shape = [sizes[size] if isinstance(size, str) else size for size in expected.sizes]
        with mode:
            inputs.append(torch.empty(shape, dtype=expected.dtype, device=expected.device))
    return inputs


def _sizes(
    mode: FakeTensorMode, hints: Mapping[str, int], ranges: Mapping[str, Range]
) -> dict[str, Any]:
    """Each name as a size: those that stand for themselves first, then expressions over them."""
    trees = {name: _parsed(name) for name in hints}
    own = [
        name
        for name, tree in trees.items()
        if not isinstance(tree, ast.BinOp) or not set(_names(tree)) <= hints.keys()
    ]
    sizes = {name: _symbol(mode, name, hints[name], ranges.get(name)) for name in own}
    for name, tree in trees.items():
        if name not in sizes:
            sizes[name] = _evaluated(tree, sizes)
    return sizes


def _parsed(name: str) -> ast.expr | None:
    """The expression that `name` is; None where it is none of sums, products and quotients."""
    if len(name) > _LONGEST_NAME:
        raise SaveError(f"the saved signature holds the size {name:.40}...")
    try:
        tree = ast.parse(name, mode="eval").body
    except (SyntaxError, ValueError):
        return None
    return tree if _is_arithmetic(tree) else None


def _is_arithmetic(tree: ast.AST) -> bool:
    if isinstance(tree, ast.BinOp):
        known = type(tree.op) in _OPERATORS
        return known and _is_arithmetic(tree.left) and _is_arithmetic(tree.right)
    if isinstance(tree, ast.Constant):
        return type(tree.value) is int and abs(tree.value) < _UNBOUNDED
    return isinstance(tree, ast.Name)


def _names(tree: ast.AST | None) -> Iterator[str]:
    nodes = ast.walk(tree) if tree is not None else ()
    return (node.id for node in nodes if isinstance(node, ast.Name))


def _evaluated(tree: ast.AST | None, sizes: Mapping[str, Any]) -> Any:
    if isinstance(tree, ast.BinOp):
        left, right = _evaluated(tree.left, sizes), _evaluated(tree.right, sizes)
        result = _OPERATORS[type(tree.op)](left, right)
        if isinstance(result, torch.SymInt):
            terms(result.node.expr)
        return result
    if isinstance(tree, ast.Constant):
        return tree.value
    assert isinstance(tree, ast.Name)
    return sizes[tree.id]


def _symbol(mode: FakeTensorMode, name: str, hint: int, bounds: Range | None) -> Any:
    """A dynamic size. Sizes 0 and 1 are special to torch's shape rules, so no hint is either."""
    from torch._dynamo.source import ConstantSource  # a second's import that few runs need

    low, high = (bounds.low, bounds.high) if bounds else (2, None)
    environment = mode.shape_env
    assert environment is not None
    hint = max(hint, low, 2)
    source = ConstantSource(name)
    symbol = environment.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
    environment.constrain_symbol_range(symbol, low, _UNBOUNDED if high is None else high)
    return environment.create_symintnode(symbol, hint=hint, source=source)
