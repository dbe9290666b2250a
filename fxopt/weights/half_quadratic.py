"""Zero points that spare outliers: half-quadratic quantization, which needs no data.

What a group loses is measured by a norm that minds few large errors less than many small ones,

    min over z    Σ |W - (Q - z) s|^p,    Q = clamp(round(W / s + z)),    p = 0.7

split by E, the errors that are let go, whose penalty β grows:

    E  <-  shrink(W - (Q - z) s)          shrink(e) = sign(e) max(0, |e| - |e|^(p-1) / β)
    z  <-  mean(Q - (W - E) / s)          over the group

Errors are in steps of the scale, so that β means the same for every weight. A group keeps the best
zero point that it has met, its first one included.

Source: Badri, Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023), with
its p, β and κ.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NORM = 0.7
_PENALTY, _GROWTH = 10.0, 1.01
_ROUNDS = 20
_CHUNK_ELEMENTS = 1 << 18


def half_quadratic(
    weight: Tensor, group: int, scale: Tensor, zero_point: Tensor, low: int, steps: int
) -> tuple[Tensor, Tensor]:
    """Scales and zero points, float32 [N, K / group], of `weight` [N, K].

    `scale` and `zero_point`, both float32, are where it begins; the scales stay.
    """
    groups, size = weight.reshape(-1, group), max(1, _CHUNK_ELEMENTS // group)
    found = [
        _solved(x.to(torch.float32) / s, z, low, low + steps)
        for x, s, z in zip(
            groups.split(size),
            scale.reshape(-1, 1).split(size),
            zero_point.reshape(-1, 1).split(size),
            strict=True,
        )
    ]
    return scale, torch.cat(found).view(scale.shape)


def lost(x: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """The mean of |e|^p over groups [R, g] in steps, [R, 1], with zero points [R, 1]."""
    q = (x + zero_point).round_().clamp_(low, high)
    return (x - (q - zero_point)).abs().pow_(_NORM).mean(1, keepdim=True)


def _solved(x: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """The zero points [R, 1] of groups [R, g], in steps."""
    penalty = _PENALTY
    best, least = zero_point, lost(x, zero_point, low, high)
    for _ in range(_ROUNDS):
        q = (x + zero_point).round_().clamp_(low, high)
        error = x - (q - zero_point)
        size = error.abs()
        let_go = error.sign() * (size - size.clamp_min(1e-8).pow(_NORM - 1) / penalty).clamp_min_(0)
        zero_point = (q - (x - let_go)).mean(1, keepdim=True)
        penalty *= _GROWTH
        loss = lost(x, zero_point, low, high)
        better = loss < least
        best, least = torch.where(better, zero_point, best), torch.where(better, loss, least)
    return best
