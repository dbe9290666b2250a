"""Where the numbered badges of a plot go, so that none hides another or a point."""

from __future__ import annotations

import math
from collections.abc import Sequence

Place = tuple[float, float]

_POINT = 5.0
_DISTANCES = (0.0, 1.9, 2.8, 3.8, 5.0, 6.3, 7.6)
# Up and to the right first, where fewest lines run.
_DIRECTIONS = (45, 135, -45, -135, 90, 0, 180, -90)


def place(
    points: Sequence[Place], radius: float, box: tuple[float, float, float, float]
) -> list[Place]:
    """The centre of the badge of each point: on it, or as near as there is room.

    All in pixels; `box` is (left, bottom, right, top). Where there is no room at all, a badge goes
    where it overlaps the fewest others.
    """
    badges: list[Place] = []
    for index, point in enumerate(points):
        others = [*points[:index], *points[index + 1 :]]
        candidates = [
            (point[0] + d * radius * math.cos(angle), point[1] + d * radius * math.sin(angle))
            for d in _DISTANCES
            for angle in map(math.radians, _DIRECTIONS)
        ]
        badges.append(min(candidates, key=lambda at: _hidden(at, badges, others, radius, box)))
    return badges


def _hidden(
    at: Place,
    badges: Sequence[Place],
    points: Sequence[Place],
    radius: float,
    box: tuple[float, float, float, float],
) -> int:
    left, bottom, right, top = box
    inside = left + radius <= at[0] <= right - radius and bottom + radius <= at[1] <= top - radius
    return (
        sum(math.dist(at, badge) < 2 * radius + 1 for badge in badges)
        + sum(math.dist(at, point) < radius + _POINT for point in points)
        + (0 if inside else 100)
    )
