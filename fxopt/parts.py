"""The parts of an output that differ so much in magnitude that one would hide the other.

An error measured over a banned logit of -1e9 and one of 3.0 is that of the first alone; so is that
over a channel of thousands and one of units. Each part is measured for itself:

    scale of an entry    s = |ref|, or the largest |ref| of its channel or row that is large
                         throughout
    part                 the entries whose scales, in order, are each within 32 times the one below;
                         scales under 256 are never parted from one another

What a network computes is mostly below 256, and what is not spreads without a gap: ordinary outputs
are one part. The small beside the large is only parted where the large stands far above it: a
probability of 1e-6 beside one of 1 is accurate enough if it is near 1e-6 to within 1e-3.

A channel or row is large throughout where at least half of its entries are, on both sides of zero
or spread over more than a factor of 8, and no more are small than such a spread gives by chance
(8 n 256 / largest, and one). Their errors are those of the channel, whatever their own magnitude.
Sentinels are on one side of zero and alike, or equal bit for bit on both sides.

Zeros alone are a part only beside one that is equal bit for bit, as a mask of 0 and -1e9 is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

LARGE = 256.0
"""What is below is ordinary; pictures of 8 bits are, too."""

GAP = 32.0
"""How far above all others the scales of a part begin."""

_ALIKE = 8.0
_CHANCE = 8.0
_LOST = 8.0
_NEAR = 2.0**-7


Ranges: TypeAlias = list[tuple[float, float]]


@dataclass(frozen=True)
class Part:
    """Entries of a reference and of an output in one order, and their range of scales.

    `low` is 0.0 where it is below 256.
    """

    reference: Tensor
    output: Tensor
    low: float
    high: float

    @property
    def lost(self) -> int:
        """How many sentinels the output has lost: small there, where the part is near otherwise."""
        if not self.low:
            return 0
        size, found = self.reference.abs(), self.output.abs()
        near = (self.output - self.reference).abs() <= _NEAR * size
        if 2 * int(near.sum()) < near.numel():
            return 0
        return int(((size >= self.low) & (found < self.low / _LOST)).sum())


def split(reference: Tensor, output: Tensor) -> list[Part]:
    """The parts of two tensors of one shape, the lowest first.

    A tensor of one part comes back as it is; else each part is flat.
    """
    return divided(reference, output, *labels(reference, output))


def divided(reference: Tensor, output: Tensor, places: Tensor | None, ranges: Ranges) -> list[Part]:
    """The parts of two tensors whose `labels` these are."""
    if places is None:
        return [Part(reference, output, *ranges[0])]
    return [
        Part(reference[places == place], output[places == place], low, high)
        for place, (low, high) in enumerate(ranges)
    ]


def labels(reference: Tensor, output: Tensor) -> tuple[Tensor | None, list[tuple[float, float]]]:
    """The number of each entry's part, None where all are in one; and each part's range of scales.

    What is infinite or NaN counts as zero.
    """
    largest = peak(reference)
    if largest < LARGE:
        return None, [(0.0, largest)]
    reference, output = reference.detach(), output.detach()
    magnitude = reference.abs().nan_to_num_(nan=0.0, posinf=0.0)
    scale = _scales(reference, output, magnitude)
    cuts = _cuts(scale, reference == output)
    bounds = torch.tensor(cuts, dtype=torch.float64, device=scale.device)
    places = (
        torch.bucketize(scale.contiguous(), bounds.to(scale.dtype), right=True) if cuts else None
    )
    return places, [_range(scale, *ends) for ends in pairwise([0.0, *cuts, math.inf])]


def peak(reference: Tensor) -> float:
    """The largest magnitude, infinite with a NaN; 0 for what is no floating-point tensor."""
    if not reference.numel() or not (reference.is_floating_point() or reference.is_complex()):
        return 0.0
    if reference.is_complex():
        return float(reference.detach().abs().amax())
    low, high = torch.aminmax(reference.detach())
    largest = max(-float(low), float(high))
    return math.inf if math.isnan(largest) else largest


def _scales(reference: Tensor, output: Tensor, magnitude: Tensor) -> Tensor:
    noisy = (magnitude >= LARGE) & (output != reference)
    if not bool(noisy.any()):
        return magnitude
    scale = magnitude
    for axes in dict.fromkeys(_lines(reference.ndim)):
        scale = torch.maximum(scale, _large_throughout(reference, magnitude, noisy, axes))
    return scale


def _lines(rank: int) -> Iterator[tuple[int, ...]]:
    """The axes over which to look: all; all but one, for each; and the last, for rows."""
    axes = tuple(range(rank))
    yield axes
    if rank > 1:
        yield from (axes[:axis] + axes[axis + 1 :] for axis in axes)
        yield axes[-1:]


def _large_throughout(
    reference: Tensor, magnitude: Tensor, noisy: Tensor, axes: tuple[int, ...]
) -> Tensor:
    """The largest magnitude of each line that is large throughout, 0 for others; axes are kept."""
    if not axes:
        return torch.zeros_like(magnitude)
    small = ((magnitude > 0.0) & (magnitude < LARGE)).sum(axes, keepdim=True)
    large = noisy.sum(axes, keepdim=True)
    top = torch.where(noisy, magnitude, 0.0).amax(axes, keepdim=True)
    least = torch.where(noisy, magnitude, math.inf).amin(axes, keepdim=True)
    spread = least.double() * _ALIKE < top.double()
    if not reference.is_complex():
        above, below = (
            (noisy & side).any(dim=axes, keepdim=True) for side in (reference > 0, reference < 0)
        )
        spread |= above & below
    count = magnitude.numel() // max(1, top.numel())
    chance = 1.0 + _CHANCE * count * LARGE / top.double()
    return torch.where((large >= small) & spread & (small <= chance), top, 0.0)


def _cuts(scale: Tensor, equal: Tensor) -> list[float]:
    """The lowest scale of each part but the lowest, ascending."""
    cuts: list[float] = []
    high = float(scale.amax())
    while high >= LARGE:
        low = _lowest_reached(scale, high)
        beneath = float(torch.where(scale < low, scale, 0.0).amax())
        beside_zeros = beneath == 0.0 and bool(equal[scale >= low].all())
        if low < LARGE or not (beneath or beside_zeros):
            break
        cuts.append(low)
        high = beneath
    return cuts[::-1]


def _lowest_reached(scale: Tensor, high: float) -> float:
    """The scale at which steps down from `high`, none of them by more than the gap, end."""
    low, reached = math.inf, high
    while LARGE <= reached < low:
        low = reached
        reached = float(torch.where(scale >= low / GAP, scale, math.inf).amin())
    return reached


def _range(scale: Tensor, low: float, high: float) -> tuple[float, float]:
    inside = (scale >= low) & (scale < high)
    if not bool(inside.any()):
        return 0.0, 0.0
    least = float(torch.where(inside, scale, math.inf).amin())
    return (least if least >= LARGE else 0.0), float(torch.where(inside, scale, 0.0).amax())
