"""The rewrite of SmoothQuant: one linear on a scaled weight and a scaled input.

The scaled input of a group is made once. Where it is absorbed, the nodes from its producer down are
built anew beside the old ones, each at its place; those die with the last linear that reads them.
So every value that lives on is the value it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxopt.analyses.channel_scaling import (
    SCALED_NORMS,
    Absorption,
    constant_factor,
    find_absorption,
    view_source,
)
from fxopt.nodes import origins
from fxopt.operators.linears import Linear, as_linear
from fxopt.passes.linear_layers.linear_rule import LinearRule
from fxopt.program import Origin
from fxopt.recipe import Recipe
from fxopt.rewriting import Edit, Match

aten = torch.ops.aten

SMOOTHED = Origin("smooth-quant", "smoothed")
"""A weight with smoothed columns."""


@dataclass(frozen=True, eq=False)
class Smoothing:
    """The names of linears that share an input, and 1 / s per channel [K] in the input's dtype.

    `absorbed` says that what computes the input takes it.
    """

    linears: tuple[str, ...]
    inverse: Tensor
    absorbed: bool

    def factors(self, channels: Tensor) -> Tensor:
        """1 / s for a producer's channels [N]; 1 where `channels` is -1."""
        wide = _widened(self.inverse)
        return torch.where(
            channels >= 0, wide[channels.clamp_min(0)], torch.ones((), dtype=wide.dtype)
        )


class SmoothLinear(LinearRule):
    """x @ Wᵀ + b = (x / s) @ (W * s)ᵀ + b"""

    def __init__(self, groups: Sequence[Smoothing], reasons: Mapping[str, str]) -> None:
        self.groups = {name: group for group in groups for name in group.linears}
        self.reasons = reasons
        self.moved: dict[Smoothing, dict[fx.Node, fx.Node]] = {}

    def match(self, node: fx.Node) -> Match | None:
        group = self.groups.get(node.name)
        linear = as_linear(node)
        if linear is None or (group is None and node.name not in self.reasons):
            return None
        home = None
        if group is not None and group.absorbed and group not in self.moved:
            home = self._home(group, linear)
        siblings = home.siblings if home is not None else ()
        return Match((node, *siblings), {"linear": linear, "group": group, "home": home})

    def refuse(self, match: Match) -> str | None:
        return self.reasons[match.root.name] if match["group"] is None else None

    def rewrite(self, match: Match, edit: Edit) -> Sequence[fx.Node]:
        linear, group, home = match["linear"], match["group"], match["home"]
        del self.groups[match.root.name]
        moved = self.moved.setdefault(group, {})
        if home is not None:
            self._absorb(home, group, moved, edit)
        x = self._input(linear, group, moved, edit)
        weight = self._weight(linear, group, edit)
        edit.start(linear.node)
        new = rebuilt(edit, linear.node, {linear.x: x, weight_operand(linear): weight})
        return new, *(moved[sibling] for sibling in match.roots[1:])

    def _home(self, group: Smoothing, linear: Linear) -> Absorption | None:
        graph = linear.node.graph
        members = [as_linear(node) for node in graph.nodes if node.name in group.linears]
        value = view_source(linear.x)[0]
        home = find_absorption(value, readers([member for member in members if member]))
        return home if isinstance(home, Absorption) else None

    def _absorb(
        self, home: Absorption, group: Smoothing, moved: dict[fx.Node, fx.Node], edit: Edit
    ) -> None:
        edit.start(home.producer)
        moved[home.producer] = _scaled_producer(edit, home.producer, group.factors(home.channels))
        for node in (*home.path, *home.siblings):
            edit.start(node)
            moved[node] = rebuilt(edit, node, moved)

    def _input(
        self, linear: Linear, group: Smoothing, moved: dict[fx.Node, fx.Node], edit: Edit
    ) -> fx.Node:
        value, views = view_source(linear.x)
        if value in moved:
            for view in views:
                if view not in moved:
                    edit.start(view)
                    moved[view] = rebuilt(edit, view, moved)
            return moved[linear.x]

        def make() -> fx.Node:
            name = f"{linear.weight.target}_smoothing"
            inverse = group.inverse.to(linear.x.meta["val"].device)
            constant = edit.once((self, group), lambda: edit.constant(name, inverse))
            return edit.call(aten.mul.Tensor, linear.x, constant)

        edit.start(linear.node)
        return edit.once((self, "input", linear.x), make)

    def _weight(self, linear: Linear, group: Smoothing, edit: Edit) -> fx.Node:
        """The scaled weight as the linear's own operand: under the transposition it had."""
        weight, operand = linear.weight, weight_operand(linear)
        edit.start(linear.node)

        def make() -> fx.Node:
            scale = _widened(group.inverse).reciprocal()
            factor = scale[:, None] if linear.transposed else scale[None, :]
            scaled, name = _scaled(edit, weight, factor), f"{weight.target}_smoothed"
            return edit.constant(name, scaled, origin=SMOOTHED, of=weight)

        made = edit.once((self, "weight", weight), make)
        return made if operand is weight else rebuilt(edit, operand, {weight: made})


def readers(linears: Sequence[Linear]) -> set[fx.Node]:
    """Those linears, and the views between them and the value that they share."""
    views = {view for linear in linears for view in view_source(linear.x)[1]}
    return views | {linear.node for linear in linears}


def scale_channels(tensor: Tensor, factor: Tensor) -> Tensor:
    """`tensor * factor`, computed in the factor's dtype and rounded once to the tensor's."""
    return (tensor.to(factor.dtype) * factor).to(tensor.dtype)


def _scaled_producer(edit: Edit, producer: fx.Node, factors: Tensor) -> fx.Node:
    """`producer` with its channels [N] multiplied by `factors`."""
    linear = as_linear(producer)
    if linear is not None:
        return _scaled_linear(edit, linear, factors)
    if producer.target not in SCALED_NORMS:
        constant = constant_factor(producer)
        assert constant is not None
        shaped = factors.reshape(constant.meta["val"].shape)
        return rebuilt(edit, producer, {constant: _scaled_constant(edit, constant, shaped)})
    x, shape, *rest = producer.args
    constants, options = (
        rest[: SCALED_NORMS[producer.target]],
        rest[SCALED_NORMS[producer.target] :],
    )
    scaled = [
        _scaled_constant(edit, one, factors) if isinstance(one, fx.Node) else None
        for one in constants
    ]
    if not scaled or scaled[0] is None:
        value = producer.meta["val"]
        weight = edit.constant(f"{producer.name}_scale", factors.to(value.dtype).to(value.device))
        scaled[:1] = [weight]
    return edit.call(producer.target, x, shape, *scaled, *options)


def _scaled_linear(edit: Edit, linear: Linear, factors: Tensor) -> fx.Node:
    rows = factors[None, :] if linear.transposed else factors[:, None]
    weight, operand = _scaled_constant(edit, linear.weight, rows), weight_operand(linear)
    if operand is not linear.weight:
        weight = rebuilt(edit, operand, {linear.weight: weight})
    replaced = {operand: weight}
    if linear.bias is not None:
        replaced[linear.bias] = _scaled_constant(edit, linear.bias, factors)
    return rebuilt(edit, linear.node, replaced)


def _scaled_constant(edit: Edit, constant: fx.Node, factor: Tensor) -> fx.Node:
    if constant.op != "get_attr":
        value = constant.meta["val"]
        factor = factor.to(value.dtype).to(value.device)
        return edit.call(aten.mul.Tensor, constant, edit.constant(f"{constant.name}_scale", factor))
    name = str(constant.target)
    if SMOOTHED not in origins(constant):
        name += "_scaled"
    return edit.constant(name, _scaled(edit, constant, factor), of=constant)


def _scaled(edit: Edit, constant: fx.Node, factor: Tensor) -> Recipe:
    """The scaled tensor, computed when it is needed: the model's own stays the only copy."""
    tensor = edit.state(constant)
    factor = factor.to(tensor.device)
    grad = tensor.requires_grad
    return Recipe(scale_channels, (tensor, factor), tensor.shape, tensor.dtype, tensor.device, grad)


def weight_operand(linear: Linear) -> fx.Node:
    """What the linear reads: the weight or its transposition."""
    if linear.weight in linear.node.all_input_nodes:
        return linear.weight
    return next(
        node for node in linear.node.all_input_nodes if node.all_input_nodes == [linear.weight]
    )


def rebuilt(edit: Edit, node: fx.Node, replaced: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """`node` called once more, on what its arguments were replaced by."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: replaced.get(used, used))
    return edit.call(node.target, *args, **kwargs)


def _widened(inverse: Tensor) -> Tensor:
    return inverse.to(torch.promote_types(inverse.dtype, torch.float32))
