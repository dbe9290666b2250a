"""Observers: each summary against all values at once, however the stream is cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.errors import PassError
from fxopt.observation import ChannelMagnitude, ChannelRange, MinMax, Rows, SecondMoment


def draw(rows: int, seed: int, channels: int = 3) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))


def fed(observer: Any, *values: Tensor) -> Any:
    for value in values:
        observer.update(value)
    return observer


CUTS = st.tuples(st.integers(1, 60), st.integers(0, 60), st.integers(0, 2**16))


@given(CUTS)
def test_summaries_are_those_of_all_values_at_once(drawn: tuple[int, int, int]) -> None:
    count, cut, seed = drawn
    whole = draw(count, seed)
    parts = whole[:cut], whole[cut:]
    extremes = fed(MinMax(), *parts)
    assert (extremes.low, extremes.high) == (whole.min().item(), whole.max().item())
    assert extremes.count == whole.numel()
    assert torch.equal(fed(ChannelMagnitude(), *parts).largest, whole.abs().amax(0))
    seen = fed(ChannelRange(), *parts)
    assert torch.equal(seen.low, whole.amin(0))
    assert torch.equal(seen.high, whole.amax(0))
    moment = fed(SecondMoment(), *parts)
    assert moment.rows == count
    torch.testing.assert_close(moment.matrix, whole.t() @ whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(fed(Rows(limit=7), *parts).rows, fed(Rows(limit=7), *whole.split(1)).rows)


@given(st.integers(1, 400), st.integers(1, 40))
def test_rows_are_an_evenly_spread_sample_in_order(count: int, limit: int) -> None:
    index = torch.arange(count)
    sample = fed(Rows(limit), *index[:, None].float().split(13))
    assert sample.seen == count
    kept = sample.rows[:, 0].long().tolist()
    assert len(kept) == min(count, limit)
    assert kept == sorted(set(kept))
    gaps = [b - a for a, b in zip([-1, *kept], [*kept, count], strict=True)]
    assert max(gaps) <= 3 * count / len(kept) + 1


@pytest.mark.parametrize("period", [2, 16, 100, 128, 512])
def test_no_period_of_the_stream_aligns_with_the_sample(period: int) -> None:
    """Sentences of 128 tokens must not give 512 first tokens."""
    position = torch.arange(512 * 128) % period
    kept = fed(Rows(), *position[:, None].float().split(1024)).rows[:, 0]
    assert len(kept.unique()) >= 0.4 * period
    assert abs(kept.mean().item() / ((period - 1) / 2) - 1) < 0.1


@pytest.mark.parametrize(
    ("make", "summary"),
    [
        (MinMax, lambda observer: (observer.low, observer.high)),
        (ChannelMagnitude, lambda observer: observer.largest.tolist()),
        (SecondMoment, lambda observer: observer.matrix.tolist()),
        (Rows, lambda observer: observer.rows.tolist()),
    ],
)
class TestEachObserver:
    def test_any_rank_and_half_precision(
        self, make: Callable[[], Any], summary: Callable[[Any], Any]
    ) -> None:
        value = (torch.arange(24) % 7 - 3.0).reshape(2, 3, 4)
        flat = summary(fed(make(), value.reshape(6, 4)))
        assert summary(fed(make(), value)) == flat
        assert summary(fed(make(), value[None].bfloat16())) == flat
        assert summary(fed(make(), value.mT.contiguous().mT)) == flat

    def test_infinite_and_empty_values_enter_nothing(
        self, make: Callable[[], Any], summary: Callable[[Any], Any]
    ) -> None:
        good = torch.tensor([[1.0, -2.0]])
        bad = torch.tensor([[math.inf, -math.inf]])
        observer = fed(make(), torch.empty(0, 2), bad)
        assert not observer.is_constant or make is ChannelMagnitude
        assert summary(fed(make(), torch.empty(0, 2), bad, good, bad)) == summary(fed(make(), good))

    def test_what_is_constant_is_known(
        self, make: Callable[[], Any], summary: Callable[[Any], Any]
    ) -> None:
        assert make().count == 0
        assert not make().is_constant
        assert fed(make(), torch.zeros(2, 3), torch.zeros(1, 3)).is_constant
        assert not fed(make(), torch.zeros(2, 3), torch.eye(3)).is_constant

    def test_the_value_is_neither_kept_nor_changed(
        self, make: Callable[[], Any], summary: Callable[[Any], Any]
    ) -> None:
        value = draw(5, 0)
        before = value.clone()
        observer = fed(make(), value)
        kept = summary(observer)
        assert torch.equal(value, before)
        value.fill_(9.0)
        assert summary(observer) == kept


def test_a_sample_of_nothing_is_refused() -> None:
    with pytest.raises(PassError, match=r"^Rows\(limit=0\): at least 1 row must be kept$"):
        Rows(0)
