"""The passes that a textual list may name: fxopt's own, and a user's once they are registered.

    @fxopt.register_pass                    [project.entry-points."fxopt.passes"]
    @dataclass(frozen=True, repr=False)     my-pass = "my_package.passes:MyPass"
    class MyPass(fxopt.Pass): ...

The left is for the process that runs it; the right, in a package's pyproject.toml, for every
process where the package is installed. Entry points are looked up only where a list names a pass
that isn't known, or where passes are listed.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from fxopt.errors import PassError
from fxopt.lower import Lower
from fxopt.passes import (
    Autocast,
    Canonicalize,
    Float8Linear,
    FoldNorms,
    FoldPruned,
    FuseConvBatchNorm,
    FuseLinears,
    HalfAttention,
    HalfLinear,
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    Prepack,
    PruneChannels,
    QuantizeCache,
    SelectKernels,
    ShiftChannels,
    SmoothQuant,
    Sparsify24,
    SplitOutliers,
)
from fxopt.rewriting import Pass

ENTRY_POINTS = "fxopt.passes"
AUTO = "auto"
"""What a list is where a recommendation is asked for."""

PASSES: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        Canonicalize,
        FoldPruned,
        PruneChannels,
        FuseLinears,
        FuseConvBatchNorm,
        FoldNorms,
        HalfAttention,
        HalfLinear,
        Sparsify24,
        SmoothQuant,
        SplitOutliers,
        Int8Linear,
        Int8Embedding,
        QuantizeCache,
        Int4Linear,
        Float8Linear,
        Autocast,
        SelectKernels,
        ShiftChannels,
        Prepack,
        Lower,
    )
}
"""fxopt's own."""

_registered: dict[str, type[Pass]] = {}

_NAME = re.compile(r"[\w-]+")

PassClass = TypeVar("PassClass", bound=type[Pass])


@dataclass(frozen=True)
class Listed:
    """Every pass by its name, and why others that packages offer can't be had."""

    passes: Mapping[str, type[Pass]]
    failed: Mapping[str, str]


def register_pass(kind: PassClass) -> PassClass:
    """Make textual lists know the pass class `kind` by its `name`; returns it, as a decorator does.

    A class that is defined anew (a notebook's cell run again) takes its former self's place. Raises
    `PassError`, and registers nothing, for what isn't derived from `fxopt.Pass`, lacks `plan` or
    `apply`, is no frozen dataclass, has no name, or one that is taken.
    """
    _check_is_pass(kind)
    _check_name(kind)
    _registered[kind.name] = kind
    return kind


def find_pass(name: str) -> type[Pass]:
    """The pass class of that name. Raises `PassError` where there is none, with the nearest one."""
    known = {**PASSES, **_registered}
    if name in known:
        return known[name]
    offered = _offered()
    if name in offered:
        return _loaded(name, offered[name])
    names = [*known, *offered]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise PassError(f"unknown pass {name!r}{hint} Known: {', '.join(names)}")


def listed_passes() -> Listed:
    """fxopt's own passes, the registered ones, and those that installed packages offer."""
    failed: dict[str, str] = {}
    for name, points in _offered().items():
        try:
            _loaded(name, points)
        except PassError as error:
            failed[name] = str(error)
    return Listed({**PASSES, **_registered}, failed)


def _check_is_pass(kind: Any) -> None:
    if isinstance(kind, Pass):
        raise PassError(
            f"register_pass takes a class, not an instance: register_pass({type(kind).__name__})"
        )
    if not inspect.isclass(kind) or not issubclass(kind, Pass):
        raise PassError(f"register_pass takes a class derived from fxopt.Pass, not {kind!r:.80}")
    if inspect.isabstract(kind):
        missing = " and ".join(sorted(kind.__abstractmethods__))
        raise PassError(f"{kind.__name__} lacks {missing}: a pass plans, then applies its plan")
    parameters = vars(kind).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise PassError(
            f"{kind.__name__} is no frozen dataclass, so that its options aren't known: put "
            "@dataclass(frozen=True, repr=False) on it, below @register_pass"
        )


def _check_name(kind: type[Pass]) -> None:
    name = getattr(kind, "name", None)
    is_option = any(field.name == "name" for field in fields(kind))  # type: ignore[arg-type]
    if is_option or not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise PassError(
            f"{kind.__name__} has no name that a textual list can give: write "
            'name: ClassVar[str] = "my-pass" in it, of letters, digits, - and _'
        )
    if name == AUTO:
        raise PassError(
            f"{kind.__name__} can't be called {name!r}, which stands for a recommended list: give "
            "it another name"
        )
    taken = PASSES.get(name) or _registered.get(name)
    if taken is not None and _path(taken) != _path(kind):
        raise PassError(
            f"{kind.__name__} can't be called {name!r}, as {_path(taken)} is: give it another name"
        )


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _offered() -> dict[str, list[EntryPoint]]:
    """The entry points by name, in the alphabet's order; several where packages share a name."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=ENTRY_POINTS):
        if point.value not in [other.value for other in found.get(point.name, ())]:
            found.setdefault(point.name, []).append(point)
    return dict(sorted(found.items()))


def _loaded(name: str, points: list[EntryPoint]) -> type[Pass]:
    if len(points) > 1:
        told = " and ".join(map(_told, points))
        raise PassError(f"pass {name!r} is offered by {told}: uninstall one of them")
    try:
        kind: Any = points[0].load()
    except Exception as error:  # whatever a package raises while it is imported
        raise PassError(
            f"pass {name!r} of {_told(points[0])} can't be loaded: {type(error).__name__}: {error}"
        ) from error
    try:
        _check_is_pass(kind)
        if kind.name != name:
            raise PassError(f"its class is called {kind.name!r}: the two names must be one")
        registered: type[Pass] = register_pass(kind)
    except PassError as error:
        raise PassError(f"pass {name!r} of {_told(points[0])}: {error}") from error
    return registered


def _told(point: EntryPoint) -> str:
    return f"{point.dist.name if point.dist else 'a package'} ({point.value})"
