"""Claims: what a pass promises about outputs, each in its own unit, and how it is measured.

All three compare one tensor of the reference with one of the rewritten program:

    Exact           out = ref, bit for bit (a NaN never passes)
    Close(r, a)     max|out - ref| <= a + r * max|ref|          relative to the part's own scale
    Sqnr(d)         10 log10( sum ref^2 / sum (out - ref)^2 ) >= d       decibels, higher is truer

the last two in each part P of the tensor by itself, so that none hides another: sums and maxima are
over P. An ordinary output is one part. Sentinels (-1e9, the least number of a dtype) are one of
their own, as is a row or channel far above the rest; `fxopt.parts` says which. A sentinel that the
output has lost passes no claim.

NaN and infinity pass no claim unless the reference holds the same infinity at the same place (an
attention mask does, legitimately). Integer and boolean outputs can't be "close": they must be
equal, except under `Sqnr(d)`, where the share of equal entries must reach 1 - 10^(-d/20), the same
noise amplitude ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fxopt.errors import PassError
from fxopt.parts import Part, split

# A reassociated sum of n products errs by about sqrt(n) eps; these leave a few hundred eps, which
# is what a deep model accumulates, and a planted fault exceeds by orders of magnitude.
_RTOL = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}

# The square of a float64 above overflows.
_SQUARED = 1e100


@dataclass(frozen=True)
class Measured:
    """One claim judged: whether it holds, the worst figure in the claim's unit, and its text."""

    holds: bool
    value: float
    text: str


@dataclass(frozen=True)
class Exact:
    """The outputs are the same numbers, bit for bit."""

    def __str__(self) -> str:
        return "exact"

    def measure(self, reference: Tensor, output: Tensor) -> Measured:
        """Judge `output` against `reference` (same shape and dtype); value = largest difference."""
        fault = _fault(reference, output)
        if fault:
            return Measured(False, math.inf, fault)
        error = _largest_difference(reference, output)
        return Measured(error == 0.0, error, f"largest difference {error:.2e}")


@dataclass(frozen=True)
class Close:
    """The outputs agree up to rounding, measured against the largest magnitude of each part.

    `rtol` left out is taken from the dtype: 1e-9 for float64, 1e-4 for float32, 5e-3 for float16
    and 4e-2 for bfloat16. `atol` counts in the outputs' own unit.
    """

    rtol: float | None = None
    atol: float = 1e-7

    def __post_init__(self) -> None:
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if value is not None and not 0.0 <= value < math.inf:
                raise PassError(f"Close({name}={value!r}): {name} must be a finite number >= 0")

    def __str__(self) -> str:
        return "close" if self.rtol is None else f"close(rtol={self.rtol:g})"

    def measure(self, reference: Tensor, output: Tensor) -> Measured:
        """Judge `output` against `reference`; value = max|out - ref| / max|ref|."""
        fault = _fault(reference, output)
        if fault:
            return Measured(False, math.inf, fault)
        if not _is_inexact(reference):
            error = _largest_difference(reference, output)
            return Measured(error == 0.0, error, f"largest integer difference {error:g}")
        rtol = self.rtol_of(reference.dtype)
        parts = split(reference, output)
        judged = [self._measure_part(part, rtol, parts) for part in parts]
        return max(judged, key=lambda one: (not one.holds, one.value))

    def rtol_of(self, dtype: torch.dtype) -> float:
        """The relative error allowed in a tensor of floating-point `dtype`."""
        return _RTOL.get(dtype.to_real(), 1e-4) if self.rtol is None else self.rtol

    def _measure_part(self, part: Part, rtol: float, parts: Sequence[Part]) -> Measured:
        error = _largest_error(part)
        scale = _largest_magnitude(part)
        relative = error / scale if scale else (0.0 if error == 0.0 else math.inf)
        holds = error <= self.atol + rtol * scale and not part.lost
        text = f"relative error {relative:.2e} (allowed {rtol:g}){_where(part, parts)}"
        return Measured(holds, relative, text)


@dataclass(frozen=True)
class Sqnr:
    """The signal-to-quantization-noise ratio is at least `db` decibels.

    Source: Gray and Neuhoff, "Quantization", IEEE Trans. Inf. Theory 44 (1998); 20 dB is a relative
    error of 0.1, 40 dB one of 0.01.
    """

    db: float

    def __post_init__(self) -> None:
        if not 0.0 < self.db < math.inf:
            raise PassError(f"Sqnr({self.db!r}): the floor must be a finite number of dB above 0")

    def __str__(self) -> str:
        return f"sqnr >= {self.db:g} dB"

    def measure(self, reference: Tensor, output: Tensor) -> Measured:
        """Judge `output` against `reference`; value = the ratio in decibels (inf when equal)."""
        fault = _fault(reference, output)
        if fault:
            return Measured(False, -math.inf, fault)
        if not _is_inexact(reference):
            equal = int((reference == output).sum())
            share = equal / reference.numel() if reference.numel() else 1.0
            floor = 1.0 - 10.0 ** (-self.db / 20.0)
            text = f"{share:.4f} of integer entries equal (needs {floor:.4f})"
            return Measured(
                share >= floor, math.inf if share == 1.0 else -20 * math.log10(1 - share), text
            )
        parts = split(reference, output)
        judged = [(_decibels_of(part), part) for part in parts]
        value, worst = min(judged, key=lambda one: one[0])
        return Measured(value >= self.db, value, f"{value:.1f} dB{_where(worst, parts)}")


Claim: TypeAlias = Exact | Close | Sqnr


def sqnr(reference: Tensor, output: Tensor) -> float:
    """min over parts P of 10 log10(sum_P ref^2 / sum_P (out - ref)^2) in decibels; inf when equal.

    Summed in float64; entries where both hold the same infinity count as equal. -inf where a
    sentinel is lost.
    """
    return min(map(_decibels_of, split(reference, output)))


def powers(part: Part) -> tuple[float, float]:
    """sum ref^2 and sum (out - ref)^2 of a part, in float64 and in units of `unit(part.high)`^2."""
    noise = signal = 0.0
    scale = 1.0 / unit(part.high)
    for ref, out in part.pieces():
        if scale != 1.0:
            ref, out = ref * scale, out * scale
        difference = out - ref
        power = _power(difference)
        if not math.isfinite(power):
            same = (ref == out) & ref.isinf()
            ref, difference = ref.masked_fill(same, 0.0), difference.masked_fill(same, 0.0)
            power = _power(difference)
        noise += power
        signal += _power(ref)
    return signal, noise


def unit(magnitude: float) -> float:
    """A power of two for squares of numbers up to `magnitude`: 1 unless they would overflow."""
    return 1.0 if magnitude < _SQUARED else 2.0 ** (math.frexp(magnitude)[1] - 1)


def _decibels_of(part: Part) -> float:
    return -math.inf if part.lost else decibels(*powers(part))


def _where(part: Part, parts: Sequence[Part]) -> str:
    """Which of several parts it is that was measured."""
    if part.lost:
        return f"; {part.lost} entries are small where the original has {part.high:.3g}"
    if len(parts) == 1:
        return ""
    whole = part.reference.numel()
    return f" among {part.count} of {whole} entries, those of magnitudes up to {part.high:.3g}"


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two powers; inf without noise, -inf for noise that isn't finite
    or without a signal."""
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def _power(values: Tensor) -> float:
    return float(torch.vdot(values, values).real)


def _fault(reference: Tensor, output: Tensor) -> str | None:
    """What makes the two incomparable or the output unacceptable under every claim."""
    if reference.shape != output.shape:
        return f"shape {tuple(output.shape)} where the original has {tuple(reference.shape)}"
    if reference.dtype != output.dtype:
        return f"dtype {output.dtype} where the original has {reference.dtype}"
    if not output.dtype.is_floating_point and not output.dtype.is_complex:
        return None
    # A sum is finite only where every term is; one that overflows merely takes the longer way.
    if bool(output.sum().isfinite()):
        return None
    if bool(output.isnan().any()):
        count = int(output.isnan().sum())
        origin = ", and so has the original" if bool(reference.isnan().any()) else ""
        return f"{count} of {output.numel()} entries are NaN{origin}"
    wrong = output.isinf() & (output != reference.to(output.device))
    if bool(wrong.any()):
        return f"{int(wrong.sum())} of {output.numel()} entries are infinite"
    return None


def _largest_difference(reference: Tensor, output: Tensor) -> float:
    if not reference.numel():
        return 0.0
    if _is_inexact(reference):
        return _largest_error(Part(reference, output, None, 0.0, 0.0, 0.0))
    different = reference != output
    if not bool(different.any()):
        return 0.0
    return max((reference.double() - output.double()).abs().max().item(), 1.0)


def _largest_error(part: Part) -> float:
    worst = 0.0
    for ref, out in part.pieces():
        largest = float((out - ref).abs().max())
        if math.isnan(largest):
            largest = float((out - ref).abs().masked_fill_(ref == out, 0.0).max())
        if math.isnan(largest):
            return math.inf
        worst = max(worst, largest)
    return worst


def _largest_magnitude(part: Part) -> float:
    largest = 0.0
    for ref, _ in part.pieces():
        magnitudes = ref.abs()
        largest = max(largest, float(magnitudes.masked_fill_(~magnitudes.isfinite(), 0.0).max()))
    return largest
