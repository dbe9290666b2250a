"""The judge: a claim measured over every trial and every output; and claims added up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fxopt.claim import Claim, Close, Exact, Measured, Sqnr
from fxopt.verify.oracle import RunAll, Trial


@dataclass(frozen=True)
class Verdict:
    """The worst measurement of a claim: over which trial and which output (by its index)."""

    claim: Claim
    measured: Measured
    trial: Trial
    output: int

    @property
    def holds(self) -> bool:
        """Whether the claim holds on every trial and output."""
        return self.measured.holds


def judge(
    claim: Claim, trials: Sequence[Trial], reference: Sequence[Sequence[Tensor]], run: RunAll
) -> tuple[Verdict, list[tuple[Tensor, ...]]]:
    """Run every trial, compare with `reference` (one list of outputs a trial), keep the worst.

    Returns the verdict and the new outputs, which are the reference of the next step. A run that
    raises breaks the claim.
    """
    try:
        results: list[list[Tensor] | str] = [*run([trial.inputs for trial in trials])]
    except RuntimeError:
        results = [_alone(run, trial) for trial in trials]
    verdicts: list[Verdict] = []
    outputs: list[tuple[Tensor, ...]] = []
    for trial, expected, result in zip(trials, reference, results, strict=True):
        if isinstance(result, str):
            verdicts.append(Verdict(claim, Measured(False, _worst(claim), result), trial, 0))
            outputs.append(tuple(expected))
        else:
            outputs.append(tuple(output.detach() for output in result))
            verdicts += compare(claim, trial, expected, outputs[-1])
    if not verdicts:
        nothing = Measured(True, 0.0, "the model returns no tensor")
        verdicts = [Verdict(claim, nothing, trials[0], 0)]
    return min(verdicts, key=_goodness), outputs


def _alone(run: RunAll, trial: Trial) -> list[Tensor] | str:
    try:
        return run([trial.inputs])[0]
    except RuntimeError as error:
        first = (str(error).splitlines() or [""])[0]
        return f"it fails with {type(error).__name__}: {first}"


def compare(
    claim: Claim, trial: Trial, expected: Sequence[Tensor], outputs: Sequence[Tensor]
) -> list[Verdict]:
    """The claim measured on each output tensor of one trial."""
    if len(expected) != len(outputs):
        text = f"{len(outputs)} output tensors where the original has {len(expected)}"
        return [Verdict(claim, Measured(False, _worst(claim), text), trial, 0)]
    return [
        Verdict(claim, claim.measure(old, new), trial, index)
        for index, (old, new) in enumerate(zip(expected, outputs, strict=True))
    ]


def compose(claims: Sequence[Claim]) -> Claim:
    """The budget of passes one after the other: their noise amplitudes added, the worst case."""
    if all(isinstance(claim, Exact) for claim in claims):
        return Exact()
    floors = [claim.db for claim in claims if isinstance(claim, Sqnr)]
    if floors:
        amplitude = sum(10.0 ** (-db / 20.0) for db in floors)
        amplitude += sum(claim.rtol or 1e-4 for claim in claims if isinstance(claim, Close))
        return Sqnr(round(max(-20.0 * math.log10(amplitude), 1.0), 1))
    close = [claim for claim in claims if isinstance(claim, Close)]
    if all(claim.rtol is None for claim in close):
        # The table of defaults leaves room for a deep model; a handful of passes fits in it.
        return Close(atol=sum(claim.atol for claim in close))
    return Close(sum(claim.rtol or 1e-4 for claim in close), sum(claim.atol for claim in close))


def _goodness(verdict: Verdict) -> tuple[bool, float]:
    value = verdict.measured.value
    return verdict.holds, value if isinstance(verdict.claim, Sqnr) else -value


def _worst(claim: Claim) -> float:
    return -math.inf if isinstance(claim, Sqnr) else math.inf
