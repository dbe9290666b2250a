"""Values that depend on state alone, such as `w[:48]`, `w * c` or a weight norm: f(constants).

They are the same in every call, so a pass may compute one once. Until it does, a recipe stands for
it, over the tensors that are shared with the model.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.nodes import draws_random, is_pure
from fxopt.program import Program
from fxopt.recipe import Recipe

_COPY = torch.ops.aten.copy_.default
_MOST_STEPS = 256
"""Operations; a constant that takes more is left to be computed in the graph."""


@dataclass(frozen=True)
class _Value:
    """What a step of an expression takes: the `index`-th of the leaves and of earlier results."""

    index: int


@dataclass(frozen=True)
class Expression:
    """`self(*leaves)` computes `node`; `leaves` are the `get_attr` nodes that it depends on."""

    leaves: tuple[fx.Node, ...]
    steps: tuple[tuple[Callable[..., Any], Any, Any], ...]

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The value, in memory of its own."""
        values: list[Any] = list(tensors)
        for target, args, kwargs in self.steps:
            args, kwargs = _filled(args, values), _filled(kwargs, values)
            values.append(target(*args, **kwargs))
        value: Tensor = values[-1]
        # A view would keep all of its base alive, and be saved as one tensor with it.
        return value.clone(memory_format=torch.contiguous_format)


def expression(node: fx.Node) -> Expression | None:
    """What computes `node` from state that no call writes, or None where inputs have a part in it,
    or chance, or an operator of `fxopt::`, which says how numbers are stored."""
    order: dict[fx.Node, None] = {}
    waiting = [node]
    while waiting:
        used = waiting[-1]
        missing = [one for one in used.all_input_nodes if one not in order]
        if used in order or not missing:
            order[waiting.pop()] = None
            continue
        if not _is_step(used) or len(order) + len(waiting) > _MOST_STEPS:
            return None
        waiting += missing
    if not all(_is_leaf(one) or _is_step(one) for one in order):
        return None
    leaves = [one for one in order if one.op == "get_attr"]
    steps = [one for one in order if one.op != "get_attr"]
    places = {one: _Value(index) for index, one in enumerate((*leaves, *steps))}
    called = [(one.target, *_placed((one.args, one.kwargs), places)) for one in steps]
    return Expression(tuple(leaves), tuple(called))


def is_computed_constant(node: fx.Node) -> bool:
    """Whether `node` is an operation whose result depends on state alone."""
    return node.op == "call_function" and expression(node) is not None


def stored(program: Program, node: fx.Node) -> Tensor | Recipe:
    """What the state holds for a `get_attr` node, or the recipe of a computed constant."""
    if node.op == "get_attr":
        return program.state[str(node.target)]
    return as_recipe(node, lambda leaf: program.state[str(leaf.target)])


def as_recipe(node: fx.Node, state: Callable[[fx.Node], Tensor | Recipe]) -> Recipe:
    """The recipe of a computed constant, over what `state` gives for the leaves."""
    found = expression(node)
    assert found is not None
    value = node.meta["val"]
    sources = tuple(map(state, found.leaves))
    grad = value.is_floating_point() and any(source.requires_grad for source in sources)
    return Recipe(found, sources, torch.Size(value.shape), value.dtype, value.device, grad)


def _is_leaf(node: fx.Node) -> bool:
    written = any(user.target is _COPY and user.args[0] is node for user in node.users)
    return node.op == "get_attr" and not written


def _is_step(node: fx.Node) -> bool:
    if node.op != "call_function" or not is_pure(node) or draws_random(node):
        return False
    if node.target is operator.getitem:
        return True
    is_aten = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"
    value = node.meta.get("val")
    fixed = not isinstance(value, Tensor) or all(isinstance(size, int) for size in value.shape)
    return is_aten and fixed


def _placed(value: Any, places: dict[fx.Node, _Value]) -> Any:
    if isinstance(value, fx.Node):
        return places[value]
    if isinstance(value, (tuple, list)):
        return type(value)(_placed(item, places) for item in value)
    if isinstance(value, dict):
        return {name: _placed(item, places) for name, item in value.items()}
    return value


def _filled(value: Any, values: list[Any]) -> Any:
    if isinstance(value, _Value):
        return values[value.index]
    if isinstance(value, (tuple, list)):
        return type(value)(_filled(item, values) for item in value)
    if isinstance(value, dict):
        return {name: _filled(item, values) for name, item in value.items()}
    return value
