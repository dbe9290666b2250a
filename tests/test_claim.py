"""Every claim catches every planted fault, and holds where nothing is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.claim import Claim, Close, Exact, Sqnr, sqnr
from fxopt.errors import PassError

CLAIMS: list[Claim] = [Exact(), Close(), Close(rtol=1e-2), Sqnr(20.0), Sqnr(40.0)]
_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def _with_entry(value: float) -> Callable[[Tensor], Tensor]:
    def plant(out: Tensor) -> Tensor:
        planted = out.clone()
        planted.view(-1)[3] = value
        return planted

    return plant


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda out: out * 1.25,
    "bias dropped": lambda out: out - torch.linspace(0.5, 1.5, out.shape[-1]).to(out.dtype),
    "channels swapped": lambda out: out[..., [1, 0, *range(2, out.shape[-1])]],
    "sign flipped": torch.neg,
    "rows rolled": lambda out: out.roll(1, 0),
    "NaN": _with_entry(math.nan),
    "zeros": torch.zeros_like,
    "infinity": _with_entry(math.inf),
    "negative infinity": _with_entry(-math.inf),
    "transposed": lambda out: out.mT.contiguous(),
    "another dtype": lambda out: out.to(
        torch.float32 if out.dtype == torch.float64 else torch.float64
    ),
    "a row left out": lambda out: out[:-1],
    "constant": lambda out: torch.full_like(out, float(out.float().mean())),
}


def _output(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 6, generator=generator).add(0.5).to(dtype)


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_planted_fault_is_caught(claim: Claim, fault: str, dtype: torch.dtype) -> None:
    reference = _output(dtype=dtype)
    assert not claim.measure(reference, FAULTS[fault](reference)).holds


@given(
    fault=st.sampled_from(sorted(FAULTS)), seed=st.integers(0, 2**31), claim=st.sampled_from(CLAIMS)
)
def test_planted_fault_is_caught_whatever_the_values(fault: str, seed: int, claim: Claim) -> None:
    reference = _output(seed)
    assert not claim.measure(reference, FAULTS[fault](reference)).holds


@given(seed=st.integers(0, 2**31), exponent=st.integers(-30, 30), claim=st.sampled_from(CLAIMS))
def test_equal_outputs_hold_at_every_scale(seed: int, exponent: int, claim: Claim) -> None:
    reference = _output(seed) * 2.0**exponent
    assert claim.measure(reference, reference.clone()).holds


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_nan_never_passes_even_where_the_original_has_it(claim: Claim) -> None:
    reference = _with_entry(math.nan)(_output())
    measured = claim.measure(reference, reference.clone())
    assert not measured.holds
    assert measured.text == "1 of 36 entries are NaN, and so has the original"


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_the_same_infinity_at_the_same_place_passes(claim: Claim) -> None:
    reference = _with_entry(-math.inf)(_output())
    assert claim.measure(reference, reference.clone()).holds
    assert not claim.measure(reference, _with_entry(math.inf)(reference)).holds


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_a_finite_value_where_the_original_is_infinite_is_caught(claim: Claim) -> None:
    reference = _with_entry(-math.inf)(_output())
    assert not claim.measure(reference, _output()).holds


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_fault_hidden_behind_a_legitimate_infinity_is_caught(claim: Claim) -> None:
    reference = _with_entry(-math.inf)(_output())
    assert not claim.measure(reference, reference * 1.25).holds


@pytest.mark.parametrize("claim", [Exact(), Close()], ids=str)
def test_integers_must_be_equal(claim: Claim) -> None:
    reference = torch.arange(10)
    assert claim.measure(reference, reference.clone()).holds
    assert not claim.measure(reference, reference + (reference == 9)).holds


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_large_integers_that_differ_by_one_are_caught(claim: Claim) -> None:
    reference = torch.full((4,), 2**60)
    assert not claim.measure(reference, reference + 1).holds


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_booleans_flipped_are_caught(claim: Claim) -> None:
    reference = torch.tensor([True, False, True, True])
    assert claim.measure(reference, reference.clone()).holds
    assert not claim.measure(reference, ~reference).holds


def test_sqnr_of_integers_counts_the_share_of_equal_entries() -> None:
    reference = torch.arange(1000)
    flipped = reference.clone()
    flipped[:50] += 1
    measured = Sqnr(20.0).measure(reference, flipped)
    assert measured.holds
    assert measured.text == "0.9500 of integer entries equal (needs 0.9000)"
    assert not Sqnr(40.0).measure(reference, flipped).holds


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_empty_and_scalar_outputs(claim: Claim) -> None:
    empty = torch.zeros(0, 4)
    assert claim.measure(empty, empty.clone()).holds
    assert claim.measure(torch.tensor(2.0), torch.tensor(2.0)).holds
    assert not claim.measure(torch.tensor(2.0), torch.tensor(3.0)).holds


@pytest.mark.parametrize("claim", [Close(), Sqnr(20.0)], ids=str)
def test_a_reference_of_zeros_admits_no_noise(claim: Claim) -> None:
    zeros = torch.zeros(4)
    assert claim.measure(zeros, zeros.clone()).holds
    assert not claim.measure(zeros, torch.full((4,), 0.01)).holds


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_complex_outputs_are_judged(claim: Claim) -> None:
    reference = torch.complex(_output(0), _output(1))
    assert claim.measure(reference, reference.clone()).holds
    assert not claim.measure(reference, reference.conj().resolve_conj()).holds
    assert claim.measure(reference, reference * (1 + 1e-6)).holds != (claim == Exact())


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_close_admits_the_rounding_of_a_reordered_sum(dtype: torch.dtype) -> None:
    x, w = _output(0, dtype), _output(1, dtype)
    forward, backward = x @ w, x.flip(1) @ w.flip(0)
    assert Close().measure(forward, backward).holds


def _whole(value: Tensor) -> Tensor:
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _sqnr_at_once(reference: Tensor, output: Tensor) -> float:
    """The definition, on wide copies of both."""
    ref, out = _whole(reference), _whole(output)
    same = (ref == out) & ref.isinf()
    ref, out = ref.masked_fill(same, 0.0), out.masked_fill(same, 0.0)
    noise, signal = ((t.abs() ** 2).sum().item() for t in (out - ref, ref))
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal else -math.inf


def _error_at_once(reference: Tensor, output: Tensor) -> float:
    """max|out - ref| / max|ref|, of the finite magnitudes, by its definition."""
    ref, out = _whole(reference), _whole(output)
    error = (out - ref).abs().masked_fill(ref == out, 0.0).max().item()
    magnitudes = ref.abs()
    finite = magnitudes[magnitudes.isfinite()]
    scale = finite.max().item() if len(finite) else 0.0
    return error / scale if scale else (0.0 if error == 0.0 else math.inf)


SPECIAL = [0.0, 1.0, -1.0, 250.0, 1e-40, math.inf, -math.inf, math.nan]


@given(
    data=st.data(),
    rows=st.integers(1, 5),
    columns=st.integers(1, 9),
    dtype=st.sampled_from([*_DTYPES, torch.complex64]),
    turned=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_measured_in_pieces_is_the_same_number(
    data: st.DataObject, rows: int, columns: int, dtype: torch.dtype, turned: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference, noise = (
        torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    output = reference + noise * 10.0 ** data.draw(st.integers(-5, 1))
    entries = st.integers(0, reference.numel() - 1)
    planted = st.tuples(entries, st.sampled_from(SPECIAL), st.sampled_from(["one", "both"]))
    for entry, value, where in data.draw(st.lists(planted, max_size=4)):
        output.view(-1)[entry] = value
        if where == "both":
            reference.view(-1)[entry] = value
    reference, output = (t.t() if turned else t for t in (reference.to(dtype), output.to(dtype)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxopt.parts._CACHED_ELEMENTS", data.draw(st.integers(1, 50)))
        found, close = sqnr(reference, output), Close().measure(reference, output)
    assert found == pytest.approx(_sqnr_at_once(reference, output), rel=1e-12, abs=1e-12)
    unfit = output.isnan() | (output.isinf() & (output != reference))
    wanted = math.inf if bool(unfit.any()) else _error_at_once(reference, output)
    assert close.value == (math.inf if math.isnan(wanted) else wanted)


def test_a_sum_that_overflows_is_no_fault() -> None:
    reference = torch.full((40,), torch.finfo(torch.float16).max, dtype=torch.float16)
    assert Exact().measure(reference, reference.clone()).holds
    assert Sqnr(20.0).measure(reference, reference.clone()).value == math.inf


def test_sqnr_of_infinite_noise_is_minus_infinity() -> None:
    assert sqnr(_output(), _with_entry(math.inf)(_output())) == -math.inf
    assert sqnr(_output(), _with_entry(math.nan)(_output())) == -math.inf
    assert sqnr(torch.zeros(3), torch.ones(3)) == -math.inf


def test_exact_sees_the_last_bit() -> None:
    reference = _output()
    neighbour = torch.nextafter(reference, torch.tensor(math.inf))
    assert not Exact().measure(reference, neighbour).holds
    assert Close().measure(reference, neighbour).holds


@given(decibels=st.floats(1.0, 100.0), seed=st.integers(0, 2**31))
def test_sqnr_measures_noise_of_known_power(decibels: float, seed: int) -> None:
    reference = _output(seed, torch.float64)
    noise = _output(seed + 1, torch.float64)
    noise *= reference.norm() / noise.norm() * 10.0 ** (-decibels / 20.0)
    assert sqnr(reference, reference + noise) == pytest.approx(decibels, abs=1e-3)


@given(factor=st.floats(0.5, 2.0), seed=st.integers(0, 2**31))
def test_close_is_relative_to_the_tensor_and_its_value_is_the_error(
    factor: float, seed: int
) -> None:
    assume(abs(abs(factor - 1.0) - 0.1) > 1e-6)
    reference = _output(seed, torch.float64)
    measured = Close(rtol=0.1).measure(reference, reference * factor)
    assert measured.value == pytest.approx(abs(factor - 1.0), rel=1e-9, abs=1e-12)
    assert measured.holds == (abs(factor - 1.0) <= 0.1)


@pytest.mark.parametrize(
    ("claim", "output", "text"),
    [
        (Exact(), torch.ones(2, 2), "largest difference 0.00e+00"),
        (Close(), torch.ones(2, 2) * 1.5, "relative error 5.00e-01 (allowed 0.0001)"),
        (Sqnr(30.0), torch.ones(2, 2) * 1.1, "20.0 dB"),
        (Close(), torch.ones(2, 3), "shape (2, 3) where the original has (2, 2)"),
        (
            Close(),
            torch.ones(2, 2, dtype=torch.float16),
            "dtype torch.float16 where the original has torch.float32",
        ),
        (Sqnr(30.0), torch.full((2, 2), math.inf), "4 of 4 entries are infinite"),
        (Exact(), torch.full((2, 2), math.nan), "4 of 4 entries are NaN"),
    ],
)
def test_text_of_a_measurement(claim: Claim, output: Tensor, text: str) -> None:
    assert claim.measure(torch.ones(2, 2), output).text == text


@pytest.mark.parametrize(
    ("claim", "text"),
    [
        (Exact(), "exact"),
        (Close(), "close"),
        (Close(rtol=1e-3), "close(rtol=0.001)"),
        (Sqnr(30.0), "sqnr >= 30 dB"),
    ],
)
def test_text_of_a_claim(claim: Claim, text: str) -> None:
    assert str(claim) == text


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_close_refuses_a_tolerance_that_cannot_fail(bad: float) -> None:
    with pytest.raises(PassError, match=r"Close\(rtol=.*\): rtol must be a finite number >= 0"):
        Close(rtol=bad)
    with pytest.raises(PassError, match=r"Close\(atol=.*\): atol must be a finite number >= 0"):
        Close(atol=bad)


@pytest.mark.parametrize("bad", [0.0, -3.0, math.inf, math.nan])
def test_sqnr_refuses_a_floor_that_cannot_fail(bad: float) -> None:
    with pytest.raises(PassError, match=r"the floor must be a finite number of dB above 0"):
        Sqnr(bad)
