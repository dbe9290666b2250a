"""Which two of every four weights stay, and what the others become."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.errors import PassError
from fxopt.kernels import sparse24
from fxopt.kernels.sparse24 import is_sparse24
from fxopt.weights.sparsegpt import ChannelPower, mask24, masked24, prune24

_SEEDS = st.integers(0, 2**31)


def _mixed(count: int, channels: int, seed: int) -> Tensor:
    """Rows of correlated channels of very different sizes."""
    torch.manual_seed(seed)
    mixing = torch.randn(channels, channels) / channels**0.5 + torch.eye(channels)
    return torch.randn(count, channels) * torch.logspace(-1, 1, channels) @ mixing


def _error(weight: Tensor, pruned: Tensor, x: Tensor) -> Tensor:
    return ((weight.double() - pruned.double()) @ x.double().t()).square().sum(-1)


@given(_SEEDS, st.integers(1, 4), st.integers(1, 6))
def test_by_magnitude_the_error_is_the_least_there_is(seed: int, rows: int, groups: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(rows, 4 * groups)
    masked = masked24(weight)
    assert torch.equal(masked, weight * mask24(weight))
    dropped = (weight - masked).view(-1, 4).square().sum(-1)
    least = weight.view(-1, 4).square().sort(-1).values[:, :2].sum(-1)
    torch.testing.assert_close(dropped, least)


@given(_SEEDS, st.integers(1, 6))
def test_wanda_weighs_a_column_by_its_inputs(seed: int, groups: int) -> None:
    torch.manual_seed(seed)
    weight, norm = torch.randn(3, 4 * groups), torch.rand(4 * groups) * 10
    assert torch.equal(mask24(weight, norm), mask24(weight * norm))
    # Only the ratios within four count.
    assert torch.equal(mask24(weight, norm), mask24(weight, norm.double() * 1e30))


def test_a_channel_without_input_leaves_and_ties_go_by_magnitude() -> None:
    weight = torch.tensor([[9.0, 1.0, 2.0, 3.0], [1.0, 2.0, -3.0, 3.0]])
    one = mask24(weight, torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert one.tolist() == [[False, False, True, True], [False, False, True, True]]
    nothing = mask24(weight, torch.zeros(4))
    assert nothing.tolist() == [[True, False, False, True], [False, False, True, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_layouts_and_parts_give_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight, norm = torch.randn(9, 16).to(dtype), torch.rand(16)
    whole = masked24(weight, norm)
    assert whole.dtype == dtype
    assert whole.is_contiguous()
    monkeypatch.setattr(sparse24, "_CHUNK_ELEMENTS", 40)
    assert torch.equal(masked24(weight.t().contiguous().t(), norm), whole)


@given(_SEEDS, st.sampled_from([8, 132, 260]), st.sampled_from([20, 600]))
def test_feedback_makes_no_row_worse_than_wanda(seed: int, channels: int, count: int) -> None:
    x = _mixed(count, channels, seed)
    weight = torch.randn(5, channels)
    pruned = prune24(weight, x.t() @ x)
    assert is_sparse24(pruned)
    plain = masked24(weight, x.square().sum(0).sqrt())
    assert (_error(weight, pruned, x) <= _error(weight, plain, x) * 1.0001 + 1e-9).all()


def test_feedback_takes_most_of_the_error_where_channels_are_correlated() -> None:
    x = _mixed(1000, 256, 0)
    weight = torch.randn(64, 256)
    pruned = prune24(weight, x.t() @ x)
    plain = masked24(weight, x.square().sum(0).sqrt())
    assert _error(weight, pruned, x).sum() < 0.7 * _error(weight, plain, x).sum()


def test_feedback_is_the_definition_column_by_column() -> None:
    x = _mixed(400, 12, 3)
    weight = torch.randn(4, 12)
    moment = (x.t() @ x).double()
    moment /= moment.diagonal().mean()
    inverse = torch.linalg.inv(moment + 0.01 * torch.eye(12, dtype=torch.float64))
    upper = torch.linalg.cholesky(inverse, upper=True)
    left = weight.double().clone()
    for k in range(12):
        if k % 4 == 0:
            score = (left[:, k : k + 4] / upper.diagonal()[k : k + 4]).square()
            dropped = score.argsort(-1)[:, :2]
        error = left[:, k] * (dropped == k % 4).any(-1)
        left[:, k] -= error
        left[:, k + 1 :] -= (error / upper[k, k])[:, None] * upper[k, k + 1 :]
    pruned = prune24(weight, x.t() @ x).double()
    ours = _error(weight, pruned, x)
    plain = _error(weight, masked24(weight, x.square().sum(0).sqrt()), x)
    better = _error(weight, left, x) < plain
    assert better.sum() >= 3
    torch.testing.assert_close(pruned[better], left[better], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[~better], plain[~better])


def test_a_moment_that_is_none_is_an_error() -> None:
    with pytest.raises(PassError, match="second_moment holds NaN, infinity or a negative diagonal"):
        prune24(torch.randn(2, 4), torch.full((4, 4), float("nan")))


@given(_SEEDS, st.integers(1, 5))
def test_power_does_not_depend_on_how_rows_were_cut(seed: int, parts: int) -> None:
    torch.manual_seed(seed)
    rows = torch.randn(10, 3, 8)
    rows[4, 1, 2] = float("inf")
    power = ChannelPower()
    for part in rows.chunk(parts):
        power.update(part)
    finite = rows.view(-1, 8)[rows.view(-1, 8).isfinite().all(-1)]
    torch.testing.assert_close(power.power, finite.double().square().sum(0))
    assert (power.rows, power.count, power.is_constant) == (29, 29 * 8, False)
    zero = ChannelPower()
    assert (zero.count, zero.is_constant) == (0, False)
    zero.update(torch.zeros(2, 8))
    assert zero.is_constant
