"""The parts of the dialect that are lists of names."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

_OPERATOR = (
    *("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos", "abs"),
    *("and_", "or_", "not_", "eq", "ne", "lt", "le", "gt", "ge", "getitem"),
)
_MATH = ("ceil", "floor", "trunc", "sqrt")
_TORCH = ("int", "float", "max", "min", "not", "ite", "sum", "sqrt")

SIZE_FUNCTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        **{f"operator.{name}": getattr(operator, name) for name in _OPERATOR},
        **{f"math.{name}": getattr(math, name) for name in _MATH},
        **{f"torch.sym_{name}": getattr(torch, f"sym_{name}") for name in _TORCH},
    }
)
"""The Python functions a graph may call, by name: arithmetic on sizes, and `getitem`."""
NODE_KINDS = ("placeholder", "get_attr", "call_function", "output")
