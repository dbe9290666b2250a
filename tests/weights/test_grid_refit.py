"""Scales and zero points refitted to integers: the least squares of the outputs, row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.weights import grid_refit
from fxopt.weights.affine import affine_groups, dense_groups
from fxopt.weights.grid_refit import refitted_lines


def error(weight: Tensor, q: Tensor, scale: Tensor, zero: Tensor, moment: Tensor) -> Tensor:
    off = weight.double() - dense_groups(q, scale, zero)
    return ((off @ moment.double()) * off).sum(1)


def drawn(rows: int, columns: int, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight, and a normalised moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns, generator=generator)
    x = x @ torch.randn(columns, columns, generator=generator)
    moment = x.t() @ x
    return torch.randn(rows, columns, generator=generator), moment / moment.diagonal().mean()


@given(
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.sampled_from([4, 16, 32]),
    st.integers(1, 4),
    st.sampled_from([1, 40, 400]),
)
def test_refitted_numbers_err_no_more(
    seed: int, rows: int, group: int, groups: int, samples: int
) -> None:
    weight, moment = drawn(rows, group * groups, samples, seed)
    q, scale, zero = affine_groups(weight, group)
    new = refitted_lines(weight, q, scale, zero, moment)
    assert all(one.shape == scale.shape and one.dtype == torch.float32 for one in new)
    assert bool((new[0] > 0).all())
    assert bool(new[1].isfinite().all())
    kept = (new[0] == scale.float()).any(1)  # where a group keeps its numbers, the row isn't least
    before, after = error(weight, q, scale, zero, moment), error(weight, q, *new, moment)
    assert bool(((after <= before * (1 + 1e-6)) | kept).all())


def test_it_is_the_least_squares_fit() -> None:
    """Against `lstsq` on the inputs themselves, all groups of a row at once."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(400, 64, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(64, 64, generator=generator, dtype=torch.float64)
    moment = x.t() @ x
    moment /= moment.diagonal().mean()
    weight = torch.randn(5, 64, generator=generator)
    q, scale, zero = affine_groups(weight, 16)
    new = refitted_lines(weight, q, scale, zero, moment.float())
    for row in range(5):
        parts = torch.zeros(64, 8, dtype=torch.float64)
        for group in range(4):
            part = slice(16 * group, 16 * group + 16)
            parts[part, group] = q[row, part].double()
            parts[part, 4 + group] = 1.0
        solved = torch.linalg.lstsq(x @ parts, x @ weight[row].double()).solution
        torch.testing.assert_close(new[0][row].double(), solved[:4], rtol=2e-2, atol=1e-4)
        offset = -new[0][row] * new[1][row]
        torch.testing.assert_close(offset.double(), solved[4:], rtol=2e-2, atol=2e-3)


def test_rows_at_a_time_are_the_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = drawn(7, 64, 200, 0)
    rounded = affine_groups(weight, 16)
    whole = refitted_lines(weight, *rounded, moment)
    monkeypatch.setattr(grid_refit, "_CHUNK_ELEMENTS", 1)
    for one, other in zip(refitted_lines(weight, *rounded, moment), whole, strict=True):
        torch.testing.assert_close(one, other)


def test_integers_without_a_slope_keep_their_numbers() -> None:
    weight, moment = drawn(2, 32, 100, 1)
    q = torch.full((2, 32), 3, dtype=torch.int8)
    scale, zero = torch.full((2, 1), 0.5), torch.full((2, 1), 1.0)
    new = refitted_lines(weight, q, scale, zero, moment)
    assert bool(new[0].isfinite().all())
    assert bool((new[0] > 0).all())
