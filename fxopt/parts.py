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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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

# Two float64 pieces and their difference stay in a core's cache.
_CACHED_ELEMENTS = 1 << 15
_DEVICE_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Part:
    """Those entries of two tensors of one shape whose `scale` is from `start` to `high`.

    All are where `scale` is None. `low` is the least scale inside, 0.0 where it is below 256.
    """

    reference: Tensor
    output: Tensor
    scale: Tensor | None
    start: float
    low: float
    high: float

    @property
    def count(self) -> int:
        """How many entries there are."""
        outside = self.outside
        return self.reference.numel() - (0 if outside is None else int(outside.sum()))

    @property
    def outside(self) -> Tensor | None:
        """Which entries are in other parts; None where all are in this one."""
        return None if self.scale is None else self._is_outside(self.scale)

    @property
    def lost(self) -> int:
        """How many sentinels the output has lost: small there, where the part is near otherwise."""
        if self.scale is None or not self.low:
            return 0
        near = lost = 0
        for ref, out in self.pieces():
            size = ref.abs()
            near += int(((out - ref).abs() <= _NEAR * size).logical_and_(size >= self.low).sum())
            lost += int((size >= self.low).logical_and_(out.abs() < self.low / _LOST).sum())
        return lost if lost and 2 * near >= self.count else 0

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Both as flat float64 (or complex128) pieces, side by side; entries outside are zero."""
        if self.scale is None:
            yield from pieces(self.reference, self.output)
            return
        for ref, out, scale in pieces(self.reference, self.output, self.scale):
            outside = self._is_outside(scale)
            yield ref.masked_fill(outside, 0.0), out.masked_fill(outside, 0.0)

    def _is_outside(self, scale: Tensor) -> Tensor:
        return (scale < self.start).logical_or_(scale > self.high)


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape as flat float64 (or complex128) pieces, side by side.

    A wide copy of a whole output is fresh memory, and writing that costs far more than the sums.
    """
    for chunks in zip(*map(_chunks, tensors), strict=True):
        yield tuple(map(_wide, chunks))


def split(reference: Tensor, output: Tensor) -> list[Part]:
    """The parts of two tensors of one shape, the lowest first.

    What is infinite or NaN counts as zero.
    """
    largest = peak(reference)
    if largest < LARGE:
        return [Part(reference, output, None, 0.0, 0.0, largest)]
    reference, output = reference.detach(), output.detach()
    magnitude = reference.abs().nan_to_num_(nan=0.0, posinf=0.0)
    scale = _scales(reference, output, magnitude)
    ranges = _ranges(scale, reference, output)
    if len(ranges) == 1:
        return [Part(reference, output, None, 0.0, *ranges[0])]
    starts = [0.0, *(low for low, _ in ranges[1:])]
    return [
        Part(reference, output, scale, start, low, high)
        for start, (low, high) in zip(starts, ranges, strict=True)
    ]


def peak(reference: Tensor) -> float:
    """The largest magnitude, infinite with a NaN; 0 for what is no floating-point tensor."""
    if not reference.numel() or not (reference.is_floating_point() or reference.is_complex()):
        return 0.0
    if reference.is_complex():
        return float(reference.detach().abs().amax())
    low, high = torch.aminmax(reference.detach())
    largest = max(-float(low), float(high))
    return math.inf if math.isnan(largest) else largest


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    size = _CACHED_ELEMENTS if tensor.device.type == "cpu" else _DEVICE_ELEMENTS
    return (chunk for chunk in tensor.detach().reshape(-1).split(size) if chunk.numel())


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _scales(reference: Tensor, output: Tensor, magnitude: Tensor) -> Tensor:
    noisy = (magnitude >= LARGE).logical_and_(output != reference)
    if not reference.ndim or not bool(noisy.any()):
        return magnitude
    entries = _Lines.of(reference, magnitude, noisy)
    *leading, last = range(reference.ndim)
    rows = entries.over([last])
    whole = rows.over(leading).top_throughout()
    if bool(whole):
        return torch.maximum(magnitude, whole)  # no line's largest is above that of all
    families = [rows, *(rows.over([one for one in leading if one != axis]) for axis in leading)]
    if leading:
        families.append(entries.over(leading))
    scale = magnitude
    for lines in families:
        scale = torch.maximum(scale, lines.top_throughout())
    return scale


@dataclass(frozen=True)
class _Lines:
    """Of each line, such as a row or channel: how many entries it has, how many of them are small,
    how many large and noisy, and of the latter the highest, the lowest, and the least magnitude."""

    entries: int
    small: Tensor
    large: Tensor
    highest: Tensor
    lowest: Tensor
    least: Tensor

    @staticmethod
    def of(reference: Tensor, magnitude: Tensor, noisy: Tensor) -> _Lines:
        """Each entry a line. Complex numbers have no sign."""
        value = magnitude if reference.is_complex() else reference
        return _Lines(
            1,
            (magnitude > 0.0).logical_and_(magnitude < LARGE),
            noisy,
            value.where(noisy, -math.inf),
            value.where(noisy, math.inf),
            magnitude.where(noisy, math.inf),
        )

    def over(self, axes: Sequence[int]) -> _Lines:
        """Lines along these axes together, which are kept with size 1."""
        if not axes:
            return self
        return _Lines(
            self.entries * math.prod(self.small.shape[axis] for axis in axes),
            self.small.sum(axes, keepdim=True),
            self.large.sum(axes, keepdim=True),
            self.highest.amax(axes, keepdim=True),
            self.lowest.amin(axes, keepdim=True),
            self.least.amin(axes, keepdim=True),
        )

    def top_throughout(self) -> Tensor:
        """The largest magnitude of each line that is large throughout, 0 for others."""
        top = torch.maximum(self.highest, -self.lowest)
        spread = self.least.double() * _ALIKE < top.double()
        spread |= (self.highest > 0.0) & (self.lowest < 0.0)
        chance = 1.0 + _CHANCE * self.entries * LARGE / top.double()
        throughout = (self.large >= self.small) & spread & (self.small <= chance)
        return top.where(throughout & (self.large > 0), 0.0)


def _ranges(scale: Tensor, reference: Tensor, output: Tensor) -> list[tuple[float, float]]:
    """The least and the largest scale of each part, ascending; the first is 0 below 256."""
    ranges: list[tuple[float, float]] = []
    high = float(scale.amax())
    while high >= LARGE:
        low = _lowest_reached(scale, high)
        beneath = max(float(chunk.where(chunk < low, 0.0).amax()) for chunk in _chunks(scale))
        if low < LARGE:
            break
        if not beneath and not _stands_beside_zeros(scale, low, reference, output):
            return [(low, high), *ranges]
        ranges.insert(0, (low, high))
        high = beneath
    return [(0.0, high), *ranges]


def _stands_beside_zeros(scale: Tensor, low: float, reference: Tensor, output: Tensor) -> bool:
    inside = scale >= low
    return not bool(inside.all()) and bool((reference == output)[inside].all())


def _lowest_reached(scale: Tensor, high: float) -> float:
    """The scale at which steps down from `high`, none of them by more than the gap, end."""
    low, reached = math.inf, high
    while LARGE <= reached < low:
        low = reached
        least = low / GAP
        reached = min(
            float(chunk.where(chunk >= least, math.inf).amin()) for chunk in _chunks(scale)
        )
    return reached
