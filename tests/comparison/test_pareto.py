"""Pareto fronts against their definition, and badges that hide nothing."""

from __future__ import annotations

import math
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from fxopt.comparison import pareto_front
from fxopt.comparison.placing import place

_VALUES = st.sampled_from([0.0, 1.0, 2.0, 3.0, math.inf, -math.inf])


@given(
    points=st.integers(1, 3).flatmap(
        lambda axes: st.lists(st.tuples(*[_VALUES] * axes), min_size=1, max_size=9)
    )
)
def test_the_front_is_what_nothing_dominates(points: list[tuple[float, ...]]) -> None:
    named = {f"p{i}": point for i, point in enumerate(points)}

    def dominated(name: str) -> bool:
        point = named[name]
        return any(
            all(a <= b for a, b in zip(other, point, strict=True))
            and any(a < b for a, b in zip(other, point, strict=True))
            for other in named.values()
        )

    front = pareto_front(named)
    assert set(front) == {name for name in named if not dominated(name)}
    assert [named[name] for name in front] == sorted(named[name] for name in front)


def test_equal_points_are_both_on_it_and_nan_is_not() -> None:
    assert pareto_front({"a": (1.0, 1.0), "b": (1.0, 1.0), "c": (math.nan, 0.0)}) == ("a", "b")
    assert pareto_front({}) == ()


@given(
    points=st.lists(st.tuples(st.floats(20, 340), st.floats(20, 260)), min_size=1, max_size=9),
    crowded=st.booleans(),
)
def test_badges_hide_neither_one_another_nor_a_point(
    points: list[tuple[float, float]], crowded: bool
) -> None:
    if crowded:
        points = [(points[0][0] + i % 3, points[0][1] + i // 3) for i in range(len(points))]
    badges = place(points, 9.0, (0.0, 0.0, 360.0, 280.0))
    for a, b in combinations(badges, 2):
        assert math.dist(a, b) >= 18.0
    for i, badge in enumerate(badges):
        assert all(math.dist(badge, p) >= 9.0 for j, p in enumerate(points) if j != i)
        assert 9.0 <= badge[0] <= 351.0
        assert 9.0 <= badge[1] <= 271.0
