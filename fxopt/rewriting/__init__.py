"""Rules and the driver that takes them to their fixed point; conversions; passes and plans."""

from fxopt.nodes import arguments
from fxopt.rewriting.conversion import Build, Conversion, convert
from fxopt.rewriting.driver import rewrite
from fxopt.rewriting.edit import Edit
from fxopt.rewriting.option_annotations import DeviceOption, Give, Globs
from fxopt.rewriting.option_types import Bounds, OptionType, UnfitError
from fxopt.rewriting.options import Conflict, follows
from fxopt.rewriting.pattern import (
    Match,
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
    "Bounds",
    "Build",
    "Conflict",
    "Conversion",
    "DeviceOption",
    "Edit",
    "Give",
    "Globs",
    "Match",
    "OptionType",
    "Pass",
    "Plan",
    "Rule",
    "RulePass",
    "SingleRule",
    "Site",
    "Stage",
    "UnfitError",
    "arguments",
    "constant",
    "convert",
    "either",
    "find",
    "follows",
    "has_dtype",
    "has_rank",
    "hole",
    "op",
    "plan_rules",
    "rewrite",
]
