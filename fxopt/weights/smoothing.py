"""How far to smooth: the scale per channel that SmoothQuant divides activations by.

    s_j = max|x_j|^alpha / max_n|W_nj|^(1 - alpha)

so that x_j / s_j and s_j W_j reach up to (max|x_j| max|W_j|)^(1 - alpha) and ^alpha: the difficulty
of quantizing is shared. A factor common to all channels changes nothing in symmetric quantization;
scales are given with median 1, so that weights, biases and norms stay of the size they were.
Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", ICML 2023, equation 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import fxopt.kernels  # noqa: F401  the operators
from fxopt.weights.gptq import quantize_rows

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""What `choose_alpha` tries, from weights that carry the outliers to activations that do."""

# Channels that calibration hardly saw get scales far from the others'; real inputs may reach them.
_WIDEST = 2.0**10
# A smaller gain than this is noise of the sample.
_GAIN = 0.99
_SMALLEST = torch.finfo(torch.float32).tiny
_STEPS = 127


def smoothing_scale(activations: Tensor, weights: Tensor, ties: Tensor, alpha: float) -> Tensor:
    """s [K], float64, from the largest magnitudes per channel of activations and weights [K].

    Channels of one number in `ties` [K] share the scale of their largest magnitudes. The median is
    1, no scale is further from it than 2¹⁰, and channels that are zero (or denormal) on either
    side have 1.
    """
    a, w = _tied_largest(activations, ties), _tied_largest(weights, ties)
    alive = (a >= _SMALLEST) & (w >= _SMALLEST)
    if not bool(alive.any()):
        return torch.ones_like(a)
    logarithm = alpha * a.clamp_min(_SMALLEST).log2() - (1 - alpha) * w.clamp_min(_SMALLEST).log2()
    scale = torch.exp2(logarithm - logarithm[ties][alive[ties]].median())
    # Taken by tie, not computed by channel: a vector's remainder may be rounded another way.
    return torch.where(alive, scale.clamp(1 / _WIDEST, _WIDEST), 1.0)[ties]


def choose_alpha(
    rows: Tensor,
    weights: Sequence[Tensor],
    activations: Tensor,
    largest: Tensor,
    ties: Tensor,
    static: bool = False,
    bits: int = 8,
) -> float | None:
    """The alpha of least error of the int8 products on a sample; None where none gains by it.

    `rows` [R, K] and `weights` [N, K] each are samples; the error is the squared difference to the
    float products, with weights of `bits` bits, a scale per output channel and per token or, if
    `static`, one for all rows, which holds `activations`.
    """

    def error(scale: Tensor) -> float:
        step = (activations / scale).amax() / _STEPS if static else None
        return _int8_error(rows, weights, scale, step, bits)

    errors = {alpha: error(smoothing_scale(activations, largest, ties, alpha)) for alpha in ALPHAS}
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] < _GAIN * error(torch.ones_like(activations)) else None


def largest_per_channel(weight: Tensor) -> Tensor:
    """max_n|W_nj| [K], float64, of [N, K] without a copy of the weight."""
    return torch.maximum(weight.amax(0), -weight.amin(0)).double()


def _tied_largest(values: Tensor, ties: Tensor) -> Tensor:
    """The largest of the values of each tie, at its number; 0 at the numbers that no tie has."""
    values = values.double()
    return torch.zeros_like(values).scatter_reduce(0, ties, values, "amax")


def _int8_error(
    rows: Tensor, weights: Sequence[Tensor], scale: Tensor, step: Tensor | None, bits: int
) -> float:
    """The squared error of the products, `rows` rounded in units of `step`, else per token."""
    factor = scale.to(rows)
    x = _rounded(rows / factor, step)
    error = 0.0
    for weight in weights:
        w = torch.ops.fxopt.dequantize(*quantize_rows(weight * factor, bits=bits), rows.dtype)
        error += (x @ w.t() - rows @ weight.t()).square().sum().item()
    return error


def _rounded(rows: Tensor, step: Tensor | None) -> Tensor:
    if step is None:
        quantized, step = torch.ops.fxopt.quantize_per_token(rows)
    else:
        step = step.to(rows).clamp_min(_SMALLEST)
        quantized = torch.ops.fxopt.quantize(rows, step, torch.zeros((), dtype=torch.int8))
    x: Tensor = torch.ops.fxopt.dequantize(quantized, step, rows.dtype)
    return x
