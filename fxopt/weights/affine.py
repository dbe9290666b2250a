"""Weights rounded to four bits with a scale and a zero point for each group of columns.

    W ~ (Q - z) * s       Q integer in [-8, 7], s and z per row and group of columns

For given Q the s and z of the least squared error are those of a line through the points (Q, W).
Which Q is searched: those that the range of a group gives where it is stretched to a few more and a
few less steps than 15, which clips its ends.

Source: `make_qkx2_quants` of llama.cpp (ggml-quants.c); the zero point is no integer, as in HQQ:
Badri, Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxopt.weights.gptq import refuse_non_finite

_LOW, _STEPS = -8, 15
_STRETCHED = (0.0, -0.9, -0.6, -0.3, 0.3, 0.6, 0.9, 1.2)
"""What is added to the 15 steps of a group's range: first nothing, which a grid of 15 wants."""
_MOST_OFFSET = 1024.0
"""Steps from zero to a group beyond which its values are as good as one."""
_CHUNK_ELEMENTS = 1 << 18
_NORMAL = torch.finfo(torch.float16)


class AffineWeight(NamedTuple):
    """`(values - zero_point) * scale`: int8 [N, K] in [-8, 7], and two of float [N, K / group]."""

    values: Tensor
    scale: Tensor
    zero_point: Tensor


def affine_groups(weight: Tensor, group: int) -> AffineWeight:
    """`weight` [N, K], K a multiple of `group`, in four bits with the least squared error found.

    Scales and zero points are float16, or float32 where float16 has no scale as small or as large.
    Raises `KernelError` for a weight that holds NaN or infinity.
    """
    rows, inner = weight.shape
    refuse_non_finite(weight, "affine_groups")
    groups = weight.detach().reshape(-1, group)
    chunks = groups.split(max(1, _CHUNK_ELEMENTS // group))
    fitted = [_fitted(chunk.t().to(torch.float32).contiguous()) for chunk in chunks]
    scale, zero_point = (torch.cat([pair[index] for pair in fitted]) for index in range(2))
    fits = bool(((scale >= _NORMAL.tiny) & (scale <= _NORMAL.max)).all())
    dtype = torch.float16 if fits else torch.float32
    scale, zero_point = scale.to(dtype).unsqueeze(1), zero_point.to(dtype).unsqueeze(1)
    values = torch.empty_like(groups, dtype=torch.int8, memory_format=torch.contiguous_format)
    for q, x, s, z in zip(
        *(t.split(len(chunks[0])) for t in (values, groups, scale, zero_point)), strict=True
    ):
        q.copy_(
            (x.to(torch.float32) / s.float()).add_(z.float()).round_().clamp_(_LOW, _LOW + _STEPS)
        )
    by_row = (rows, inner // group)
    return AffineWeight(values.view(rows, inner), scale.view(by_row), zero_point.view(by_row))


def _fitted(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points [R] of groups [g, R], which columns hold."""
    unit = x.abs().amax(0).clamp_min(torch.finfo(torch.float32).tiny)
    x = x / unit
    low, mean = x.amin(0), x.mean(0)
    width, centred, above = x.amax(0) - low, x - mean, x - low
    best = torch.full_like(low, -torch.inf)
    slope, center = torch.zeros_like(low), torch.zeros_like(low)
    for stretch in _STRETCHED:
        steps = (above * ((_STEPS + stretch) / width)).round_().clamp_(0, _STEPS)
        middle, shared = steps.mean(0), (steps * centred).sum(0)
        line = shared / (steps.square_().sum(0) - len(x) * middle.square())
        # What the line explains of the squares of `centred`.
        explained = line * shared
        better = explained > best
        best = torch.where(better, explained, best)
        slope, center = torch.where(better, line, slope), torch.where(better, middle, center)
    zero_point = _LOW + center - mean / slope
    # Of values that are all alike the sign and the magnitude are all there is to keep.
    alike = ~(slope > 0) | (zero_point.abs() > _MOST_OFFSET)
    scale = torch.where(alike, mean.abs(), slope) * unit
    return torch.where(scale > 0, scale, 1.0), torch.where(alike, 0.0, zero_point)
