from hypothesis import given
from hypothesis import strategies as st

from fxopt.program import Refusal
from fxopt.report.grouping import group


def test_same_reason_is_one_group_with_an_example():
    refusals = [Refusal("weight is tied to the embedding", f"layer.{i}") for i in range(12)]
    (found,) = group(refusals)
    assert str(found) == "12 x weight is tied to the embedding (e.g. layer.0)"
    assert len(found.nodes) == 12


def test_reasons_that_differ_in_figures_only_are_one_group_and_say_so():
    found = group([Refusal("slower: 0.8x", "a"), Refusal("slower: 0.95x", "b")])
    assert [str(one) for one in found] == ["2 x slower: 0.8x (e.g. a; figures vary)"]


def test_largest_group_first_then_in_order_of_appearance():
    found = group([Refusal(why, "n") for why in ("one", "two", "three", "two")])
    assert [one.reason for one in found] == ["two", "one", "three"]
    assert str(found[1]) == "1 x one (n)"


def test_no_refusals_no_groups():
    assert group([]) == []


@given(st.lists(st.builds(Refusal, st.sampled_from(["a 1", "a 2", "b"]), st.text(max_size=3))))
def test_no_refusal_is_lost(refusals):
    nodes = [node for found in group(refusals) for node in found.nodes]
    assert sorted(nodes) == sorted(refusal.node for refusal in refusals)
