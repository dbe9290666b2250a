"""What passes about linear layers share: the match of their rules, and a look at their inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from fxopt.constant_expressions import stored
from fxopt.errors import PassError
from fxopt.nodes import module_path
from fxopt.observation import Observer, calibration_warnings, observe
from fxopt.operators import LINEAR_TARGETS, PRODUCT_TARGETS, Linear, as_linear, why_no_linear
from fxopt.program import Mode, Program
from fxopt.recipe import materialize
from fxopt.rewriting import Match, Plan, Rule, Site, plan_rules
from fxopt.rewriting.pattern import Target

Seen = TypeVar("Seen", bound=Observer)


def rows_of(program: Program, linear: Linear) -> Tensor:
    """The weight [N, K] of `linear` as `program` holds or computes it, apart from its gradient."""
    return materialize(linear.weight_nk(stored(program, linear.weight))).detach()


class LinearRule(Rule):
    """Matches each spelling of y = x @ Wᵀ + b with a constant W and binds it as `linear`."""

    def targets(self) -> tuple[Target, ...]:
        """Every operator that can be a linear layer."""
        return LINEAR_TARGETS

    def match(self, node: fx.Node) -> Match | None:
        """The linear layer that `node` computes, or None."""
        linear = as_linear(node)
        return None if linear is None else Match((node,), {"linear": linear})


class ProductRule(LinearRule):
    """Matches each matrix product: one of a constant weight, computed ones included, as `linear`;
    of any other it says why it is none."""

    mode: Mode = "eval"

    def see(self, program: Program) -> None:
        """In train mode a weight that is computed from parameters stays so."""
        self.mode = program.mode

    def targets(self) -> tuple[Target, ...]:
        """Every operator that is a matrix product."""
        return PRODUCT_TARGETS

    def match(self, node: fx.Node) -> Match | None:
        """The linear layer that `node` computes, or the product that is none."""
        linear = as_linear(node, computed=self.mode == "eval")
        if linear is not None:
            return Match((node,), {"linear": linear})
        reason = why_no_linear(node, self.mode)
        return None if reason is None else Match((node,), {"no_linear": reason})

    def reason_to_refuse(self, match: Match) -> str | None:
        """Why the product is no linear layer, or what the rule has against the linear layer."""
        reason: str | None = match.bound.get("no_linear")
        return reason or super().reason_to_refuse(match)


def chosen_linears(program: Program, rule: LinearRule, sites: Sequence[Site]) -> list[Linear]:
    """The linears at the sites that a plan of `rule` has."""
    chosen = {site.node for site in sites}
    rule.see(program)
    found = (rule.match(node) for node in program.graph.nodes if node.name in chosen)
    return [match["linear"] for match in found if match is not None]


def path_of(linear: Linear) -> str:
    """How a plan calls a linear: by its module, or by its node where it has none."""
    return module_path(linear.node) or linear.node.name


@dataclass(frozen=True)
class JudgedPlan(Plan):
    """A plan with what calibration found for linears, or why it found nothing, by node name."""

    found: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    reasons: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)


Judged = TypeVar("Judged", bound=JudgedPlan)


def judged_plan(
    program: Program,
    make: Callable[..., Judged],
    rule_of: Callable[[Mapping[str, Any], Mapping[str, str]], Rule],
    observer: Callable[[], Seen],
    judge: Callable[[Seen], tuple[Any, str]],
) -> Judged:
    """The plan that `make` makes of what `judge` finds in what an `observer`, one for each input,
    has seen of each linear: that and a detail, or None and the reason. Reads the calibration."""
    chosen = {site.node for site in plan_rules(program, (rule_of({}, {}),), "").sites}
    nodes = (as_linear(node) for node in program.graph.nodes if node.name in chosen)
    linears = [linear for linear in nodes if linear is not None]
    watched = {linear.x: (observer(),) for linear in linears}
    layers = {path_of(linear): watched[linear.x] for linear in linears}
    warnings = calibration_warnings(observe(program, watched), layers) if watched else ()
    found, reasons, details = {}, {}, []
    for linear in linears:
        one, text = judge(watched[linear.x][0])
        if one is None:
            reasons[linear.node.name] = text
            continue
        found[linear.node.name] = one
        details.append(f"{path_of(linear)}: {text}")
    base = plan_rules(program, (rule_of(found, reasons),), "")
    return make(
        sites=base.sites,
        refusals=base.refusals,
        warnings=warnings,
        details=tuple(details),
        found=found,
        reasons=reasons,
    )


def check_unquantized(program: Program, spec: str, verb: str) -> None:
    """Raise `PassError` where the pass `spec` comes too late to `verb` linears."""
    if any(node.target is torch.ops.fxopt.dequantize.default for node in program.graph.nodes):
        raise PassError(
            f"{spec} comes after a pass that quantized linears, which it can't {verb} any more: "
            "move it before Int8Linear"
        )
