"""The judge: the worst of all trials and outputs, in the claim's unit; and claims added up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fxopt.claim import Claim, Close, Exact, Sqnr
from fxopt.verify import Trial, Verdict, compare, compose, judge

REFERENCE = torch.linspace(-1.0, 1.0, 11)
TRIALS = [Trial(name, (REFERENCE,), (REFERENCE, REFERENCE)) for name in ("one", "two", "three")]


def judged(claim: Claim, results: Sequence[Sequence[Tensor]]) -> Verdict:
    reference = [trial.outputs for trial in TRIALS]
    verdict, outputs = judge(
        claim, TRIALS, reference, lambda batches: [list(r) for r in results], ["a", "b"]
    )
    assert len(outputs) == len(TRIALS)
    return verdict


def off(error: float) -> Tensor:
    return REFERENCE + error


@pytest.mark.parametrize("claim", [Close(rtol=0.1), Sqnr(10.0)])
def test_the_worst_of_all_trials_and_outputs_decides(claim: Claim) -> None:
    fine = [off(1e-4), off(1e-4)]
    verdict = judged(claim, [fine, [off(1e-4), off(1e-2)], fine])
    assert verdict.holds
    assert (verdict.trial.what, verdict.where) == ("two", "b")
    verdict = judged(claim, [fine, fine, [off(0.9), off(1e-4)]])
    assert not verdict.holds
    assert (verdict.trial.what, verdict.where) == ("three", "a")


def test_outputs_become_the_next_reference() -> None:
    reference = [trial.outputs for trial in TRIALS]
    results = [[off(float(i)), off(float(i))] for i in range(3)]
    _, outputs = judge(Exact(), TRIALS, reference, lambda batches: results, ["a", "b"])
    assert torch.equal(outputs[2][0], off(2.0))


@pytest.mark.parametrize("claim", [Exact(), Close(), Close(rtol=1e6), Sqnr(0.001)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_never_pass(claim: Claim, value: float) -> None:
    spoiled = REFERENCE.clone()
    spoiled[4] = value
    fine = [REFERENCE, REFERENCE]
    verdict = judged(claim, [fine, [REFERENCE, spoiled], fine])
    assert not verdict.holds
    assert (verdict.trial.what, verdict.where) == ("two", "b")
    kind = "NaN" if math.isnan(value) else "infinite"
    assert verdict.measured.text == f"1 of 11 entries are {kind}"


def test_a_failed_verdict_is_worse_than_a_poor_one_that_holds() -> None:
    fine = [REFERENCE, REFERENCE]
    verdict = judged(Sqnr(20.0), [fine, [off(0.05), REFERENCE], [off(0.5), REFERENCE]])
    assert not verdict.holds
    assert verdict.trial.what == "three"


def test_another_number_of_outputs_breaks_every_claim() -> None:
    (verdict,) = compare(Close(), TRIALS[0], [REFERENCE], [REFERENCE, REFERENCE], ["a"])
    assert not verdict.holds
    assert verdict.measured.text == "2 output tensors where the original has 1"


def test_another_shape_or_dtype_breaks_every_claim() -> None:
    (verdict,) = compare(Sqnr(1.0), TRIALS[0], [REFERENCE], [REFERENCE[:-1]], ["a"])
    assert verdict.measured.text == "shape (10,) where the original has (11,)"
    (verdict,) = compare(Sqnr(1.0), TRIALS[0], [REFERENCE], [REFERENCE.double()], ["a"])
    assert verdict.measured.text == "dtype torch.float64 where the original has torch.float32"


def test_a_run_that_raises_breaks_the_claim_and_is_quoted() -> None:
    def run(batches: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        if any(inputs is TRIALS[1].inputs for inputs in batches):
            raise RuntimeError("shapes clash\nsecond line")
        return [list(TRIALS[0].outputs) for _ in batches]

    reference = [trial.outputs for trial in TRIALS]
    verdict, outputs = judge(Close(), TRIALS, reference, run, ["a", "b"])
    assert not verdict.holds
    assert verdict.trial.what == "two"
    assert "shapes clash" in verdict.measured.text
    assert "second line" not in verdict.measured.text
    assert len(outputs) == 3


def test_a_model_without_tensor_outputs_holds() -> None:
    trial = Trial("one", (REFERENCE,), ())
    verdict, _ = judge(Close(), [trial], [()], lambda batches: [[]], [])
    assert verdict.holds
    assert verdict.measured.text == "the model returns no tensor"


@pytest.mark.parametrize(
    ("claims", "budget"),
    [
        ([], Exact()),
        ([Exact(), Exact()], Exact()),
        ([Exact(), Close()], Close(atol=1e-7)),
        ([Close(), Close()], Close(atol=2e-7)),
        ([Close(rtol=1e-3, atol=0.0), Close(rtol=2e-3, atol=0.0)], Close(3e-3, 0.0)),
        ([Close(rtol=1e-3, atol=0.0), Close(atol=0.0)], Close(1e-3 + 1e-4, 0.0)),
        ([Sqnr(40.0)], Sqnr(40.0)),
        ([Sqnr(40.0), Exact()], Sqnr(40.0)),
        ([Sqnr(20.0), Sqnr(20.0)], Sqnr(14.0)),
        ([Sqnr(20.0), Close(rtol=0.1)], Sqnr(14.0)),
    ],
)
def test_claims_add_up_to_a_budget(claims: list[Claim], budget: Claim) -> None:
    assert compose(claims) == budget


def test_two_passes_at_their_limits_stay_within_the_budget() -> None:
    noise = torch.full_like(REFERENCE, 0.05)
    for claim in (Sqnr(20.0), Close(rtol=0.1)):
        assert claim.measure(REFERENCE, REFERENCE + noise).holds
        once = REFERENCE + noise
        assert claim.measure(once, once + noise).holds
        assert compose([claim, claim]).measure(REFERENCE, once + noise).holds
