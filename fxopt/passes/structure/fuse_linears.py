"""FuseLinears: linears that share an input become one product (q/k/v, gate/up).

    [x @ W1ᵀ + b1, x @ W2ᵀ + b2]  =  split(x @ [W1; W2]ᵀ + [b1; b2])

Claim: close. The sums of each output channel are the same; a wider product may block them
otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxopt.claim import Claim, Close
from fxopt.constant_expressions import is_computed_constant
from fxopt.operators import PRODUCT_TARGETS, Linear, as_linear, refuse_shared_weight, why_no_linear
from fxopt.program import Mode, Program
from fxopt.recipe import Recipe, concatenate
from fxopt.rewriting import Edit, Match, Rule, RulePass, Stage
from fxopt.rewriting.pattern import Target

aten = torch.ops.aten


class FuseSiblings(Rule):
    """[x @ W1ᵀ + b1, ...] = split(x @ [W1; ...]ᵀ + [b1; ...])"""

    mode: Mode = "eval"
    learning: frozenset[str] = frozenset()

    def see(self, program: Program) -> None:
        """In train mode a weight that is computed from parameters stays so, and what is joined
        learns as a whole or not at all."""
        self.mode = program.mode
        self.learning = program.learning

    def targets(self) -> tuple[Target, ...]:
        return PRODUCT_TARGETS

    def match(self, node: fx.Node) -> Match | None:
        first = self._as_linear(node)
        if first is None:
            return self._match_misfit(node)
        siblings = [
            sibling
            for sibling in map(self._as_linear, first.x.users)
            if sibling is not None and _fits(first, sibling)
        ]
        if len(siblings) < 2 or siblings[0].node is not node:
            return None
        roots = tuple(sibling.node for sibling in siblings)
        return Match(roots, {"linears": tuple(siblings)})

    def _as_linear(self, node: fx.Node) -> Linear | None:
        """A linear of constant weight and bias; in train mode, of parameters."""
        linear = as_linear(node, computed=self.mode == "eval")
        if linear is None or linear.bias is None or linear.bias.op == "get_attr":
            return linear
        return linear if is_computed_constant(linear.bias) else None

    def _match_misfit(self, node: fx.Node) -> Match | None:
        """A product that shares an input with a linear, and is none that could join it."""
        others = (user for used in node.all_input_nodes for user in used.users if user is not node)
        if not any(map(self._as_linear, others)):
            return None
        if as_linear(node, computed=True) is not None and self.mode == "eval":
            return Match((node,), {"misfit": "its bias is computed from the inputs"})
        reason = why_no_linear(node, self.mode)
        return None if reason is None else Match((node,), {"misfit": reason})

    def refuse(self, match: Match) -> str | None:
        if "misfit" in match.bound:
            return str(match["misfit"])
        weights = [linear.weight for linear in match["linears"]]
        if len(set(weights)) < len(weights):
            return "two of them share one weight"
        for linear in match["linears"]:
            reason = refuse_shared_weight(linear, lambda user: _reads_for(user, match.roots))
            if reason is not None:
                return reason
        return self._refuse_to_train(match["linears"]) if self.mode == "train" else None

    def _refuse_to_train(self, linears: Sequence[Linear]) -> str | None:
        if len({linear.bias is None for linear in linears}) > 1:
            return "some of them have no bias, and would learn one"
        for operands in ([one.weight for one in linears], [one.bias for one in linears]):
            learn = {one is not None and str(one.target) in self.learning for one in operands}
            if len(learn) > 1:
                return "some of them are frozen, and would learn"
        return None

    def rewrite(self, match: Match, edit: Edit) -> Sequence[fx.Node]:
        linears: tuple[Linear, ...] = match["linears"]
        name = _shared_name([linear.name for linear in linears])
        weight = edit.constant(f"{name}.weight", _joined([_rows(edit, n) for n in linears]))
        bias = None
        if any(linear.bias is not None for linear in linears):
            bias = edit.constant(f"{name}.bias", _joined([_bias(edit, n) for n in linears]))
        product = edit.call(aten.linear.default, linears[0].x, weight, bias)
        sizes = [linear.out_features for linear in linears]
        pieces = edit.call(aten.split_with_sizes.default, product, sizes, -1)
        return [edit.item(pieces, index) for index in range(len(linears))]


@dataclass(frozen=True, repr=False)
class FuseLinears(RulePass):
    """Linears that share an input become one product. Claim: close.

    Fused weights are new parameters named after the modules they join, such as
    `encoder.layer.0.attention.self.query_key_value.weight`; a tied weight is left alone.
    """

    name: ClassVar[str] = "fuse-linears"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    claim: Claim = Close()

    def rules(self, program: Program) -> Sequence[Rule]:
        """One rule for any number of siblings."""
        return (FuseSiblings(),)


def _reads_for(user: fx.Node, roots: Sequence[fx.Node]) -> bool:
    """Whether a reader of a weight is one of the products, or turns it for them alone."""
    return user in roots or (is_computed_constant(user) and all(one in roots for one in user.users))


def _fits(first: Linear, other: Linear) -> bool:
    return (
        other.x is first.x
        and other.dtype == first.dtype
        and other.weight.meta["val"].device == first.weight.meta["val"].device
    )


def _joined(parts: Sequence[Tensor | Recipe]) -> Recipe:
    rows = sum(part.shape[0] for part in parts)
    first = parts[0]
    shape = torch.Size((rows, *first.shape[1:]))
    grad = any(part.requires_grad for part in parts)
    return Recipe(concatenate, tuple(parts), shape, first.dtype, first.device, grad)


def _rows(edit: Edit, linear: Linear) -> Tensor | Recipe:
    return linear.weight_nk(edit.state(linear.weight))


def _bias(edit: Edit, linear: Linear) -> Tensor | Recipe:
    if linear.bias is not None:
        return edit.state(linear.bias)
    weight = linear.weight.meta["val"]
    return torch.zeros(linear.out_features, dtype=weight.dtype, device=weight.device)


def _shared_name(weights: Sequence[str]) -> str:
    """`a.b.query_key_value` from `a.b.query.weight`, `a.b.key.weight`, `a.b.value.weight`."""
    modules = [weight.rpartition(".")[0].split(".") for weight in weights]
    levels = zip(*modules, strict=False)
    common = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    tails = "_".join("_".join(module[common:]) for module in modules)
    return ".".join([*modules[0][:common], tails or "fused"])
