"""Half-quadratic zero points: no larger norm than where they begin; outliers count less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.weights import half_quadratic as module
from fxopt.weights.affine import affine_groups
from fxopt.weights.half_quadratic import half_quadratic, lost


def norm(weight: Tensor, group: int, scale: Tensor, zero_point: Tensor) -> Tensor:
    """What each group loses, in steps of its scale, with p = 0.7."""
    steps = (weight.view(-1, group) / scale.view(-1, 1)).double()
    zero = zero_point.view(-1, 1).double()
    q = (steps + zero).round().clamp(-8, 7)
    return (steps - (q - zero)).abs().pow(0.7).mean(1)


def outlying(rows: int, seed: int) -> Tensor:
    """Weights a few of which are far out, as trained ones are."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 128, generator=generator)
    return weight * torch.where(torch.rand(weight.shape, generator=generator) < 0.02, 4.0, 1.0)


@given(
    st.integers(0, 2**31),
    st.sampled_from([2, 16, 32]),
    st.sampled_from([1e-20, 1e-3, 1.0, 1e10]),
)
def test_no_group_loses_more_than_where_it_began(seed: int, group: int, size: float) -> None:
    weight = outlying(3, seed) * size
    begun = affine_groups(weight, group)
    scale, zero = begun.scale.float(), begun.zero_point.float()
    same, moved = half_quadratic(weight, group, scale, zero, -8, 15)
    assert same is scale
    assert moved.shape == zero.shape
    before, after = (norm(weight, group, scale, one) for one in (zero, moved))
    # A millionth of a step, which float32 rounds, is 6e-5 to the power of 0.7.
    assert bool((after <= before * (1 + 1e-5) + 2e-4).all())


def test_it_gains_where_a_few_values_are_far_out() -> None:
    weight = outlying(64, 0)
    begun = affine_groups(weight, 32)
    scale, zero = begun.scale.float(), begun.zero_point.float()
    _, moved = half_quadratic(weight, 32, scale, zero, -8, 15)
    before, after = (norm(weight, 32, scale, one).mean() for one in (zero, moved))
    assert after < 0.99 * before


def test_a_step_the_wrong_way_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With errors that are never let go z is a plain mean, which gains less."""
    weight = outlying(64, 0)
    begun = affine_groups(weight, 32)
    scale, zero = begun.scale.float(), begun.zero_point.float()
    _, right = half_quadratic(weight, 32, scale, zero, -8, 15)
    monkeypatch.setattr(module, "_PENALTY", 1e-9)
    _, wrong = half_quadratic(weight, 32, scale, zero, -8, 15)
    gains = [norm(weight, 32, scale, one).mean() for one in (right, wrong)]
    assert gains[0] < gains[1]


def test_what_is_lost_is_the_mean_of_powers() -> None:
    x = torch.tensor([[0.5, 1.25, -9.0]])
    expected = (0.5**0.7 + 0.25**0.7 + 1.0) / 3
    torch.testing.assert_close(lost(x, torch.zeros(1, 1), -8, 7), torch.tensor([[expected]]))
