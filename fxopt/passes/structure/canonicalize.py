"""Canonicalize: constants folded, duplicate and dead nodes, no-op casts and views, and what a mask
holds that is true everywhere, dropped.

Claim: exact. Every rule returns a value that some operator of the original computed anyway, or
computes the original's operator once, now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxopt.claim import Claim, Exact
from fxopt.nodes import draws_random, is_pure, same_sizes
from fxopt.operators import CASTS, COPIES, PERMUTATIONS, UNCHANGED, WHOLE_VIEWS, permutation
from fxopt.passes.structure.fold_masks import DropTrue, FoldArangeCompare
from fxopt.program import Program
from fxopt.rewriting import Edit, Match, Rule, RulePass, Stage, arguments
from fxopt.rewriting.pattern import Target
from fxopt.sharing import may_alias, may_copy, reaches_output

aten = torch.ops.aten

_LARGEST_FOLD = 1 << 16
"""Elements; a larger constant would cost more memory than computing it costs time."""

_PADS = (aten.pad.default, aten.constant_pad_nd.default)
_MAY_BE_IDENTITY = (*CASTS, *UNCHANGED, *WHOLE_VIEWS, aten.slice.Tensor, *_PADS)
_COPIES = (*COPIES, aten._to_copy.default, *_PADS)


@dataclass(frozen=True)
class DropIdentity(Rule):
    """cast(x) = x, view(x) = x, x[0:] = x, copy(x) = x where type, sizes and strides stay.

    pad(x, [0, 0, ...]) = x

    detach(x) has the value of x and none of its gradient: it is x where nothing learns.
    """

    learns: bool = False

    def targets(self) -> tuple[Target, ...]:
        if not self.learns:
            return _MAY_BE_IDENTITY
        return tuple(target for target in _MAY_BE_IDENTITY if target is not aten.detach.default)

    def match(self, node: fx.Node) -> Match | None:
        source = node.args[0]
        if not isinstance(source, fx.Node) or not _same_value(node, source):
            return None
        return Match((node,), {"x": source})

    def refuse(self, match: Match) -> str | None:
        copies = match.root.target in _COPIES or may_copy(match.root)
        if copies and reaches_output(match.root):
            return "the copy is an output, which must not share memory with an input"
        if copies and any(user.target is aten.copy_.default for user in match.root.users):
            return "the copy is written to state, after what it copies may have been written too"
        return None

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        x: fx.Node = match["x"]
        return x


class DropDoubleTranspose(Rule):
    """transpose(transpose(x, a, b), a, b) = x"""

    exclusive = False

    def targets(self) -> tuple[Target, ...]:
        return (aten.transpose.int, aten.t.default)

    def match(self, node: fx.Node) -> Match | None:
        inner = node.args[0]
        if not isinstance(inner, fx.Node) or inner.target is not node.target:
            return None
        if node.target is aten.transpose.int and _axes(node) != _axes(inner):
            return None
        return Match((node,), {"x": inner.args[0]}, (inner,))

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        x: fx.Node = match["x"]
        return x


class MergeDuplicate(Rule):
    """f(a) ... f(a) = f(a) used twice, for every pure, deterministic f."""

    def targets(self) -> tuple[Target, ...]:
        return ()

    def match(self, node: fx.Node) -> Match | None:
        operands = node.all_input_nodes
        if not operands or not _repeatable(node):
            return None
        fewest = min(operands, key=lambda operand: len(operand.users))
        for twin in fewest.users:
            if twin is not node and twin < node and _same_call(twin, node):
                return Match((node,), {"twin": twin})
        return None

    def refuse(self, match: Match) -> str | None:
        node, twin = match.root, match["twin"]
        is_view = may_alias(node) and not may_copy(node)
        if not is_view and reaches_output(node) and reaches_output(twin):
            return "both are outputs, which must not share memory with each other"
        return None

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        twin: fx.Node = match["twin"]
        return twin


class FoldConstant(Rule):
    """f(constants) = its value, computed once, where it is no view of a parameter.

    It must be small, or take no more memory than what it frees; then it is a recipe.
    """

    exclusive = False

    def targets(self) -> tuple[Target, ...]:
        return ()

    def match(self, node: fx.Node) -> Match | None:
        value = node.meta["val"]
        if not isinstance(value, Tensor) or not _repeatable(node):
            return None
        if any(operand.op != "get_attr" for operand in node.all_input_nodes):
            return None
        if any(not isinstance(size, int) for size in value.shape) or _only_view(node):
            return None
        return Match((node,), {})

    def refuse(self, match: Match) -> str | None:
        value = match.root.meta["val"]
        if reaches_output(match.root):
            return "it is an output, which must not share memory with what later calls read"
        if _is_large(match.root) and _bytes(match.root) > _freed(match.root):
            return f"folding would store {value.numel()} numbers"
        for operand in match.root.all_input_nodes:
            if any(user.target is aten.copy_.default for user in operand.users):
                return f"{operand.target} is written by the model"
        return None

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        node = match.root
        path = node.meta["module_path"]
        name = f"{path}.{node.name}" if path else node.name
        if _is_large(node):
            return edit.constant(f"{name}_folded", edit.state(node))
        args, kwargs = fx.map_arg((node.args, node.kwargs), edit.tensor)
        with torch.no_grad():
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        # A copy of its own, of the same strides: a sliced view would keep its base alive.
        return edit.constant(f"{name}_folded", value.clone())


@dataclass(frozen=True, repr=False)
class Canonicalize(RulePass):
    """Constants folded, duplicate and dead nodes and no-op casts and views dropped. Claim: exact.

    In train mode constants that hang on parameters aren't folded, since they change.
    """

    name: ClassVar[str] = "canonicalize"
    stage: ClassVar[Stage] = Stage.ANY
    claim: Claim = Exact()

    def rules(self, program: Program) -> Sequence[Rule]:
        """The equations; folding only where parameters don't move."""
        rules: list[Rule] = [
            DropIdentity(program.mode == "train"),
            DropDoubleTranspose(),
            MergeDuplicate(),
            FoldArangeCompare(),
            DropTrue(),
        ]
        return [*rules, FoldConstant()] if program.mode == "eval" else rules


def _same_value(node: fx.Node, source: fx.Node) -> bool:
    new, old = node.meta["val"], source.meta["val"]
    if not isinstance(old, Tensor) or new.dtype != old.dtype or new.device != old.device:
        return False
    if not same_sizes(new.shape, old.shape):
        return False
    if node.target is aten.slice.Tensor:
        given = arguments(node)
        return given["start"] in (0, None) and given["step"] == 1
    if node.target in _PADS:
        return all(isinstance(size, int) and size == 0 for size in node.args[1])  # type: ignore[union-attr]
    if node.target in PERMUTATIONS:
        return permutation(node) == list(range(old.ndim))
    return same_sizes(new.stride(), old.stride())


def _is_large(node: fx.Node) -> bool:
    return bool(node.meta["val"].numel() > _LARGEST_FOLD)


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.numel() * value.dtype.itemsize)


def _freed(node: fx.Node) -> int:
    """Bytes of the constants that nothing but `node` reads."""
    return sum(_bytes(used) for used in node.all_input_nodes if len(used.users) == 1)


def _only_view(node: fx.Node) -> bool:
    """Whether `node` looks at a constant otherwise for an operator that computes with inputs.

    Folding it would be memory for nothing; a view on the way to a larger constant is worth it.
    """
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    if not any(result.alias_info is not None for result in returns):
        return False
    return not any(
        all(operand.op == "get_attr" or operand is node for operand in user.all_input_nodes)
        for user in node.users
    )


def _axes(node: fx.Node) -> frozenset[int]:
    rank = node.meta["val"].ndim
    return frozenset(int(axis) % rank for axis in node.args[1:3])  # type: ignore[arg-type]


def _repeatable(node: fx.Node) -> bool:
    """Whether `node` is pure and gives the same value each time."""
    return node.op == "call_function" and is_pure(node) and not draws_random(node)


def _same_call(one: fx.Node, other: fx.Node) -> bool:
    return (
        one.target is other.target
        and _repeatable(one)
        and _same_arguments(one.args, other.args)
        and _same_arguments(one.kwargs, other.kwargs)
    )


def _same_arguments(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same_arguments, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same_arguments(one[k], other[k]) for k in one)
    if isinstance(one, fx.Node) or isinstance(other, fx.Node):
        return one is other
    return type(one) is type(other) and bool(one == other)
