"""The judge: a claim measured over every trial and every output; and claims added up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fxopt.claim import Claim, Close, Exact, Measured, Sqnr
from fxopt.recipe import Recipe
from fxopt.sharing import observed, shared_too_much
from fxopt.verify.oracle import RunAll, Trial


@dataclass(frozen=True)
class Verdict:
    """The worst measurement of a claim: on which trial and where (an output, or a node)."""

    claim: Claim
    measured: Measured
    trial: Trial
    where: str

    @property
    def holds(self) -> bool:
        """Whether the claim holds on every trial and output."""
        return self.measured.holds


def judge(
    claim: Claim,
    trials: Sequence[Trial],
    reference: Sequence[Sequence[Tensor]],
    run: RunAll,
    names: Sequence[str],
    state: Mapping[str, Tensor | Recipe] | None = None,
) -> tuple[Verdict, list[tuple[Tensor, ...]]]:
    """Run every trial, compare with `reference` (one list of outputs a trial), keep the worst.

    `names` are those of the outputs. An output that shares memory where the original's doesn't,
    with an input, another output or a tensor of the `state`, breaks the claim too. Returns the
    verdict and the new outputs, which are the reference of the next step. A run that raises breaks
    the claim.
    """
    try:
        results: list[list[Tensor] | str] = [*run([trial.inputs for trial in trials])]
    except RuntimeError:
        results = [_alone(run, trial) for trial in trials]
    verdicts: list[Verdict] = []
    outputs: list[tuple[Tensor, ...]] = []
    for trial, expected, result in zip(trials, reference, results, strict=True):
        if isinstance(result, str):
            failed = Measured(False, _worst(claim), result)
            verdicts.append(Verdict(claim, failed, trial, "every output"))
            outputs.append(tuple(expected))
        else:
            outputs.append(tuple(output.detach() for output in result))
            verdicts += compare(claim, trial, expected, outputs[-1], names)
            verdicts += _shared(claim, trial, result, names, state or {})
    if not verdicts:
        nothing = Measured(True, 0.0, "the model returns no tensor")
        verdicts = [Verdict(claim, nothing, trials[0], "no output")]
    return worst_of(verdicts), outputs


def _shared(
    claim: Claim,
    trial: Trial,
    outputs: Sequence[Tensor],
    names: Sequence[str],
    state: Mapping[str, Tensor | Recipe],
) -> list[Verdict]:
    """A broken claim where outputs share more memory than the original's; else nothing."""
    if trial.memory is None or len(trial.memory) != len(outputs):
        return []
    found = observed(outputs, trial.inputs, state)
    fault = shared_too_much(found, trial.memory, names)
    if fault is None:
        return []
    return [Verdict(claim, Measured(False, _worst(claim), fault), trial, "the outputs' memory")]


def worst_of(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict furthest from its claim."""
    return min(verdicts, key=_goodness)


def _alone(run: RunAll, trial: Trial) -> list[Tensor] | str:
    try:
        return run([trial.inputs])[0]
    except RuntimeError as error:
        first = (str(error).splitlines() or [""])[0]
        return f"it fails with {type(error).__name__}: {first}"


def compare(
    claim: Claim,
    trial: Trial,
    expected: Sequence[Tensor],
    outputs: Sequence[Tensor],
    names: Sequence[str],
) -> list[Verdict]:
    """The claim measured on each output tensor of one trial."""
    if len(expected) != len(outputs):
        text = f"{len(outputs)} output tensors where the original has {len(expected)}"
        return [Verdict(claim, Measured(False, _worst(claim), text), trial, "every output")]
    return [
        Verdict(claim, claim.measure(old, new), trial, name)
        for old, new, name in zip(expected, outputs, names, strict=True)
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
