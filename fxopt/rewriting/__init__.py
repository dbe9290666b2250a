"""Patterns, rules and the driver that takes them to their fixed point; passes and their plans."""

from fxopt.rewriting.driver import rewrite
from fxopt.rewriting.edit import Edit
from fxopt.rewriting.pattern import (
    Match,
    arguments,
    constant,
    either,
    find,
    has_dtype,
    has_rank,
    hole,
    op,
)
from fxopt.rewriting.plan import Pass, Plan, RulePass, SingleRule, Site, Stage, plan_rules
from fxopt.rewriting.rule import Rule

__all__ = [
    "Edit",
    "Match",
    "Pass",
    "Plan",
    "Rule",
    "RulePass",
    "SingleRule",
    "Site",
    "Stage",
    "arguments",
    "constant",
    "either",
    "find",
    "has_dtype",
    "has_rank",
    "hole",
    "op",
    "plan_rules",
    "rewrite",
]
