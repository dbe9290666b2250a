"""The histogram: what it counts, that the cut into batches doesn't matter, the ranges it picks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.errors import PassError
from fxopt.observation import Histogram

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
TAME = st.floats(-100.0, 100.0, width=32)


def filled(*values: Tensor, bins: int = 2048) -> Histogram:
    histogram = Histogram(bins)
    for value in values:
        histogram.update(value)
    return histogram


def state(histogram: Histogram) -> tuple[Any, ...]:
    counts = histogram._counts.tolist()
    return counts, histogram._first, histogram._exponent, histogram.low, histogram.high


@given(st.lists(FLOATS, min_size=1, max_size=40), st.integers(0, 40), st.sampled_from([2, 7, 64]))
def test_the_cut_into_batches_does_not_matter(values: list[float], cut: int, bins: int) -> None:
    whole = torch.tensor(values)
    # A library loaded before may have made the processor take denormals for zeros.
    whole[whole.abs() < torch.finfo(torch.float32).tiny] = 0.0
    assert state(filled(whole, bins=bins)) == state(filled(whole[:cut], whole[cut:], bins=bins))
    one_by_one = [entry.reshape(1) for entry in reversed(whole)]
    assert state(filled(whole, bins=bins)) == state(filled(*one_by_one, bins=bins))


@given(st.lists(FLOATS, min_size=1, max_size=40), st.sampled_from([2, 7, 64]))
def test_every_value_is_counted_in_its_bin_of_the_finest_grid_that_fits(
    values: list[float], bins: int
) -> None:
    histogram = filled(torch.tensor(values), bins=bins)
    exponent = histogram._exponent
    wanted = [0] * bins
    for value in values:
        wanted[math.floor(math.ldexp(value, -exponent)) - histogram._first] += 1
    tiny = 2.0 ** max(exponent - 126, -126)
    if all(abs(value) > tiny or value == 0.0 for value in values):
        assert histogram._counts.tolist() == wanted
    assert sum(histogram._counts.tolist()) == histogram.count == len(values)
    finer = [math.floor(math.ldexp(value, 1 - exponent)) for value in values]
    largest = math.frexp(max(map(abs, values)))[1]
    assert max(finer) - min(finer) >= bins or exponent in (-126, largest - 30)


def expected_error(values: Tensor, low: float, high: float, steps: int) -> float:
    """The sum that "mse" minimises, written out value by value."""
    inside = (values >= low) & (values <= high)
    rounding = int(inside.sum()) * ((high - low) / steps) ** 2 / 12
    return rounding + (values - values.clamp(low, high)).square().sum().item()


@given(
    st.lists(st.integers(-16, 15), max_size=60),
    st.integers(-6, 6),
    st.sampled_from([100, 3_000, 100_000, 3_000_000]),
)
def test_the_mse_range_is_the_best_of_all_ranges(bins: list[int], often: int, times: int) -> None:
    """Values at the centers of 32 bins, one of them `times` over, against every pair of edges."""
    values = torch.tensor([-16, 15, *bins]).double() / 4 + 0.125
    histogram = filled(values, torch.full((times,), often / 4 + 0.125), bins=32)
    assert (histogram._exponent, histogram._first) == (-2, -16)

    def error(low: float, high: float, steps: int) -> float:
        common = torch.tensor([often / 4 + 0.125]).double()
        return expected_error(values, low, high, steps) + times * expected_error(
            common, low, high, steps
        )

    edges = [-3.875, *(edge / 4 for edge in range(-15, 16)), 3.875]
    pairs = [(a, b) for a, b in itertools.product(edges, edges) if a <= 0 <= b and a < b]
    best = min(error(a, b, 255) for a, b in pairs)
    assert error(*histogram.range("mse"), 255) <= best * (1 + 1e-9)
    best = min(error(-top, top, 254) for top in edges if top > 0)
    assert error(*histogram.range("mse", symmetric=True), 254) <= best * (1 + 1e-9)


@given(st.integers(0, 2**16), st.floats(0.5, 4.0), st.floats(-3.0, 3.0))
def test_the_search_in_two_steps_finds_what_the_whole_search_finds(
    seed: int, tail: float, shift: float
) -> None:
    values = torch.randn(3000, generator=torch.Generator().manual_seed(seed)).double()
    values = values.sign() * values.abs() ** tail + shift
    histogram = filled(values, bins=512)
    low, high = histogram.range("mse")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxopt.observation.histogram._CANDIDATES", 10_000)
        whole = histogram.range("mse")
    assert expected_error(values, low, high, 255) <= 1.0001 * expected_error(values, *whole, 255)


@pytest.mark.parametrize("symmetric", [False, True])
def test_clipping_outliers_lowers_the_real_error(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200_000, generator=generator).double()
    values[:20] *= 6.0
    values = values + (0.0 if symmetric else 1.5)
    histogram = filled(values)

    def real_error(low: float, high: float) -> float:
        steps = 254 if symmetric else 255
        scale = (high - low) / steps
        zero = round(-low / scale)
        rounded = ((values / scale).round() + zero).clamp(0, steps)
        return ((rounded - zero) * scale - values).square().mean().item()

    ranges = {
        method: histogram.range(method, symmetric) for method in ("minmax", "percentile", "mse")
    }
    errors = {method: real_error(*found) for method, found in ranges.items()}
    assert errors["mse"] < 0.75 * errors["minmax"]
    assert errors["mse"] < 1.02 * errors["percentile"]
    for share in (0.5, 0.7, 0.9, 1.1, 1.3):
        low, high = (share * end for end in ranges["mse"])
        assert errors["mse"] < 1.01 * real_error(low, high)


@given(st.lists(TAME, min_size=1, max_size=60), st.floats(1.0, 100.0))
def test_the_percentile_range_holds_that_share_and_hardly_more(
    values: list[float], percentile: float
) -> None:
    whole = torch.tensor(values).double()
    histogram = filled(whole, bins=256)
    width = 2.0**histogram._exponent
    share = percentile / 100.0

    def inside(low: float, high: float) -> float:
        return ((whole >= low) & (whole <= high)).double().mean().item()

    low, high = histogram.range("percentile", percentile=percentile)
    assert low <= 0.0 <= high
    assert inside(low, high) >= share - 1e-9
    cut = (1.0 - share) / 2
    if high > 0.0:
        assert (whole >= high - 1.01 * width).double().mean().item() >= cut - 1e-9
    if low < 0.0:
        assert (whole <= low + 1.01 * width).double().mean().item() >= cut - 1e-9
    low, high = histogram.range("percentile", symmetric=True, percentile=percentile)
    assert low == -high
    assert inside(low, high) >= share - 1e-9
    narrower = high - 1.01 * width
    assert narrower <= 0.0 or inside(-narrower, narrower) <= share + 1e-9


@given(st.lists(FLOATS, min_size=1, max_size=30), st.booleans())
def test_every_range_lies_within_the_extremes_and_holds_zero(
    values: list[float], symmetric: bool
) -> None:
    histogram = filled(torch.tensor(values), bins=64)
    low, high = histogram.range("minmax")
    assert (low, high) == (min(*values, 0.0), max(*values, 0.0))
    assert (histogram.low, histogram.high) == (min(values), max(values))
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    for method in ("percentile", "mse"):
        found = histogram.range(method, symmetric)  # type: ignore[arg-type]
        assert low <= found[0] <= 0.0 <= found[1] <= high
        assert not symmetric or found[0] == -found[1]
        assert found[0] < found[1] or low == high


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([], (0.0, 0.0)),
        ([0.0, 0.0], (0.0, 0.0)),
        ([5.0, 5.0], (0.0, 5.0)),
        ([-3.0], (-3.0, 0.0)),
        ([1e-45, 1e-45], (0.0, 1.401298464324817e-45)),
        ([math.inf, 2.0, -math.inf], (0.0, 2.0)),
        ([math.inf], (0.0, 0.0)),
    ],
)
def test_extreme_values(method: Any, values: list[float], wanted: tuple[float, float]) -> None:
    histogram = filled(torch.tensor(values))
    assert histogram.range(method) == pytest.approx(wanted, rel=1e-6, abs=0.0)
    top = max(-wanted[0], wanted[1])
    assert histogram.range(method, symmetric=True) == pytest.approx((-top, top), rel=1e-6)


def test_what_is_constant_infinite_or_missing_is_known() -> None:
    assert filled(torch.full((3,), 7.0)).is_constant
    assert not filled(torch.tensor([1.0, 2.0])).is_constant
    assert not filled(torch.empty(0, 4)).is_constant
    assert filled(torch.tensor([math.inf, 1.0, -math.inf])).infinite == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8])
def test_any_real_dtype_and_layout(dtype: torch.dtype) -> None:
    value = torch.arange(-6, 6).reshape(3, 4).to(dtype)
    assert state(filled(value.t())) == state(filled(torch.arange(-6.0, 6.0)))


def test_a_chunk_is_a_cut_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = state(filled(values))
    monkeypatch.setattr("fxopt.observation.histogram._CHUNK", 7)
    assert state(filled(values)) == whole


def test_wrong_options_are_refused() -> None:
    with pytest.raises(PassError, match=r"^Histogram\(bins=1\): at least 2 bins are needed$"):
        Histogram(1)
    histogram = filled(torch.ones(2))
    with pytest.raises(PassError) as caught:
        histogram.range("entropy")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "range 'entropy' is unknown: use one of ('minmax', 'percentile', 'mse')"
    )
    with pytest.raises(PassError, match=r"^percentile=0.0: must lie in \(0, 100\]$"):
        histogram.range("percentile", percentile=0.0)
