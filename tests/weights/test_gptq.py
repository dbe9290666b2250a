"""Rounded weights: nearest is nearest, and error feedback is never worse on the inputs it saw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.errors import KernelError, PassError
from fxopt.kernels import quantize_weight
from fxopt.weights import gptq
from fxopt.weights.gptq import quantize_rows


def dense(q: Tensor, scale: Tensor) -> Tensor:
    rows, groups = scale.shape
    return (q.double().reshape(rows, groups, -1) * scale.double()[:, :, None]).reshape(q.shape)


def errors(weight: Tensor, rounded: tuple[Tensor, Tensor], moment: Tensor) -> Tensor:
    """(w - qs) H (w - qs)ᵀ of each row, in float64."""
    off = weight.double() - dense(*rounded)
    return ((off @ moment.double()) * off).sum(-1)


def matrix(draw: st.DrawFn, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    weight = torch.randn(rows, columns, generator=generator)
    kind = draw(st.sampled_from(["plain", "equal", "outlier", "zeros", "denormal", "huge", "wide"]))
    if kind == "equal":
        weight = torch.full_like(weight, -0.3)
    elif kind == "outlier":
        weight[0, -1] = 1e4
    elif kind in ("zeros", "denormal", "huge"):
        weight[::2] *= {"zeros": 0.0, "denormal": 1e-42, "huge": 3e37}[kind]
    elif kind == "wide":
        weight *= torch.logspace(-6, 6, columns)
    return weight


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, dict[str, Any], Tensor]:
    """A weight, options, and the second moment of inputs drawn with it."""
    group = draw(st.sampled_from([None, 1, 2, 16, 32, 160]))
    columns = (group or draw(st.sampled_from([1, 7, 33, 130, 300]))) * draw(st.sampled_from([1, 2]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = matrix(draw, draw(st.sampled_from([1, 2, 9])), columns, generator)
    samples = draw(st.sampled_from([1, columns // 2 + 1, 3 * columns]))
    x = torch.randn(samples, columns, generator=generator)
    x = x @ torch.randn(columns, columns, generator=generator)
    if draw(st.booleans()):
        x[:, ::3] = 0.0  # channels that the calibration never reached
    if draw(st.booleans()):
        x *= torch.logspace(-3, 2, columns)
    moment = x.t() @ x * draw(st.sampled_from([1.0, 1e-30, 1e20]))
    options = {"bits": draw(st.sampled_from([8, 4, 3])), "group": group}
    return weight, options, moment


@given(cases())
def test_nearest_is_within_half_a_step(drawn: Any) -> None:
    weight, options, _ = drawn
    q, scale = quantize_rows(weight, **options)
    largest = 2 ** (options["bits"] - 1) - 1
    groups = weight.shape[1] // options["group"] if options["group"] else 1
    assert q.dtype == torch.int8
    assert q.is_contiguous()
    assert scale.shape == (weight.shape[0], groups)
    assert int(q.abs().max()) <= largest
    step = scale.double().repeat_interleave(weight.shape[1] // groups, 1)
    assert bool(((weight.double() - dense(q, scale)).abs() <= step * (0.5 + 1e-4)).all())
    peaks = q.view(weight.shape[0], groups, -1).abs().amax(-1)
    assert bool(((peaks == largest) | (scale <= 1e-37)).all()), "the range isn't used"


@given(cases())
def test_one_group_as_wide_as_the_row_is_no_group(drawn: Any) -> None:
    weight, options, _ = drawn
    one = quantize_rows(weight, bits=options["bits"], group=weight.shape[1])
    for a, b in zip(one, quantize_rows(weight, bits=options["bits"]), strict=True):
        assert torch.equal(a, b)


@given(cases(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_eight_bits_a_row_are_those_of_the_kernels(drawn: Any, dtype: torch.dtype) -> None:
    weight = drawn[0].to(dtype)
    for a, b in zip(quantize_rows(weight), quantize_weight(weight), strict=True):
        assert torch.equal(a, b)


@given(cases(), st.booleans())
def test_feedback_is_never_worse_than_nearest(drawn: Any, order: bool) -> None:
    weight, options, moment = drawn
    before = weight.clone()
    given_moment = moment.clone()
    nearest = quantize_rows(weight, **options)
    rounded = quantize_rows(weight, **options, method="gptq", second_moment=moment, order=order)
    assert torch.equal(weight, before)
    assert torch.equal(moment, given_moment)
    assert [t.shape for t in rounded] == [t.shape for t in nearest]
    assert bool(rounded[1].isfinite().all())
    assert int(rounded[0].abs().max()) <= 2 ** (options["bits"] - 1) - 1
    worse = errors(weight, rounded, moment) - errors(weight, nearest, moment)
    # What the moment's own rounding to float32 in other units can hide.
    magnitude = (weight.double() - dense(*nearest)).abs()
    hidden = ((magnitude @ moment.double().abs()) * magnitude).sum(-1)
    assert bool((worse <= 1e-6 * hidden).all()), (worse / hidden).max()


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("rows", [1, 20])
def test_rows_that_feedback_serves_badly_stay_nearest(rows: int, group: int | None) -> None:
    # Where inputs are all but uncorrelated, feedback loses to chance in a tenth of the rows.
    generator = torch.Generator().manual_seed(0)
    kept = 0
    for _ in range(40 // rows + 5):
        x = torch.randn(4000, 64, generator=generator)
        weight, moment = torch.randn(rows, 64, generator=generator), x.t() @ x
        nearest = quantize_rows(weight, bits=4, group=group)
        rounded = quantize_rows(weight, bits=4, group=group, method="gptq", second_moment=moment)
        before, after = (errors(weight, pair, moment) for pair in (nearest, rounded))
        assert bool((after <= before * (1 + 1e-9)).all())
        kept += int((rounded[0] == nearest[0]).all(-1).sum())
    assert kept > 0


@given(cases(), st.booleans())
def test_feedback_of_a_weight_on_the_grid_changes_nothing(drawn: Any, order: bool) -> None:
    weight, options, moment = drawn
    q, scale = quantize_rows(weight, **options)
    on_grid = dense(q, scale).float()
    q, scale = quantize_rows(on_grid, **options)
    again = quantize_rows(on_grid, **options, method="gptq", second_moment=moment, order=order)
    assert torch.equal(again[0], q)
    assert torch.equal(again[1], scale)


@pytest.mark.parametrize("group", [None, 32, 256])
@pytest.mark.parametrize("order", [False, True])
def test_feedback_pays_on_correlated_inputs(group: int | None, order: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(256, 256, generator=generator) / 16
    x = torch.randn(2000, 256, generator=generator) @ mixing
    weight = torch.randn(48, 256, generator=generator)
    moment = x.t() @ x
    nearest = quantize_rows(weight, bits=4, group=group)
    rounded = quantize_rows(
        weight, bits=4, group=group, method="gptq", second_moment=moment, order=order
    )
    ratio = errors(weight, rounded, moment).sum() / errors(weight, nearest, moment).sum()
    assert ratio < 0.65


def test_feedback_is_that_of_the_papers_algorithm() -> None:
    """Against the textbook form: no blocks, inverse of the Hessian first, all in float64."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 300, generator=generator) @ torch.randn(300, 300, generator=generator)
    weight, moment = torch.randn(6, 300, generator=generator), x.t() @ x
    q, scale = quantize_rows(weight, bits=4, method="gptq", second_moment=moment)
    hessian = moment.double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, expected = weight.double(), torch.zeros(6, 300)
    for k in range(300):
        expected[:, k] = (left[:, k] / scale[:, 0].double()).round().clamp(-7, 7)
        error = (left[:, k] - expected[:, k] * scale[:, 0].double()) / upper[k, k]
        left -= error[:, None] * upper[k].clone().index_fill(0, torch.arange(k), 0.0)
    assert (q == expected).double().mean() > 0.98  # ties fall either way in float32


def test_ordered_columns_come_back_to_their_places() -> None:
    # Uncorrelated inputs give no feedback, so the order of rounding can't be seen.
    weight = torch.randn(5, 64)
    moment = torch.diag(torch.rand(64) + 0.1)
    nearest = quantize_rows(weight, bits=4, group=16)
    for order in (False, True):
        again = quantize_rows(
            weight, bits=4, group=16, method="gptq", second_moment=moment, order=order
        )
        assert torch.equal(again[0], nearest[0])


def test_a_moment_of_no_input_at_all_rounds_to_the_nearest() -> None:
    weight = torch.randn(5, 16)
    rounded = quantize_rows(weight, method="gptq", second_moment=torch.zeros(16, 16))
    assert all(torch.equal(a, b) for a, b in zip(rounded, quantize_weight(weight), strict=True))


def test_float64_and_more_damping_save_a_moment_that_float32_calls_indefinite() -> None:
    weight, x = torch.randn(4, 40), torch.randn(3, 40)
    moment = x.t() @ x
    moment[0, 1] += 0.05 * moment.diagonal().mean()
    moment[1, 0] = moment[0, 1]
    rounded = quantize_rows(weight, bits=4, method="gptq", second_moment=moment, damping=0.0)
    nearest = quantize_rows(weight, bits=4)
    gain = errors(weight, nearest, moment) - errors(weight, rounded, moment)
    assert bool((gain >= -1e-6).all())


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_empty_weights(shape: tuple[int, int], method: Any) -> None:
    moment = torch.zeros(shape[1], shape[1])
    for bits in (4, 8):
        q, scale = quantize_rows(torch.zeros(shape), bits=bits, method=method, second_moment=moment)
        assert q.shape == shape
        assert scale.shape == (shape[0], 1)


def test_rows_at_a_time_are_the_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(9, 64), torch.randn(90, 64)
    options: dict[str, Any] = {"bits": 4, "group": 16}
    feedback = {"method": "gptq", "second_moment": x.t() @ x}
    whole = [quantize_rows(weight, **options), quantize_rows(weight, **options, **feedback)]
    monkeypatch.setattr(gptq, "_CHUNK_ELEMENTS", 130)
    parts = [quantize_rows(weight, **options), quantize_rows(weight, **options, **feedback)]
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("group", [None, 4])
def test_a_weight_that_is_not_finite_is_refused_by_row(bad: float, group: int | None) -> None:
    weight = torch.randn(5, 8)
    weight[3, 6] = bad
    with pytest.raises(KernelError, match="output channel 3 holds NaN or infinity; integers"):
        quantize_rows(weight, bits=4, group=group)


def test_wrong_options_say_what_to_give() -> None:
    weight, eye = torch.randn(4, 96), torch.eye(96)
    with pytest.raises(PassError, match=r"of 96 columns can't be cut into groups of 64; give a di"):
        quantize_rows(weight, group=64)
    with pytest.raises(PassError, match=r"give a divisor of 96 \(32, 16\), or None"):
        quantize_rows(weight, group=64)
    with pytest.raises(PassError, match=r"give 2 to 8 bits"):
        quantize_rows(weight, bits=1)
    with pytest.raises(PassError, match=r"give one of \('nearest', 'gptq'\)"):
        quantize_rows(weight, method="awq")  # type: ignore[arg-type]
    with pytest.raises(PassError, match=r"needs second_moment, float \[96, 96\].*; given was none"):
        quantize_rows(weight, method="gptq")
    with pytest.raises(PassError, match=r"given was torch.float32 of \(4, 96\)"):
        quantize_rows(weight, method="gptq", second_moment=weight)
    with pytest.raises(PassError, match=r"damping=2.0\): give a share between 0 and 1"):
        quantize_rows(weight, damping=2.0)
    with pytest.raises(PassError, match=r"holds NaN, infinity or a negative diagonal"):
        quantize_rows(weight, method="gptq", second_moment=-eye)
    with pytest.raises(PassError, match=r"holds NaN, infinity or a negative diagonal"):
        quantize_rows(weight, method="gptq", second_moment=eye / 0)
    with pytest.raises(PassError, match=r"stays indefinite with 1 of its mean diagonal added, so"):
        quantize_rows(weight, method="gptq", second_moment=5 - 4 * eye)
    with pytest.raises(KernelError, match=r"needs a float matrix, not torch.float32 of \(4,\)"):
        quantize_rows(weight[:, 0])
