"""Four bits in affine groups: no worse than the range of a group, exact on a grid, and no worse on
the inputs that they were fitted to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.claim import sqnr
from fxopt.errors import KernelError, PassError
from fxopt.weights import affine
from fxopt.weights.affine import AffineWeight, affine_groups


def dense(found: AffineWeight) -> Tensor:
    """What it stands for, [N, K] in float64."""
    rows, groups = found.scale.shape
    values = found.values.view(rows, groups, -1).double() - found.zero_point.double().unsqueeze(2)
    return (values * found.scale.double().unsqueeze(2)).view(rows, -1)


def by_range(weight: Tensor, group: int) -> Tensor:
    """Each group in 15 equal steps from its least to its largest value, in float64."""
    x = weight.double().view(len(weight), -1, group)
    low, high = x.amin(2, keepdim=True), x.amax(2, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-300)
    return (((x - low) / scale).round() * scale + low).view(weight.shape)


@given(
    st.integers(1, 5),
    st.sampled_from([2, 16, 32, 100]),
    st.integers(1, 4),
    st.sampled_from(["normal", "uniform", "outlier", "one-sided", "equal", "zeros"]),
    st.sampled_from([1e-42, 1e-30, 1e-6, 1.0, 1e6, 1e30]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_is_no_worse_than_the_range_of_each_group(
    rows: int, group: int, groups: int, kind: str, size: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, group * groups, generator=generator)
    if kind == "uniform":
        weight = torch.rand(weight.shape, generator=generator) - 0.5
    elif kind == "outlier":
        weight[:, 0] = 30.0
    elif kind == "one-sided":
        weight = weight.abs() + 3.0
    elif kind in ("equal", "zeros"):
        weight.fill_(0.3 if kind == "equal" else 0.0)
    weight = (weight * size).to(dtype)
    found = affine_groups(weight, group)
    assert found.values.dtype == torch.int8
    assert found.values.shape == weight.shape
    assert found.scale.shape == found.zero_point.shape == (rows, groups)
    assert found.scale.dtype == found.zero_point.dtype
    assert int(found.values.min()) >= -8
    assert int(found.values.max()) <= 7
    got, exact = dense(found), weight.double()
    assert bool(got.isfinite().all())
    error, least = (
        (one - exact).view(rows, groups, group).square().sum(2)
        for one in (got, by_range(weight, group))
    )
    # float16 holds scales and zero points to 11 bits, and float32 the smallest to fewer.
    rounding = (2e-3 * exact.view(rows, groups, group)).square().sum(2)
    assert bool((error <= 1.02 * least + rounding + group * (2e-44) ** 2).all())


def test_clipping_pays() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    gained = sqnr(weight, dense(affine_groups(weight, 32))) - sqnr(weight, by_range(weight, 32))
    assert gained > 0.9


def on_a_grid_of_sixteen(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A weight [16, 128], whose groups of 32 have sixteen values each, and which they are."""
    steps = torch.randint(0, 16, (16, 4, 32), generator=generator)
    steps[..., 0], steps[..., 1] = 0, 15
    scale = torch.rand(16, 4, 1, generator=generator).half().float()
    low = -scale * (4 + 8 * torch.rand(16, 4, 1, generator=generator))
    return (steps * scale + low).view(16, 128), steps.view(16, 128)


def test_a_grid_of_sixteen_comes_back() -> None:
    weight, steps = on_a_grid_of_sixteen(torch.Generator().manual_seed(0))
    found = affine_groups(weight, 32)
    assert torch.equal(found.values + 8, steps.to(torch.int8))
    assert sqnr(weight, dense(found)) > 60.0


def test_a_worse_search_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affine, "_STRETCHED", (6.0,))
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    assert sqnr(weight, dense(affine_groups(weight, 32))) < sqnr(weight, by_range(weight, 32))


def test_what_integers_cannot_express_names_its_row() -> None:
    weight = torch.ones(4, 32)
    weight[2, 5] = float("nan")
    with pytest.raises(KernelError, match="affine_groups: output channel 2 holds NaN or infinity"):
        affine_groups(weight, 32)


FITTINGS: tuple[Any, ...] = ("nearest", "weighted", "gptq")


def outputs_error(weight: Tensor, found: AffineWeight, moment: Tensor) -> Tensor:
    """(w - w') H (w - w')ᵀ of each row, in float64."""
    off = weight.double() - dense(found)
    return ((off @ moment.double()) * off).sum(1)


def correlated(samples: int, columns: int, generator: torch.Generator) -> Tensor:
    """Inputs [samples, columns] that are correlated and of unequal size, as activations are."""
    x = torch.randn(samples, columns, generator=generator)
    x = x @ torch.randn(columns, columns, generator=generator) / columns**0.5
    return x * torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]


@st.composite
def fitted(draw: st.DrawFn) -> tuple[Tensor, int, Tensor]:
    """A weight, a group, and the second moment of inputs drawn with it."""
    group = draw(st.sampled_from([2, 16, 32]))
    columns = group * draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(draw(st.sampled_from([1, 2, 9])), columns, generator=generator)
    kind = draw(st.sampled_from(["plain", "equal", "outlier", "zeros", "tiny", "huge", "wide"]))
    if kind == "equal":
        weight.fill_(-0.3)
    elif kind == "outlier":
        weight[0, -1] = 1e4
    elif kind in ("zeros", "tiny", "huge"):
        weight[::2] *= {"zeros": 0.0, "tiny": 1e-42, "huge": 3e37}[kind]
    elif kind == "wide":
        weight *= torch.logspace(-4, 4, columns)
    x = correlated(draw(st.sampled_from([1, columns // 2 + 1, 3 * columns])), columns, generator)
    if draw(st.booleans()):
        x[:, ::3] = 0.0
    return weight, group, x.t() @ x * draw(st.sampled_from([1.0, 1e-30, 1e20]))


@given(fitted(), st.sampled_from(["weighted", "gptq"]))
def test_no_row_errs_more_on_its_inputs_than_the_nearest(drawn: Any, method: Any) -> None:
    weight, group, moment = drawn
    before = weight.clone(), moment.clone()
    nearest = affine_groups(weight, group)
    found = affine_groups(weight, group, method, moment)
    assert torch.equal(weight, before[0])
    assert torch.equal(moment, before[1])
    assert [t.shape for t in found] == [t.shape for t in nearest]
    assert found.scale.dtype == found.zero_point.dtype
    assert all(bool(t.isfinite().all()) for t in found)
    assert int(found.values.min()) >= -8
    assert int(found.values.max()) <= 7
    assert bool((found.scale > 0).all())
    worse = outputs_error(weight, found, moment) - outputs_error(weight, nearest, moment)
    # What the moment's own rounding to float32 in other units can hide.
    magnitude = (weight.double() - dense(nearest)).abs()
    hidden = ((magnitude @ moment.double().abs()) * magnitude).sum(1)
    assert bool((worse <= 1e-6 * hidden).all()), (worse / hidden).max()


def test_each_step_from_the_nearest_to_feedback_pays() -> None:
    generator = torch.Generator().manual_seed(0)
    x = correlated(2000, 256, generator)
    weight = torch.randn(48, 256, generator=generator)
    weight *= torch.randn(256, generator=generator).mul(0.3).exp()
    moment = x.t() @ x
    errors = {
        method: float(
            outputs_error(weight, affine_groups(weight, 32, method, moment), moment).sum()
        )
        for method in ("nearest", "weighted", "gptq")
    }
    assert errors["weighted"] < 0.75 * errors["nearest"]
    assert errors["gptq"] < 0.5 * errors["weighted"]


def test_numbers_refitted_to_their_integers_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = correlated(2000, 256, generator)
    weight, moment = torch.randn(48, 256, generator=generator), x.t() @ x
    refitted = outputs_error(weight, affine_groups(weight, 32, "gptq", moment), moment).sum()
    monkeypatch.setattr(
        affine,
        "refitted_lines",
        lambda weight, q, scale, zero, moment: (scale.float(), zero.float()),
    )
    plain = outputs_error(weight, affine_groups(weight, 32, "gptq", moment), moment).sum()
    assert refitted < 0.97 * plain


def test_feedback_that_comes_back_to_other_places_would_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No row can be worse than the nearest, so what is broken shows in what it no longer gains."""
    generator = torch.Generator().manual_seed(0)
    x = correlated(2000, 128, generator)
    weight, moment = torch.randn(48, 128, generator=generator), x.t() @ x
    right = outputs_error(weight, affine_groups(weight, 32, "gptq", moment), moment).sum()
    plain = affine.settle_in_order

    def misplaced(weight: Tensor, moment: Tensor, damping: float, settle: Any, order: bool) -> None:
        plain(weight, moment, damping, lambda k, left: settle((k + 1) % 128, left), order)

    monkeypatch.setattr(affine, "settle_in_order", misplaced)
    wrong = outputs_error(weight, affine_groups(weight, 32, "gptq", moment), moment).sum()
    assert wrong > 1.5 * right


@pytest.mark.parametrize("method", ["weighted", "gptq", "hqq"])
def test_a_grid_of_sixteen_is_kept_by_every_method(method: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, _ = on_a_grid_of_sixteen(generator)
    x = correlated(500, 128, generator)
    found = affine_groups(weight, 32, method, x.t() @ x)
    assert sqnr(weight, dense(found)) > 58.0


def test_without_any_input_weighted_groups_are_the_nearest() -> None:
    weight = torch.randn(5, 64)
    for method in ("weighted", "gptq"):
        found = affine_groups(weight, 32, method, torch.zeros(64, 64))
        for one, other in zip(found, affine_groups(weight, 32), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["nearest", "hqq", "weighted", "gptq"])
def test_rows_at_a_time_are_the_rows_at_once(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(9, 64, generator=generator), correlated(200, 64, generator)
    whole = affine_groups(weight, 16, method, x.t() @ x)
    monkeypatch.setattr(affine, "_CHUNK_ELEMENTS", 100)
    for one, other in zip(affine_groups(weight, 16, method, x.t() @ x), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("method", ["nearest", "hqq", "weighted", "gptq"])
@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0, 0)])
def test_empty_weights(method: Any, shape: tuple[int, int]) -> None:
    found = affine_groups(torch.zeros(shape), 32, method, torch.zeros(shape[1], shape[1]))
    assert [tuple(t.shape) for t in found] == [shape, *[(shape[0], shape[1] // 32)] * 2]


def test_a_moment_that_is_none_is_refused() -> None:
    weight = torch.randn(3, 32)
    for method in ("weighted", "gptq"):
        with pytest.raises(PassError, match="holds NaN, infinity or a negative diagonal"):
            affine_groups(weight, 32, method, -torch.eye(32))
        with pytest.raises(
            PassError, match=r"needs second_moment, float \[32, 32\].*given was none"
        ):
            affine_groups(weight, 32, method)
