"""LinearRule: the match that every rule about linear layers shares."""

from __future__ import annotations

from torch import fx

from fxopt.analyses import LINEAR_TARGETS, as_linear
from fxopt.rewriting import Match, Rule
from fxopt.rewriting.pattern import Target


class LinearRule(Rule):
    """Matches each spelling of y = x @ Wᵀ + b with a constant W and binds it as `linear`."""

    def targets(self) -> tuple[Target, ...]:
        """Every operator that can be a linear layer."""
        return LINEAR_TARGETS

    def match(self, node: fx.Node) -> Match | None:
        """The linear layer that `node` computes, or None."""
        linear = as_linear(node)
        return None if linear is None else Match((node,), {"linear": linear})
