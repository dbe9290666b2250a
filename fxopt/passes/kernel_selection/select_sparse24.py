"""The rule that gives a 2:4 sparse weight to sparse tensor cores, whatever made it sparse."""

from __future__ import annotations

import torch
from torch import fx

from fxopt.device import Device
from fxopt.kernels.sparse24 import compress24, is_sparse24, refuse_sparse24
from fxopt.nodes import origins
from fxopt.operators import Linear, as_linear
from fxopt.passes.pruning.sparsify24 import SPARSE24
from fxopt.program import Program
from fxopt.recipe import materialize
from fxopt.rewriting import Edit, Match, Rule
from fxopt.rewriting.pattern import Target

aten, ops = torch.ops.aten, torch.ops.fxopt


class SelectSparse24Linear(Rule):
    """linear(x, W, b) = linear_sparse24(x, V, P, b) for a 2:4 sparse W on sparse tensor cores"""

    exclusive = False

    def __init__(self, program: Program) -> None:
        self.program = program
        self.sparse: dict[str, bool] = {}

    def targets(self) -> tuple[Target, ...]:
        return (aten.linear.default,)

    def match(self, node: fx.Node) -> Match | None:
        linear = as_linear(node)
        if linear is None or linear.transposed or not self._is_sparse(linear.weight):
            return None
        return Match((node,), {"linear": linear})

    def refuse(self, match: Match) -> str | None:
        linear: Linear = match["linear"]
        device = linear.weight.meta["val"].device
        return refuse_sparse24(linear.out_features, linear.in_features, linear.dtype, device)

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        linear: Linear = match["linear"]
        name = str(linear.weight.target)

        def make() -> tuple[fx.Node, ...]:
            values, places = compress24(edit.tensor(linear.weight))
            return edit.constant(f"{name}_values", values), edit.constant(f"{name}_places", places)

        compressed = edit.once((self, name), make)
        return edit.call(ops.linear_sparse24.default, linear.x, *compressed, linear.bias)

    def _is_sparse(self, weight: fx.Node) -> bool:
        """Looks at the values only where a product could gain by them."""
        name = str(weight.target)
        if not Device.describe(weight.meta["val"].device).sparse24():
            return SPARSE24 in origins(weight)
        if name not in self.sparse:
            state = self.program.state.get(name)
            sparse = state is not None and self.program.is_constant(weight)
            self.sparse[name] = sparse and is_sparse24(materialize(state))  # type: ignore[arg-type]
        return self.sparse[name]
