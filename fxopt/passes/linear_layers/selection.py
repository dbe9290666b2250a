"""Which linears a pass takes: by module path, by their weight, by what a pass left there."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from fxopt.errors import PassError
from fxopt.nodes import module_path
from fxopt.operators import Linear

Selection = str | Callable[[str], bool]
"""A glob over module paths, or a function of a module path."""


def checked_globs(pass_name: str, option: str, given: Any) -> tuple[str, ...]:
    """`given`, one glob or several, as a tuple. Raises `PassError` for anything else."""
    globs = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(glob, str) for glob in globs):
        raise PassError(f"{pass_name}({option}={globs!r}): give globs over module paths")
    return globs


def checked_selections(pass_name: str, option: str, given: Any) -> tuple[Selection, ...]:
    """The same, where functions of a module path are taken too."""
    choices = (given,) if isinstance(given, str) or callable(given) else tuple(given)
    if not all(isinstance(choice, str) or callable(choice) for choice in choices):
        raise PassError(
            f"{pass_name}({option}={choices!r}): give globs over module paths, or functions of a "
            "module path"
        )
    return choices


def refuse_by_path(
    linear: Linear, include: Sequence[Selection], exclude: Sequence[Selection]
) -> str | None:
    """Why a linear that wasn't asked for is left alone."""
    return refuse_path(module_path(linear.node), include, exclude)


def refuse_path(
    path: str, include: Sequence[Selection], exclude: Sequence[Selection]
) -> str | None:
    """Why what lies at a module path that wasn't asked for is left alone."""
    if not any(_selects(choice, path) for choice in include):
        return f"not in include={include!r}"
    if any(_selects(choice, path) for choice in exclude):
        return f"in exclude={exclude!r}"
    return None


def refuse_weight(linear: Linear) -> str | None:
    """Why a weight that is no matrix of floating-point numbers is left alone."""
    if not linear.dtype.is_floating_point:
        return f"its weight is {linear.dtype}, not floating point"
    if not linear.in_features or not linear.out_features:
        return "its weight is empty"
    return None


def has_mark(name: str, mark: str) -> bool:
    """Whether a pass made the weight called `name`, as `mark` at its end tells.

    `Edit.constant` numbers a name that is taken: a weight met twice is marked `_mark_1` there.
    """
    return re.search(rf"{re.escape(mark)}(_\d+)?$", name) is not None


def _selects(choice: Selection, path: str) -> bool:
    return fnmatchcase(path, choice) if isinstance(choice, str) else bool(choice(path))
