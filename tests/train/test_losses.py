"""Each distance is what its formula says, is least at equality and has no gradient there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional

from fxopt.train.losses import (
    attention_kl,
    attention_mse,
    hidden_cosine,
    hidden_mse,
    logits_divergence,
)

Distance = Callable[..., Tensor]

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(2, 9))
SEEDS = st.integers(0, 2**31)
TEMPERATURES = st.floats(0.25, 20.0)


def drawn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def drawn_keep(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator) < 0.6


@given(SEEDS, SIZES, TEMPERATURES)
def test_logits_divergence_is_the_closed_form_of_torch(
    seed: int, sizes: tuple[int, int, int], temperature: float
) -> None:
    student, teacher = drawn(seed, *sizes), drawn(seed + 1, *sizes)
    keep = drawn_keep(seed, *sizes[:2])
    rows = kl_divergence(
        Categorical(logits=teacher / temperature), Categorical(logits=student / temperature)
    )
    expected = temperature**2 * (rows[keep].sum() / max(int(keep.sum()), 1))
    torch.testing.assert_close(logits_divergence(student, teacher, temperature, keep), expected)
    every = logits_divergence(student, teacher, temperature)
    torch.testing.assert_close(every, temperature**2 * rows.mean())


@given(SEEDS, SIZES, TEMPERATURES)
def test_its_gradient_is_that_of_hinton(
    seed: int, sizes: tuple[int, int, int], temperature: float
) -> None:
    """Equation 2 of the paper, times T²: T (softmax(s / T) - softmax(t / T)) over the rows."""
    student, teacher = drawn(seed, *sizes).requires_grad_(), drawn(seed + 1, *sizes)
    (got,) = torch.autograd.grad(logits_divergence(student, teacher, temperature), student)
    difference = (student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
    torch.testing.assert_close(got, temperature * difference / (sizes[0] * sizes[1]))


@pytest.mark.parametrize(
    "distance",
    [lambda s, t, keep: logits_divergence(s, t, 3.0, keep), hidden_mse, hidden_cosine],
    ids=["logits", "mse", "cosine"],
)
@given(seed=SEEDS, sizes=SIZES)
def test_no_gradient_where_the_student_is_the_teacher(
    distance: Distance, seed: int, sizes: tuple[int, int, int]
) -> None:
    teacher = drawn(seed, *sizes)
    student = teacher.clone().requires_grad_()
    keep = drawn_keep(seed, *sizes[:2])
    value = distance(student, teacher, keep)
    (gradient,) = torch.autograd.grad(value, student)
    assert abs(value.item()) < 1e-12
    assert gradient.abs().max() < 1e-12
    assert distance(drawn(seed + 1, *sizes), teacher, keep) >= -1e-12


@pytest.mark.parametrize("distance", [attention_kl, attention_mse])
@given(seed=SEEDS, sizes=SIZES)
def test_attention_has_no_gradient_at_equality(
    distance: Distance, seed: int, sizes: tuple[int, int, int]
) -> None:
    """With respect to the scores before the softmax, some keys masked."""
    batch, tokens, heads = sizes
    scores = drawn(seed, batch, heads, tokens, tokens + 1)
    scores[..., -1] = -torch.inf
    student = scores.clone().requires_grad_()
    keep = drawn_keep(seed, batch, tokens)
    value = distance(student.softmax(-1), scores.softmax(-1), keep)
    (gradient,) = torch.autograd.grad(value, student)
    assert abs(value.item()) < 1e-12
    assert gradient.abs().max() < 1e-12


@given(SEEDS, SIZES)
def test_attention_kl_is_the_closed_form_of_torch(seed: int, sizes: tuple[int, int, int]) -> None:
    batch, tokens, heads = sizes
    student, teacher = (
        drawn(s, batch, heads, tokens, tokens).softmax(-1) for s in (seed, seed + 1)
    )
    keep = drawn_keep(seed, batch, tokens)
    rows = kl_divergence(Categorical(teacher), Categorical(student)).mean(1)
    expected = rows[keep].sum() / max(int(keep.sum()), 1)
    torch.testing.assert_close(attention_kl(student, teacher, keep), expected)


@given(SEEDS, SIZES)
def test_hidden_distances_are_those_of_torch(seed: int, sizes: tuple[int, int, int]) -> None:
    student, teacher = drawn(seed, *sizes), drawn(seed + 1, *sizes)
    torch.testing.assert_close(hidden_mse(student, teacher), functional.mse_loss(student, teacher))
    same = torch.ones(sizes[0] * sizes[1], dtype=torch.float64)
    cosine = functional.cosine_embedding_loss(student.flatten(0, 1), teacher.flatten(0, 1), same)
    torch.testing.assert_close(hidden_cosine(student, teacher), cosine)


def test_another_number_of_heads_compares_the_averages() -> None:
    teacher = drawn(0, 2, 4, 3, 3).softmax(-1)
    student = teacher.mean(1, keepdim=True).expand(-1, 2, -1, -1)
    for distance in (attention_kl, attention_mse):
        assert distance(student, teacher).abs() < 1e-12
        assert distance(student[:, :1], teacher).abs() < 1e-12
        assert distance(student.roll(1, -1), teacher) > 1e-3


def test_rows_that_do_not_count_may_hold_anything() -> None:
    student, teacher = drawn(0, 2, 3, 4), drawn(1, 2, 3, 4)
    keep = torch.tensor([[True, True, False], [True, False, False]])
    for distance in (
        hidden_mse,
        hidden_cosine,
        lambda s, t, k: logits_divergence(s, t, 2.0, k),
    ):
        expected = distance(student, teacher, keep)
        assert torch.equal(
            distance(student, teacher.masked_fill(~keep[..., None], 1e9), keep), expected
        )
        bad = student.masked_fill(~keep[..., None], torch.nan)
        assert torch.equal(distance(bad, teacher, keep), expected)
        assert distance(student, teacher, torch.zeros_like(keep)) == 0


def test_a_teacher_that_rules_a_class_out_gives_no_nan() -> None:
    teacher = torch.tensor([[0.0, -torch.inf, 1.0]])
    student = torch.tensor([[0.0, 1.0, 1.0]], requires_grad=True)
    value = logits_divergence(student, teacher, 2.0)
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_half_precision_is_compared_in_float32() -> None:
    student, teacher = (drawn(seed, 4, 300).to(torch.bfloat16) for seed in (0, 1))
    for distance in (hidden_mse, hidden_cosine, lambda s, t: logits_divergence(s, t, 2.0)):
        value = distance(student, teacher)
        assert value.dtype == torch.float32
        assert torch.equal(value, distance(student.float(), teacher.float()))
