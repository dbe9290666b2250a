"""Which linears a pass takes: by module path, by their weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, TypeAlias

from fxopt.nodes import module_path
from fxopt.operators import Linear
from fxopt.rewriting.option_types import OptionType, Paths

Selection = str | Callable[[str], bool]
"""A glob over module paths, or a function of a module path."""


@dataclass(frozen=True)
class Select(OptionType):
    """A glob over module paths, or a function of a module path, which has no text."""

    @property
    def expected(self) -> str:
        return "globs over module paths, or functions of a module path"

    def take(self, given: Any) -> Selection:
        selection: Selection = given
        if not isinstance(given, str) and not callable(given):
            raise self.unfit()
        return selection

    def read(self, text: str) -> Selection:
        return text


Selections: TypeAlias = Annotated[
    tuple[Selection, ...], Paths(Select(), Select().expected, "globs over module paths")
]
"""One selection, or several."""


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


def _selects(choice: Selection, path: str) -> bool:
    return fnmatchcase(path, choice) if isinstance(choice, str) else bool(choice(path))
