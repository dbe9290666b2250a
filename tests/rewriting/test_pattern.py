"""What a pattern matches, on graphs written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from fxopt.errors import RewriteError
from fxopt.rewriting import Rule, arguments, constant, either, find, has_dtype, has_rank, hole, op

aten = torch.ops.aten


class Graph:
    """A graph under construction: inputs x and y, a constant w, calls on demand."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.x, self.y = (self.graph.placeholder(name) for name in "xy")
        self.w = self.graph.get_attr("w")
        self.x.meta["val"] = torch.empty(2, 3)
        self.y.meta["val"] = torch.empty(3, dtype=torch.float64)
        self.w.meta["val"] = torch.empty(4, 3)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)


@pytest.fixture
def g() -> Graph:
    return Graph()


def test_holes_bind_what_they_meet(g: Graph) -> None:
    linear = g.call(aten.linear.default, g.x, g.w)
    relu = g.call(aten.relu.default, linear)
    pattern = op(
        aten.relu.default,
        op(aten.linear.default, hole("x"), constant("w"), hole("b"), name="layer"),
    )
    match = find((pattern,), relu)
    assert match is not None
    assert match.bound == {"x": g.x, "w": g.w, "b": None, "layer": linear}
    assert match.roots == (relu,)
    assert match.root is relu
    assert match.inner == (linear,)
    assert match["x"] is g.x
    assert find((pattern,), linear) is None


def test_a_hole_takes_numbers_and_lists(g: Graph) -> None:
    sliced = g.call(aten.slice.Tensor, g.x, 0, 1, 2)
    found = find(
        (op(aten.slice.Tensor, hole("x"), hole("dim"), hole("start"), hole("end")),), sliced
    )
    assert found is not None
    assert (found["dim"], found["start"], found["end"]) == (0, 1, 2)
    permuted = g.call(aten.permute.default, g.x, [1, 0])
    found = find((op(aten.permute.default, hole("x"), hole("dims")),), permuted)
    assert found is not None
    assert list(found["dims"]) == [1, 0]


def test_the_same_hole_twice_asks_for_the_same_value(g: Graph) -> None:
    square = op(aten.mul.Tensor, hole("x"), hole("x"))
    assert find((square,), g.call(aten.mul.Tensor, g.x, g.x)) is not None
    assert find((square,), g.call(aten.mul.Tensor, g.x, g.y)) is None


def test_the_same_hole_twice_compares_numbers_by_value(g: Graph) -> None:
    first = g.call(aten.sum.dim_IntList, g.x, [1])
    again = g.call(aten.sum.dim_IntList, first, [1])
    twice = op(aten.sum.dim_IntList, op(aten.sum.dim_IntList, hole("x"), hole("dim")), hole("dim"))
    assert find((twice,), again) is not None
    other = g.call(aten.sum.dim_IntList, first, [0])
    assert find((twice,), other) is None


def test_operands_swap_only_where_the_pattern_commutes(g: Graph) -> None:
    relu = g.call(aten.relu.default, g.x)
    left = g.call(aten.add.Tensor, relu, g.y)
    right = g.call(aten.add.Tensor, g.y, relu)
    for commutes, expected in ((False, [True, False]), (True, [True, True])):
        pattern = op(
            aten.add.Tensor, op(aten.relu.default, hole("x")), hole("y"), commutes=commutes
        )
        assert [find((pattern,), node) is not None for node in (left, right)] == expected
    swapped = find((pattern,), right)
    assert swapped is not None
    assert (swapped["x"], swapped["y"]) == (g.x, g.y)


def test_swapping_backtracks_through_nested_commutation(g: Graph) -> None:
    inner = g.call(aten.mul.Tensor, g.y, g.x)
    outer = g.call(aten.add.Tensor, g.x, inner)
    pattern = op(
        aten.add.Tensor,
        op(aten.mul.Tensor, hole("shared"), hole("other"), commutes=True),
        hole("shared"),
        commutes=True,
    )
    match = find((pattern,), outer)
    assert match is not None
    assert (match["shared"], match["other"]) == (g.x, g.y)


def test_an_argument_that_is_not_named_must_have_its_default(g: Graph) -> None:
    plain = op(aten.add.Tensor, hole("a"), hole("b"))
    assert find((plain,), g.call(aten.add.Tensor, g.x, g.y)) is not None
    assert find((plain,), g.call(aten.add.Tensor, g.x, g.y, alpha=1)) is not None
    assert find((plain,), g.call(aten.add.Tensor, g.x, g.y, alpha=2)) is None
    without_bias = op(aten.linear.default, hole("x"), hole("w"))
    assert find((without_bias,), g.call(aten.linear.default, g.x, g.w, None)) is not None
    assert find((without_bias,), g.call(aten.linear.default, g.x, g.w, g.y)) is None


@given(st.lists(st.sampled_from([1, 2, [0, 1], None]), min_size=6, max_size=6), st.integers(1, 6))
def test_the_rest_is_bound_by_name_whatever_it_is(values: list[Any], positional: int) -> None:
    """However the call gives it."""
    g = Graph()
    names = ["weight", "bias", "stride", "padding", "dilation", "groups"]
    given_values = dict(zip(names, values, strict=True))
    keywords = dict(list(given_values.items())[positional:])
    node = g.call(aten.conv2d.default, g.x, *values[:positional], **keywords)
    match = find((op(aten.conv2d.default, hole("input"), rest=True),), node)
    assert match is not None
    assert match.bound == {"input": g.x, **given_values}
    assert match.bound == arguments(node)
    same = find((op(aten.conv2d.default, hole("input"), groups=hole("groups"), rest=True),), node)
    assert same == match
    named = op(aten.conv2d.default, hole("x"), groups=hole("parts"), rest=True)
    match = find((named,), node)
    assert match is not None
    assert match.bound == {"x": g.x, "parts": given_values.pop("groups"), **given_values}


def test_the_rest_has_the_names_of_the_operator_that_is_met(g: Graph) -> None:
    total = op(aten.add.Tensor, hole("a"), rest=True)
    pattern = op((aten.gelu.default, aten.relu.default), total, rest=True)
    node = g.call(aten.add.Tensor, g.x, g.y, alpha=2)
    gelu = find((pattern,), g.call(aten.gelu.default, node, approximate="tanh"))
    assert gelu is not None
    assert gelu.bound == {"a": g.x, "other": g.y, "alpha": 2, "approximate": "tanh"}
    relu = find((pattern,), g.call(aten.relu.default, node))
    assert relu is not None
    assert relu.bound == {"a": g.x, "other": g.y, "alpha": 2}


@pytest.mark.parametrize(
    "make",
    [
        lambda: op(aten.add.Tensor, hole("other"), rest=True),
        lambda: op(aten.add.Tensor, op(aten.relu.default, hole("alpha")), hole("b"), rest=True),
        lambda: op(aten.add.Tensor, op(aten.add.Tensor, hole("a"), rest=True), hole("alpha")),
        lambda: op(aten.relu.default, op(aten.add.Tensor, hole("a"), rest=True), name="other"),
        lambda: op(aten.add.Tensor, hole("a"), name="alpha", rest=True),
        lambda: op(aten.add.Tensor, *[op(aten.add.Tensor, hole("a"), rest=True)] * 2),
        lambda: op(
            aten.mul.Tensor, hole("other"), either(op(aten.add.Tensor, hole("a"), rest=True))
        ),
    ],
)
def test_a_name_that_the_rest_would_bind_twice_is_an_error(make: Callable[[], object]) -> None:
    text = (
        r"rest=True of a pattern of aten\.\w+\.\w+ binds (alpha|other|alpha, other), "
        "which another part "
        "of the pattern binds too; give that argument a hole of another name"
    )
    with pytest.raises(RewriteError, match=text):
        make()


def test_choices_may_have_one_name_for_their_rest(g: Graph) -> None:
    inner = either(
        *(op(one, hole("a"), rest=True) for one in (aten.add.Tensor, aten.sub.Tensor)),
    )
    node = g.call(aten.relu.default, g.call(aten.sub.Tensor, g.x, g.y))
    match = find((op(aten.relu.default, inner),), node)
    assert match is not None
    assert match.bound == {"a": g.x, "other": g.y, "alpha": 1}


def test_a_dtype_is_a_literal(g: Graph) -> None:
    cast = op(aten.to.dtype, hole("x"), torch.bfloat16)
    assert find((cast,), g.call(aten.to.dtype, g.x, torch.bfloat16)) is not None
    assert find((cast,), g.call(aten.to.dtype, g.x, torch.float16)) is None
    assert find((cast,), g.call(aten.to.dtype, g.x, torch.bfloat16, copy=True)) is None


def test_keywords_name_arguments_however_the_call_gives_them(g: Graph) -> None:
    scaled = op(aten.add.Tensor, hole("a"), hole("b"), alpha=hole("alpha"))
    for node, alpha in (
        (g.call(aten.add.Tensor, g.x, g.y), 1),
        (g.call(aten.add.Tensor, g.x, g.y, alpha=3), 3),
    ):
        match = find((scaled,), node)
        assert match is not None
        assert match["alpha"] == alpha
    bias = op(aten.linear.default, hole("x"), hole("w"), bias=hole("b", lambda b: b is not None))
    assert find((bias,), g.call(aten.linear.default, g.x, g.w, g.y)) is not None
    assert find((bias,), g.call(aten.linear.default, g.x, g.w, bias=g.y)) is not None
    assert find((bias,), g.call(aten.linear.default, g.x, g.w)) is None


@pytest.mark.parametrize(
    ("literal", "given", "matches"),
    [(2.0, 2.0, True), (2.0, 3.0, False), (2.0, 2, False), (1, True, False), (True, True, True)],
)
def test_literals_match_by_value_and_type(
    g: Graph, literal: Any, given: Any, matches: bool
) -> None:
    node = g.call(aten.mul.Tensor, g.x, given)
    assert (find((op(aten.mul.Tensor, hole("x"), literal),), node) is not None) is matches


def test_a_literal_never_matches_a_node(g: Graph) -> None:
    assert find((op(aten.mul.Tensor, hole("x"), 2.0),), g.call(aten.mul.Tensor, g.x, g.y)) is None
    node = g.call(aten.linear.default, g.x, g.w, g.y)
    assert find((op(aten.linear.default, hole("x"), hole("w"), None),), node) is None


def test_predicates_see_the_argument_and_the_node(g: Graph) -> None:
    narrow = op(aten.relu.default, hole("x", has_dtype(torch.float32, torch.float16)))
    flat = op(aten.relu.default, hole("x", has_rank(1)))
    on_x, on_y = g.call(aten.relu.default, g.x), g.call(aten.relu.default, g.y)
    assert [find((narrow,), node) is not None for node in (on_x, on_y)] == [True, False]
    assert [find((flat,), node) is not None for node in (on_x, on_y)] == [False, True]
    last = op(aten.relu.default, hole("x"), where=lambda node: node is on_y)
    assert [find((last,), node) is not None for node in (on_x, on_y)] == [False, True]


def test_dtype_and_rank_predicates_are_false_for_what_is_no_tensor(g: Graph) -> None:
    assert not has_dtype(torch.float32)(3.0)
    assert not has_rank(0)(None)


def test_constants_are_state_only(g: Graph) -> None:
    any_weight = op(aten.linear.default, hole("x"), constant("w"))
    flat_weight = op(aten.linear.default, hole("x"), constant("w", has_rank(1)))
    on_state = g.call(aten.linear.default, g.x, g.w)
    on_input = g.call(aten.linear.default, g.x, g.y)
    assert [find((any_weight,), node) is not None for node in (on_state, on_input)] == [True, False]
    assert find((flat_weight,), on_state) is None


def test_either_takes_the_first_choice_that_lets_the_whole_match(g: Graph) -> None:
    pattern = op(
        aten.neg.default,
        either(
            op(aten.relu.default, hole("x", has_rank(1))),
            op(aten.sin.default, hole("x")),
            hole("x", has_rank(2)),
        ),
    )
    for inner, expected in (
        (g.call(aten.relu.default, g.y), g.y),
        (g.call(aten.sin.default, g.x), g.x),
        (g.x, g.x),
    ):
        match = find((pattern,), g.call(aten.neg.default, inner))
        assert match is not None
        assert match["x"] is expected
    relu = g.call(aten.relu.default, g.x)
    relu.meta["val"] = torch.empty(3)
    assert find((pattern,), g.call(aten.neg.default, relu)) is None


def test_one_of_several_operators(g: Graph) -> None:
    pattern = op((aten.relu.default, aten.silu.default), hole("x"))
    assert find((pattern,), g.call(aten.silu.default, g.x)) is not None
    assert find((pattern,), g.call(aten.sin.default, g.x)) is None


def test_several_outputs_are_found_among_the_users_of_what_is_bound(g: Graph) -> None:
    sin, other, cos = (
        g.call(aten.sin.default, g.x),
        g.call(aten.cos.default, g.y),
        g.call(aten.cos.default, g.x),
    )
    pair = (op(aten.sin.default, hole("x")), op(aten.cos.default, hole("x")))
    match = find(pair, sin)
    assert match is not None
    assert match.roots == (sin, cos)
    assert match.inner == ()
    g.graph.erase_node(cos)
    assert find(pair, sin) is None
    assert not other.users


def test_several_outputs_never_share_a_node(g: Graph) -> None:
    pair = (op(aten.sin.default, hole("x")), op(aten.sin.default, hole("x")))
    first = g.call(aten.sin.default, g.x)
    assert find(pair, first) is None
    second = g.call(aten.sin.default, g.x)
    match = find(pair, second)
    assert match is not None
    assert match.roots == (second, first)


def test_arguments_fills_in_positions_keywords_and_defaults(g: Graph) -> None:
    node = g.call(aten.add.Tensor, g.x, other=g.y)
    assert arguments(node) == {"self": g.x, "other": g.y, "alpha": 1}


@pytest.mark.parametrize("target", [torch.relu, aten.relu, "relu"])
def test_a_pattern_of_something_else_than_overloads_is_refused(target: Any) -> None:
    with pytest.raises(RewriteError) as caught:
        op(target, hole("x"))
    assert str(caught.value) == (
        f"a pattern needs operator overloads such as torch.ops.aten.add.Tensor, not {target!r}"
    )


def test_a_pattern_with_arguments_that_the_operator_lacks_is_refused() -> None:
    with pytest.raises(RewriteError) as caught:
        op(aten.relu.default, hole("x"), hole("y"))
    assert str(caught.value) == "aten.relu.default takes 1 argument (self); the pattern names 2"
    with pytest.raises(RewriteError) as caught:
        op((aten.add.Tensor, aten.relu.default), hole("x"), alpha=2)
    assert str(caught.value) == "aten.relu.default has no argument 'alpha'; it takes self"


def test_the_outermost_pattern_of_a_rule_must_be_an_operator() -> None:
    class Anything(Rule):
        pattern = hole("x")

    with pytest.raises(RewriteError) as caught:
        Anything().targets()
    assert str(caught.value) == "rule Anything: the outermost pattern must be op(...)"


def test_a_rule_without_a_rewrite_says_so(g: Graph) -> None:
    class Forgotten(Rule):
        pattern = op(aten.relu.default, hole("x"))

    match = Forgotten().match(g.call(aten.relu.default, g.x))
    assert match is not None
    with pytest.raises(NotImplementedError, match="rule Forgotten has no rewrite"):
        Forgotten().rewrite(match, None)  # type: ignore[arg-type]
