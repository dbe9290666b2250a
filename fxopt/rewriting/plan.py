"""Pass and Plan: decide, show, act.

A pass is a frozen dataclass. `plan` looks and touches nothing; the plan can be printed, and sites
can be taken out of it; `apply` acts on a copy through the driver.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import chain
from typing import Any, ClassVar, Generic, get_args, get_origin

from typing_extensions import TypeVar

from fxopt.claim import Claim, Close
from fxopt.errors import PassError
from fxopt.nodes import label, module_path
from fxopt.program import Mode, Program, Refusal
from fxopt.rewriting.driver import rewrite
from fxopt.rewriting.option_types import Paths
from fxopt.rewriting.options import (
    Conflict,
    changed_options,
    declared,
    fault,
    settle,
    spell_options,
)
from fxopt.rewriting.rule import Rule
from fxopt.rewriting.unmatched import unmatched


class Stage(IntEnum):
    """Where in a list a pass makes sense; a list must not go down. `ANY` fits everywhere."""

    ANY = 0
    STRUCTURE = 1
    NUMERICS = 2
    KERNELS = 3
    LOWER = 4


@dataclass(frozen=True)
class Site:
    """One place that a plan will change: the rule, the node's name and how messages name it."""

    rule: str
    node: str
    label: str


@dataclass(frozen=True)
class Plan:
    """What a pass will do to one program: sites and refusals; `excluded` nodes are spared.

    `warnings` are what the user must know about how it was planned; `details` are lines that
    explain its decisions, such as a table. A pass may subclass it to carry what `apply` needs; one
    that `names_state` and no nodes holds for every graph over the same state.
    """

    names_state: ClassVar[bool] = False

    spec: str
    sites: tuple[Site, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    excluded: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()
    details: tuple[str, ...] = ()

    def without(self, nodes: Collection[str]) -> Plan:
        """This plan with the sites at `nodes` taken out."""
        sites = tuple(site for site in self.sites if site.node not in nodes)
        return replace(self, sites=sites, excluded=self.excluded | set(nodes))

    def __str__(self) -> str:
        counts = Counter(site.rule for site in self.sites)
        lines = [f"plan of {self.spec}"]
        lines += [f"  {rule}: {count} sites" for rule, count in counts.items()] or [
            "  nothing to do"
        ]
        lines += [f"  {detail}" for detail in self.details]
        lines += [f"  refused {refusal}" for refusal in self.refusals]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def _with_its_own_plan(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method(self, program, plan)`, which refuses a plan that isn't of the pass's `plan_type`."""

    @functools.wraps(method)
    def checked(self: Any, program: Program, plan: Plan) -> Any:
        if not isinstance(plan, self.plan_type):
            raise PassError(
                f"{self!r} can't apply this {type(plan).__name__}: give the "
                f"{self.plan_type.__name__} that its own plan() made"
            )
        return method(self, program, plan)

    return checked


def _with_unmatched(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method(self, program)`, whose plan warns of globs that match no path it looked at."""

    @functools.wraps(method)
    def checked(self: Any, program: Program) -> Any:
        plan = method(self, program)
        kind: Any = type(self)
        choices = [one.name for one in declared(kind) if isinstance(one.type, Paths)]
        if not choices:
            return plan
        paths = {label(node): module_path(node) for node in program.graph.nodes}
        seen = [*(site.label for site in plan.sites), *(one.node for one in plan.refusals)]
        names = {paths[name] for name in seen if name in paths}
        missed = [unmatched(option, getattr(self, option), names) for option in choices]
        return replace(plan, warnings=tuple(dict.fromkeys(chain(plan.warnings, *missed))))

    return checked


PlanType = TypeVar("PlanType", bound=Plan, default=Any)


class Pass(ABC, Generic[PlanType]):
    """A rewrite of the whole program with a claim about its outputs.

    A subclass is a frozen dataclass: its fields are its options, and its `repr` can be pasted back.
    Their annotations say what they take (see `fxopt.rewriting.option_annotations`), which is
    checked when a pass is built, with one form of error: `Mine(option=value): give ...`. An option
    whose default is `follows()` is what `default_OPTION()` returns where it is left out. `name` is
    the pass's name in a textual spec such as `int8-linear{mode=dynamic}`; a user's own is read
    there once `fxopt.register_pass` knows it.

    A pass that plans more than sites names its plan, `class Mine(Pass[MyPlan])`: `apply` and
    `oracle` then refuse any other with a `PassError`.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage] = Stage.ANY
    plan_type: ClassVar[type[Plan]] = Plan
    claim: Claim = Close()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__dict__.get("__orig_bases__", ()):
            if issubclass(get_origin(base) or object, Pass) and isinstance(get_args(base)[0], type):
                cls.plan_type = get_args(base)[0]
        wrappers = {
            "plan": _with_unmatched,
            "apply": _with_its_own_plan,
            "oracle": _with_its_own_plan,
        }
        for method, wrapped in wrappers.items():
            if method in cls.__dict__:
                setattr(cls, method, wrapped(cls.__dict__[method]))

    def __post_init__(self) -> None:
        settle(self)
        conflict = self.conflict()
        if conflict is not None:
            given = {option: getattr(self, option) for option in conflict.options}
            raise fault(type(self).__name__, given, conflict.text)

    def conflict(self) -> Conflict | None:
        """The options, each valid by itself, that don't go together; None where all do."""
        return None

    @abstractmethod
    def plan(self, program: Program) -> PlanType:
        """What this pass will change in `program`, and what it refuses and why."""

    @abstractmethod
    def apply(self, program: Program, plan: PlanType) -> Program:
        """A new program with `plan` carried out through `fxopt.rewriting.rewrite` or `convert`.

        Raises `PassError` for the plan of another kind of pass.
        """

    def needs(self, mode: Mode) -> tuple[str, ...]:
        """The names of the passes that must have run before this one in a program of `mode`.

        Where a list hasn't them, they run before the first pass that needs them, and are reported
        if they change anything. What fuses kernels runs before anything else of their level.
        """
        return ("select-kernels",) if self.stage >= Stage.KERNELS else ()

    def oracle(self, program: Program, plan: PlanType) -> Program | None:
        """What the pass means to compute, as a program with the inputs and outputs of `program`.

        None, as by default, means what `program` itself computes. A pass that changes outputs by
        intent is judged against this program instead, and so are the passes after it.
        """
        return None

    def advice(self) -> str | None:
        """What a user can change where the claim is broken, None where there is nothing to."""
        return None

    @property
    def spec(self) -> str:
        """The textual form that parses back to this pass: `name{option=value, ...}`."""
        options = spell_options(self)
        return self.name + (f"{{{options}}}" if options else "")

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in changed_options(self).items())
        return f"{type(self).__name__}({options})"


class RulePass(Pass[Plan]):
    """A pass that is a set of rules taken to their fixed point."""

    @abstractmethod
    def rules(self, program: Program) -> Sequence[Rule]:
        """The rules for `program`."""

    def plan(self, program: Program) -> Plan:
        """The sites where a rule matches now, and those where it refuses to."""
        return plan_rules(program, self.rules(program), repr(self))

    def apply(self, program: Program, plan: Plan) -> Program:
        """Rewrite to the fixed point, sparing the plan's excluded nodes."""
        return rewrite(program, self.rules(program), plan.excluded)


@dataclass(frozen=True, repr=False)
class SingleRule(RulePass):
    """A user's rule as a pass of its own."""

    rule: Rule
    name: ClassVar[str] = "rule"

    @property
    def claim(self) -> Claim:  # type: ignore[override]
        """The rule's own claim."""
        return self.rule.claim

    def rules(self, program: Program) -> Sequence[Rule]:
        """The one rule."""
        return (self.rule,)

    def __repr__(self) -> str:
        return f"{self.rule.name}()"


def plan_rules(program: Program, rules: Sequence[Rule], spec: str) -> Plan:
    """Match every rule at every node of `program` without touching anything."""
    by_target: dict[Any, list[Rule]] = {}
    anywhere = [rule for rule in rules if not rule.targets()]
    for rule in rules:
        rule.see(program)
        for target in rule.targets():
            by_target.setdefault(target, []).append(rule)
    sites: list[Site] = []
    refusals: dict[Refusal, None] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        for rule in (*by_target.get(node.target, ()), *anywhere):
            match = rule.match(node)
            if match is None:
                continue
            reason = rule.reason_to_refuse(match)
            if reason is None:
                sites.append(Site(rule.name, node.name, label(node)))
                break
            refusals[Refusal(reason, label(node))] = None
    return Plan(spec, tuple(sites), tuple(refusals))
