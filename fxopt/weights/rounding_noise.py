"""What rounding weights costs: the signal-to-noise ratio that so many bits leave them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fxopt.weights.gptq import quantize_rows

_SAMPLED_ROWS = 64
_SMALLEST = torch.finfo(torch.float32).tiny


def rounding_db(weights: Iterable[Tensor], bits: int) -> float:
    """Decibels of weights `[N, K]` over what rounding to `bits` bits with a scale per row adds to
    them: the mean of their noise shares, from 64 rows of each; infinity for no noise."""
    shares = [_share(weight, bits) for weight in weights]
    mean = sum(shares) / max(1, len(shares))
    return -10 * math.log10(mean) if mean else math.inf


def _share(weight: Tensor, bits: int) -> float:
    rows = weight[:: max(1, len(weight) // _SAMPLED_ROWS)].detach().float()
    q, scale = quantize_rows(rows, bits=bits)
    noise = (q * scale - rows).square().sum()
    return float(noise / rows.square().sum().clamp_min(_SMALLEST))
