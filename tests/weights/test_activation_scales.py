"""Scales of input channels: chosen where they gain, the same for what is tied, and exact apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.weights import activation_scales
from fxopt.weights.activation_scales import activation_scale, choose_scale, output_error
from fxopt.weights.affine import dense_groups, weighted_groups


def rounded(rows: Tensor, power: Tensor) -> Tensor:
    return dense_groups(*weighted_groups(rows, 16, power))


def spread(columns: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Two weights whose columns differ in size, and a moment of inputs that make up for it."""
    generator = torch.Generator().manual_seed(seed)
    by = torch.randn(columns, generator=generator).exp()
    x = torch.randn(4 * columns, columns, generator=generator)
    x = x @ (torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns) * by
    weights = [torch.randn(rows, columns, generator=generator) / by for rows in (40, 7)]
    return weights, x.t() @ x


@given(
    st.integers(0, 2**31),
    st.integers(1, 40),
    st.floats(0, 1),
    st.booleans(),
    st.booleans(),
)
def test_a_scale_is_positive_and_shared_by_what_is_tied(
    seed: int, channels: int, alpha: float, levelled: bool, some_dead: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    power, columns = (torch.randn(channels, generator=generator).mul(4).exp() for _ in range(2))
    if some_dead:
        power[::3], columns[1::4] = 0.0, 0.0
    ties = torch.randint(0, channels, (channels,), generator=generator)
    scale = activation_scale(power, columns, ties, alpha, levelled)
    assert scale.dtype == torch.float64
    assert bool((scale > 0).all())
    assert bool(scale.isfinite().all())
    for number in ties.unique():
        assert len(scale[ties == number].unique()) == 1


def test_without_ties_it_is_the_papers() -> None:
    power = torch.tensor([1.0, 4.0, 16.0, 64.0, 256.0])
    one = torch.ones(5)
    free = torch.arange(5)
    torch.testing.assert_close(
        activation_scale(power, one, free, 0.5, False), (power / 16).pow(0.25).double()
    )
    torch.testing.assert_close(
        activation_scale(one, power, free, 0.5, True), (power / 16).pow(-0.5).double()
    )
    assert bool((activation_scale(power, one * 0, free, 0.5, False) == 1).all())


@given(st.integers(0, 2**31), st.sampled_from([16, 64]))
def test_what_is_chosen_errs_less_than_no_scale(seed: int, columns: int) -> None:
    weights, moment = spread(columns, seed)
    found = choose_scale(weights, moment, torch.arange(columns), rounded)
    one = torch.ones(columns, dtype=torch.float64)
    plain = output_error(weights, moment, one, rounded)
    assert found is not None
    assert output_error(weights, moment, found[0], rounded) < plain


def test_levelling_finds_what_spread_the_columns() -> None:
    weights, moment = spread(64, 0)
    found = choose_scale(weights, moment, torch.arange(64), rounded)
    assert found is not None
    one = torch.ones(64, dtype=torch.float64)
    plain = output_error(weights, moment, one, rounded)
    assert output_error(weights, moment, found[0], rounded) < 0.8 * plain


def test_no_scale_is_chosen_where_none_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, moment = spread(32, 0)
    free = torch.arange(32)
    assert choose_scale(weights, moment, free, lambda rows, power: rows) is None


def test_a_scale_of_a_sample_must_gain_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, moment = spread(32, 0)
    seen = []

    def on_all_rows(gain: float) -> Any:
        def error(weights: list[Tensor], moment: Tensor, scale: Tensor, rounded: Any) -> float:
            seen.append(len(weights[0]))
            plain = bool((scale == 1).all())
            return 2.0 if plain else 1.0 if len(weights[0]) == 4 else 2.0 - gain

        return error

    monkeypatch.setattr(activation_scales, "_SAMPLED_ROWS", 4)
    for gain, kept in ((0.5, True), (0.0, False), (-1.0, False)):
        monkeypatch.setattr(activation_scales, "output_error", on_all_rows(gain))
        found = choose_scale(weights, moment, torch.arange(32), rounded)
        assert (found is not None) == kept
    assert set(seen) == {4, 40}


def test_the_error_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 32, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 32, generator=generator, dtype=torch.float64)
    scale = torch.rand(32, generator=generator, dtype=torch.float64) + 0.5
    got = output_error([weight], x.t() @ x, scale, lambda rows, power: rows.round())
    expected = (x @ weight.t() - (x / scale) @ (weight * scale).round().t()).square().sum()
    assert got == pytest.approx(float(expected), rel=1e-9)
