"""The minimum cut places casts as cheaply as the best of all assignments does."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.analyses.precision.cast_placement import (
    CastGraph,
    Placement,
    Reading,
    Value,
    cheapest_placement,
    priced,
    sure_high,
)


@st.composite
def cast_graphs(draw: st.DrawFn) -> CastGraph:
    """Up to eight values, fixed or free, each read by about half of those after it."""
    count = draw(st.integers(1, 8))
    sides = st.sampled_from(["low", "high", "either", "either", "either"])
    values = [
        Value(f"v{i}", draw(sides), draw(st.integers(0, 6)), draw(st.booleans()))
        for i in range(count)
    ]
    kinds = st.sampled_from(["none", "none", "plain", "plain", "keeps", "widens"])
    readings = []
    for value, reader in itertools.combinations(values, 2):
        kind = draw(kinds)
        keeps = kind == "keeps" and reader.side == "either"
        if kind != "none":
            widens = kind == "widens"
            readings.append(Reading(value.name, reader.name, keeps=keeps, widens=widens))
    return CastGraph(tuple(values), tuple(readings))


def best_of_all(graph: CastGraph) -> Placement:
    """The cheapest of all assignments; of equals that with fewest exact values high, then low."""
    exact = {value.name for value in graph.values if value.exact}
    names = [value.name for value in graph.values]
    subsets = itertools.chain.from_iterable(
        itertools.combinations(names, size) for size in range(len(names) + 1)
    )
    found = [placed for low in subsets if (placed := priced(graph, low)) is not None]
    return min(found, key=lambda one: (one.bytes, len(exact - one.low), len(one.low)))


@settings(max_examples=400)
@given(cast_graphs())
def test_no_assignment_is_cheaper(graph: CastGraph) -> None:
    placed, best = cheapest_placement(graph), best_of_all(graph)

    assert placed.bytes == best.bytes
    assert placed.low == best.low


@given(cast_graphs())
def test_what_must_be_high_is(graph: CastGraph) -> None:
    assert not sure_high(graph.values, graph.readings) & cheapest_placement(graph).low


def chain(*sides: str, sizes: tuple[int, ...]) -> CastGraph:
    values = [Value(f"v{i}", side, size) for i, (side, size) in enumerate(zip(sides, sizes))]  # type: ignore[arg-type]  # noqa: B905
    readings = [Reading(f"v{i}", f"v{i + 1}") for i in range(len(values) - 1)]
    return CastGraph(tuple(values), tuple(readings))


def test_the_smallest_value_of_a_chain_is_cast() -> None:
    placed = cheapest_placement(chain("low", "either", "either", "high", sizes=(9, 2, 5, 0)))

    assert placed.up == ("v1",)
    assert placed.bytes == 2
    assert placed.low == {"v0", "v1"}


def test_of_equal_casts_the_earliest_after_a_product_is_taken() -> None:
    placed = cheapest_placement(chain("low", "either", "high", sizes=(4, 4, 0)))

    assert placed.up == ("v0",)


def test_what_moves_values_does_so_in_half() -> None:
    values = (Value("x", "low", 4), Value("view", "either", 4, True), Value("norm", "high", 0))
    placed = cheapest_placement(CastGraph(values, (Reading("x", "view"), Reading("view", "norm"))))

    assert placed.up == ("view",)


def test_two_casts_around_a_cheap_operator_are_spared() -> None:
    placed = cheapest_placement(chain("high", "low", "either", "low", sizes=(4, 4, 4, 0)))

    assert placed.low == {"v1", "v2", "v3"}
    assert placed.bytes == 4


def test_a_value_is_cast_once_for_all_its_readers() -> None:
    values = [Value("x", "high", 6), *(Value(name, "low", 0) for name in "qkv")]
    placed = cheapest_placement(CastGraph(tuple(values), tuple(Reading("x", n) for n in "qkv")))

    assert placed.down == ("x",)
    assert placed.bytes == 6


def test_a_reader_that_keeps_is_never_fed_by_a_cast() -> None:
    values = (Value("x", "high", 1), Value("add", "either", 100), Value("product", "low", 0))
    readings = (Reading("x", "add", keeps=True), Reading("add", "product"))
    placed = cheapest_placement(CastGraph(values, readings))

    assert placed.low == {"product"}
    assert placed.down == ("add",)


def test_a_widening_reader_costs_nothing() -> None:
    values = (Value("product", "low", 8), Value("add", "high", 0))
    placed = cheapest_placement(CastGraph(values, (Reading("product", "add", widens=True),)))

    assert placed.bytes == 0
    assert placed.up == ()


def test_sides_that_contradict_each_other_are_named() -> None:
    values = (Value("x", "high", 1), Value("add", "either", 1), Value("product", "low", 0))
    readings = (Reading("x", "add", keeps=True), Reading("add", "product", keeps=True))

    with pytest.raises(ValueError, match="fixed low must be high"):
        cheapest_placement(CastGraph(values, readings))
