"""Terms are values that paste back; a wrong option is said when it is built."""

from __future__ import annotations

from typing import Any

import pytest

from fxopt.errors import TrainError
from fxopt.train import Attention, Hidden, Logits, Task
from fxopt.train.layer_pairs import checked_pairs, layer_pairs, state_pairs
from fxopt.train.terms import checked_terms


@pytest.mark.parametrize(
    "term",
    [Task(0.5), Logits(temperature=4.0), Hidden(distance="cosine", layers=((0, 1),)), Attention()],
)
def test_repr_pastes_back(term: Any) -> None:
    assert eval(repr(term)) == term


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Task(-1.0), "Task(weight=-1.0): must be a number, 0 or above"),
        (lambda: Logits(float("nan")), "Logits(weight=nan): must be a number, 0 or above"),
        (lambda: Logits(temperature=0), "Logits(temperature=0): must be a number above 0"),
        (
            lambda: Logits(next_token="yes"),  # type: ignore[arg-type]
            "Logits(next_token='yes'): must be None, True or False",
        ),
        (
            lambda: Hidden(distance="kl"),  # type: ignore[arg-type]
            "Hidden(distance='kl'): must be 'mse' or 'cosine'",
        ),
        (
            lambda: Attention(distance="cosine"),  # type: ignore[arg-type]
            "Attention(distance='cosine'): must be 'kl' or 'mse'",
        ),
        (
            lambda: Hidden(layers=[(1, 2)]),  # type: ignore[arg-type]
            "Hidden(layers=[(1, 2)]): must be pairs of indices, student's first: ((1, 2), (2, 4))",
        ),
        (
            lambda: checked_terms("logits"),
            "terms='logits': give a list such as [Task(), Logits()]",
        ),
        (
            lambda: checked_terms([Logits]),
            "terms= holds <class 'fxopt.train.terms.Logits'>; give Logits() of Task, Logits, "
            "Hidden or Attention",
        ),
        (
            lambda: checked_terms([Logits(), Logits(2.0)]),
            "terms= holds logits twice; give each kind once",
        ),
        (
            lambda: checked_terms([Logits(0.0)]),
            "terms= has no term with a weight above 0: there is nothing to learn",
        ),
        (
            lambda: checked_pairs(((3, 0),), 3, 5, "Hidden"),
            "Hidden(layers=...) holds (3, 0), but the student returned indices 0 to 2 and the "
            "teacher 0 to 4",
        ),
    ],
)
def test_a_wrong_option_is_refused(build: Any, text: str) -> None:
    with pytest.raises(TrainError) as caught:
        build()
    assert str(caught.value) == text


def test_a_term_alone_and_terms_without_weight() -> None:
    assert checked_terms(Logits()) == (Logits(),)
    assert checked_terms([Task(0.0), Logits()]) == (Logits(),)


def test_layers_pair_by_relative_depth() -> None:
    assert state_pairs(5, 13) == ((0, 0), (1, 3), (2, 6), (3, 9), (4, 12))
    assert layer_pairs(4, 12) == ((0, 2), (1, 5), (2, 8), (3, 11))
    assert layer_pairs(6, 12) == ((0, 1), (1, 3), (2, 5), (3, 7), (4, 9), (5, 11))


@pytest.mark.parametrize("student", range(1, 9))
@pytest.mark.parametrize("teacher", range(1, 9))
def test_pairs_rise_to_the_last_layer(student: int, teacher: int) -> None:
    for pairs in (state_pairs(student, teacher), layer_pairs(student, teacher)):
        own, others = zip(*pairs, strict=True)
        assert own == tuple(range(student))
        assert list(others) == sorted(others)
        assert all(0 <= other < teacher for other in others)
        assert others[-1] == teacher - 1 or student == 1
    if student == teacher:
        assert (
            state_pairs(student, teacher)
            == layer_pairs(student, teacher)
            == tuple((index, index) for index in range(student))
        )
