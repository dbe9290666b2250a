"""Scales per input channel that spare what large activations multiply: AWQ.

    x @ Wᵀ  =  (x / s) @ (W s)ᵀ  ~  (x / s) @ dq(q(W s))ᵀ          s_j = (mean x_j²)^(α/2) / c_j

A column that is made larger before rounding errs by less, relative to itself, as long as it doesn't
set the range of its group. α between 0 and 1 is searched, with c = 1 and with c_j the root of the
mean square of column j, which levels a group; the error is that of the outputs on the calibration's
second moment H, (w - w') H (w - w')ᵀ, of the rounding that will be used, clipping included.

Source: Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and
Acceleration", MLSys 2024 (arXiv:2306.00978); c, after AutoAWQ's "duo scaling", which takes means of
magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ALPHAS = tuple(index / 10 for index in range(1, 11))
"""What is tried beside no scale at all."""

RoundWeight = Callable[[Tensor, Tensor], Tensor]
"""Of a weight [N, K] and the mean squares of its inputs [K], what it becomes, float [N, K]."""

_WIDEST = 2.0**10
"""How far from 1 a scale may be: calibration hardly saw such a channel, real inputs may."""
_SAMPLED_ROWS = 256


def activation_scale(
    power: Tensor, columns: Tensor, ties: Tensor, alpha: float, levelled: bool
) -> Tensor:
    """s [K], float64, of the mean squares of inputs `power` [K] and of weights `columns` [K].

    Channels of one number in `ties` [K] share the geometric mean of theirs. The median is 1, and
    channels without input or without weight have 1.
    """
    power, columns = power.double(), columns.double()
    alive = (power > 0) & (columns > 0)
    if not bool(alive.any()):
        return torch.ones_like(power)
    logarithm = alpha * power.where(alive, 1.0).log2()
    if levelled:
        logarithm = logarithm - columns.where(alive, 1.0).log2()
    logarithm = (logarithm / 2).where(alive, 0.0)
    count = torch.zeros_like(power).index_add_(0, ties, alive.double())
    mean = torch.zeros_like(power).index_add_(0, ties, logarithm) / count.clamp_min(1.0)
    scale = torch.exp2(mean - mean[ties][alive].median()).clamp(1 / _WIDEST, _WIDEST)
    # Taken by tie, not computed by channel: a vector's remainder may be rounded another way. A
    # channel that is tied to a live one is scaled with it.
    return torch.where(count > 0, scale, 1.0)[ties]


def choose_scale(
    weights: Sequence[Tensor], moment: Tensor, ties: Tensor, rounded: RoundWeight
) -> tuple[Tensor, str] | None:
    """The scale [K], float64, of least error on `moment` [K, K] for all of `weights` [N, K].

    With a word on how it was made; None where no scale errs less than none. It is chosen on a
    sample of rows, and kept where all rows together gain.
    """
    power = moment.diagonal()
    columns = torch.stack([weight.double().square().mean(0) for weight in weights]).mean(0)
    samples = [weight[:: -(-len(weight) // _SAMPLED_ROWS)] for weight in weights]
    none = torch.ones_like(power, dtype=torch.float64)
    found = None
    least = output_error(samples, moment, none, rounded)
    for levelled in (False, True):
        for alpha in (*ALPHAS, *((0.0,) if levelled else ())):
            scale = activation_scale(power, columns, ties, alpha, levelled)
            error = output_error(samples, moment, scale, rounded)
            if error < least:
                least = error
                found = scale, f"alpha {alpha:g}{', columns levelled' if levelled else ''}"
    if found is None:
        return None
    whole = (output_error(weights, moment, scale, rounded) for scale in (found[0], none))
    return found if next(whole) < next(whole) else None


def output_error(
    weights: Sequence[Tensor], moment: Tensor, scale: Tensor, rounded: RoundWeight
) -> float:
    """Σ (w - w') H (w - w')ᵀ over the rows of `weights`, which are rounded scaled by `scale`."""
    factor = scale.to(moment)
    power = moment.diagonal() / factor.square()
    error = 0.0
    for weight in weights:
        wide = weight.to(moment.dtype)
        off = wide - rounded(wide * factor, power).to(moment.dtype) / factor
        error += float((off @ moment).mul_(off).sum(dtype=torch.float64))
    return error
