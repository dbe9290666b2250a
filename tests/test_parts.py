"""No part of an output hides another: sentinels, rows and channels far above the rest."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt.claim import Claim, Close, Sqnr, sqnr
from fxopt.measurement import fidelity
from fxopt.parts import split

SENTINELS = {
    torch.float64: [-1e4, -1e9, 1e30, torch.finfo(torch.float64).min],
    torch.float32: [-1e4, -1e9, 1e30, torch.finfo(torch.float32).min],
    torch.float16: [-1e4, torch.finfo(torch.float16).min],
    torch.bfloat16: [-1e4, -1e9, torch.finfo(torch.bfloat16).min],
}


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_noise(reference: Tensor, decibels: float, seed: int = 1) -> Tensor:
    """`reference` with additive noise of so many decibels over all of it."""
    added = noise(seed, *reference.shape)
    return reference + added * (reference.norm() / added.norm()) * 10 ** (-decibels / 20)


def equal(reference: Tensor, output: Tensor, place: Tensor, value: float) -> None:
    """The sentinel is written over what was there: the same on both sides."""
    reference[place] = output[place] = value


def added(reference: Tensor, output: Tensor, place: Tensor, value: float) -> None:
    """The sentinel is added to what was there, so that the two sides differ by their noise."""
    reference[place] += value
    output[place] += value


def mixed(reference: Tensor, output: Tensor, place: Tensor, value: float) -> None:
    """Sentinels of four magnitudes and both signs, the same on both sides."""
    values = torch.tensor([value, -value, value / 7, -5e3], dtype=reference.dtype)
    index = torch.arange(int(place.sum())) % 4
    reference[place] = output[place] = values[index]


@st.composite
def masks(draw: st.DrawFn, rows: int, columns: int) -> Tensor:
    """Where sentinels stand: some entries, all but a few, whole rows, whole columns, a triangle."""
    kind = draw(st.sampled_from(["one", "some", "most", "row", "column", "triangle"]))
    place = torch.zeros(rows, columns, dtype=torch.bool)
    chance = torch.rand(
        rows, columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))
    )
    if kind == "one":
        place[draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))] = True
    elif kind == "some":
        place = chance < 0.3
    elif kind == "most":
        place = chance < 0.9
    elif kind == "row":
        place[draw(st.integers(0, rows - 1))] = True
    elif kind == "column":
        place[:, draw(st.integers(0, columns - 1))] = True
    else:
        place = torch.ones(rows, columns).triu(1).bool()
    return place


@settings(max_examples=150)
@given(
    data=st.data(),
    rows=st.integers(4, 12),
    columns=st.integers(8, 20),
    dtype=st.sampled_from(list(SENTINELS)),
    plant=st.sampled_from([equal, added, mixed]),
    claim=st.sampled_from([20.0, 30.0, 40.0]),
    seed=st.integers(0, 999),
)
def test_a_fault_beside_sentinels_is_caught_and_none_is_invented(
    data: st.DataObject,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    plant: Callable[[Tensor, Tensor, Tensor, float], None],
    claim: float,
    seed: int,
) -> None:
    """What the ordinary entries alone would measure is measured, whatever stands beside them."""
    ordinary = noise(seed, rows, columns) * 2.0
    place = data.draw(masks(rows, columns))
    value = data.draw(st.sampled_from(SENTINELS[dtype]))
    if not bool((~place).any()):
        return
    for margin in (-8.0, 8.0):
        reference, output = ordinary.clone(), with_noise(ordinary, claim + margin, seed + 1)
        plant(reference, output, place, value)
        reference, output = reference.to(dtype), output.to(dtype)
        kinds = [(reference[kind], output[kind]) for kind in (place, ~place) if bool(kind.any())]
        alone = min(sqnr(*kind) for kind in kinds)
        measured = Sqnr(claim).measure(reference, output)
        assert measured.value == pytest.approx(alone, abs=1e-6)
        assert measured.holds == (alone >= claim)
        relative = max(float((out - ref).abs().max() / ref.abs().max()) for ref, out in kinds)
        if relative:
            assert Close(rtol=relative * 1.01).measure(reference, output).holds
            assert not Close(rtol=relative * 0.9, atol=0.0).measure(reference, output).holds


@settings(max_examples=50)
@given(
    exponent=st.floats(3.5, 30.0),
    axis=st.integers(0, 2),
    centre=st.booleans(),
    seed=st.integers(0, 999),
    decibels=st.sampled_from([12.0, 35.0]),
)
def test_a_huge_row_or_channel_hides_nothing_and_is_itself_judged(
    exponent: float, axis: int, centre: bool, seed: int, decibels: float
) -> None:
    """Additive noise of 40 dB in the huge slice, of `decibels` in the rest."""
    rest, slice_ = noise(seed, 6, 40, 50), noise(seed + 1, 6, 40, 50)
    size = 10.0**exponent
    huge = (slice_ if centre else 1.0 + 0.1 * slice_) * size
    inside = torch.zeros(6, 40, 50, dtype=torch.bool)
    inside.select(axis, 3)[:] = True
    reference = torch.where(inside, huge, rest)
    output = torch.where(
        inside,
        huge + 0.01 * size * noise(seed + 2, 6, 40, 50),
        with_noise(rest, decibels, seed + 3),
    )
    assert sqnr(reference, output) == pytest.approx(min(decibels, 40.0), abs=1.5)


@settings(max_examples=100)
@given(
    exponent=st.floats(-6.0, 12.0),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    tail=st.sampled_from(["normal", "uniform", "exponential", "rectified", "probabilities"]),
    decibels=st.floats(5.0, 100.0),
    seed=st.integers(0, 999),
)
def test_an_ordinary_output_is_one_part_at_every_scale(
    exponent: float, rows: int, columns: int, tail: str, decibels: float, seed: int
) -> None:
    """SQNR is the plain ratio of sums there."""
    draws = noise(seed, rows, columns)
    reference = {
        "normal": draws,
        "uniform": draws.sigmoid(),
        "exponential": draws.exp(),
        "rectified": draws.relu(),
        "probabilities": (20 * draws).softmax(-1),
    }[tail]
    if tail != "probabilities":
        reference = reference * 10.0**exponent
    output = with_noise(reference, decibels, seed + 1)
    noisy, signal = (output - reference).square().sum(), reference.square().sum()
    wanted = 10 * math.log10(float(signal / noisy)) if signal > 0 and noisy > 0 else math.inf
    if rows * columns > 3 and wanted < math.inf:
        assert sqnr(reference, output) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("claim", [Close(), Sqnr(1.0)], ids=str)
def test_a_sentinel_that_is_lost_passes_no_claim(claim: Claim) -> None:
    reference = torch.full((4, 50), -1e9)
    reference[:, :5] = torch.linspace(-3, 3, 5)
    output = reference.clone()
    output[2, 20] = 4.0
    measured = claim.measure(reference, output)
    assert not measured.holds
    assert measured.text.endswith("; 1 entries are small where the original has 1e+09")
    assert sqnr(reference, output) == -math.inf


def test_a_mask_of_zeros_and_sentinels_admits_no_noise_at_the_zeros() -> None:
    mask = torch.zeros(3, 4)
    mask[:, 2:] = -1e9
    output = mask.clone()
    output[0, 0] = 5.0
    assert not Close().measure(mask, output).holds
    assert not Sqnr(40.0).measure(mask, output).holds
    assert Close().measure(mask, mask.clone()).holds


def test_zeros_beside_large_numbers_that_differ_are_no_part() -> None:
    reference = torch.zeros(100)
    reference[7] = 5e4
    assert len(split(reference, reference + 1.0)) == 1


def test_the_text_says_which_part_was_measured() -> None:
    reference = torch.tensor([[3.0, 4.0, -1e9, -1e9]])
    output = torch.tensor([[3.3, 4.4, -1e9, -1e9]])
    assert Sqnr(30.0).measure(reference, output).text == (
        "20.0 dB among 2 of 4 entries, those of magnitudes up to 4"
    )
    assert Close().measure(reference, output).text == (
        "relative error 1.00e-01 (allowed 0.0001) among 2 of 4 entries, those of magnitudes up to 4"
    )


class Banned(nn.Module):
    """Logits of which a constant mask bans some."""

    keep: Tensor

    def __init__(self, value: float) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(32, 64), nn.Linear(64, 48)
        self.value = value
        self.register_buffer("keep", torch.arange(48) % 3 > 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x))).masked_fill(~self.keep, self.value)


@pytest.mark.parametrize("value", [-1e9, torch.finfo(torch.float32).min])
def test_a_budget_is_kept_by_the_logits_that_are_not_banned(value: float) -> None:
    torch.manual_seed(0)
    model, x = Banned(value).eval(), torch.randn(16, 32)
    free = fxopt.Int8Linear(where="always")
    budgeted = fxopt.Int8Linear(where="always", budget=Sqnr(60.0))
    found = []
    for pass_ in (free, budgeted):
        opt = fxopt.transform(model, [pass_], example_inputs=(x,), measure_cost=False)
        keep = model.keep
        found.append(sqnr(model(x)[:, keep].detach(), opt(x)[:, keep].detach()))
    assert found[0] < 60.0 <= found[1]


def test_fidelity_is_that_of_the_rows_that_sentinels_would_hide() -> None:
    reference = noise(0, 40, 30)
    output = with_noise(reference, 20.0)
    plain = fidelity(lambda x: reference, lambda x: output, [0])
    reference, output = reference.clone(), output.clone()
    reference[:, 5:9] = output[:, 5:9] = -1e9
    kept = [i for i in range(30) if not 5 <= i < 9]
    wanted = fidelity(lambda x: reference[:, kept], lambda x: output[:, kept], [0])
    batches = [slice(0, 10), slice(10, 40)]
    found = fidelity(lambda x: reference[x], lambda x: output[x], batches)
    assert found.sqnr_db == pytest.approx(wanted.sqnr_db)
    assert found.cosine_mean == pytest.approx(wanted.cosine_mean)
    assert abs(found.sqnr_db - plain.sqnr_db) < 1.0
    (note,) = found.notes
    assert note.startswith("the entries stand apart by magnitude in 2 parts (")
    assert note.endswith("dB up to 1e+09); SQNR and cosine are those of the worst")
