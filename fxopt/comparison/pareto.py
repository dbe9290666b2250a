"""Pareto fronts: the points that no other point is at least as good as in every way."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


def pareto_front(points: Mapping[Name, Sequence[float]]) -> tuple[Name, ...]:
    """The names of the points that aren't dominated; every coordinate is a cost.

    A point is dominated where another is nowhere higher and somewhere lower; equal points don't
    dominate one another. Ordered by the first coordinate, then the next. A point with a NaN is on
    no front, and an infinite cost is one like any other.
    """
    known = {name: tuple(point) for name, point in points.items() if not _has_nan(point)}
    kept: list[Name] = []
    # In this order whatever dominates a point comes before it.
    for name in sorted(known, key=known.__getitem__):
        if not any(dominates(known[other], known[name]) for other in kept):
            kept.append(name)
    return tuple(kept)


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether costs are nowhere higher than others and somewhere lower."""
    return tuple(a) != tuple(b) and all(x <= y for x, y in zip(a, b, strict=True))


def _has_nan(point: Sequence[float]) -> bool:
    return any(value != value for value in point)
