"""Histogram: how values are distributed, learnt from a stream, and the range worth quantizing.

Bin k counts the values in [k·2ᵉ, (k+1)·2ᵉ). When a value falls outside, e grows and bin k moves
into bin k >> 1: an exact merge, since the edges of the coarser grid are edges of the finer one. The
e that remains is the least one with which all values fit, so the counts don't depend on how the
stream was cut into batches.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from fxopt.errors import PassError

RangeMethod = Literal["minmax", "percentile", "mse"]

# Widths below the least normal float32 would overflow as reciprocals; what is smaller shares a bin.
_FINEST = -126
# Values that are all (nearly) equal need no more bins than a float32 has steps around them.
_SPAN = 30
_CHUNK = 1 << 20
_CANDIDATES = 64


class Histogram:
    """The distribution of all finite values seen, in `bins` bins of equal width.

    `low` and `high` are the exact extremes (0.0 before any value), `count` the number of finite
    values, `infinite` the number of infinite ones, which enter no range. Needs memory for the bins
    alone.
    """

    def __init__(self, bins: int = 2048) -> None:
        if bins < 2:
            raise PassError(f"Histogram(bins={bins!r}): at least 2 bins are needed")
        self.bins = bins
        self.low = self.high = 0.0
        self.count = self.infinite = 0
        self._counts = torch.zeros(bins, dtype=torch.int64)
        self._first = 0
        self._exponent = _FINEST

    @property
    def is_constant(self) -> bool:
        """Whether all values seen are one and the same."""
        return self.count > 0 and self.low == self.high

    def update(self, value: Tensor) -> None:
        """Count the entries of `value`, of any shape and real dtype."""
        flat = value.detach().reshape(-1)
        flat = flat.to(torch.float64 if flat.dtype == torch.float64 else torch.float32)
        for chunk in flat.split(_CHUNK):
            self._update(chunk)

    def range(
        self, method: RangeMethod = "mse", symmetric: bool = False, percentile: float = 99.99
    ) -> tuple[float, float]:
        """The (low, high) to quantize with 8 bits; low <= 0 <= high, since zero must stay exact.

        `"minmax"` keeps all values. `"percentile"` keeps `percentile` % of them by count: the same
        share is cut at either end or, if `symmetric`, of the largest magnitudes. `"mse"` has the
        least expected squared error, step²/12 for each value inside and the squared distance to the
        range for each outside, over 255 steps (254 if symmetric, where low = -high).
        Source: Wu et al., "Integer Quantization for Deep Learning Inference" (2020), calibration.

        Raises `PassError` for another method, or a percentile that isn't in (0, 100].
        """
        name: str = method
        if name not in get_args(RangeMethod):
            raise PassError(f"range {method!r} is unknown: use one of {get_args(RangeMethod)}")
        if not 0.0 < percentile <= 100.0:
            raise PassError(f"percentile={percentile!r}: must lie in (0, 100]")
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if low == high:
            return low, high
        if symmetric:
            low, high = -max(-low, high), max(-low, high)
        if method == "minmax":
            return low, high
        candidates = _Candidates(self._counts, self._first, 2.0**self._exponent, low, high)
        if method == "percentile":
            return candidates.percentile(percentile / 100.0, symmetric)
        return candidates.least_error(symmetric)

    def _update(self, flat: Tensor) -> None:
        flat = self._finite(flat)
        if not flat.numel():
            return
        low, high = (extreme.item() for extreme in flat.aminmax())
        self.low = min(self.low, low) if self.count else low
        self.high = max(self.high, high) if self.count else high
        self.count += flat.numel()
        self._fit()
        index = (flat * 2.0**-self._exponent).floor_().to(torch.int64)
        # Where the processor flushes denormals to zero, a small negative product loses its sign.
        index.masked_fill_((flat < 0) & (index == 0), -1)
        index.sub_(self._first).clamp_(0, self.bins - 1)
        self._counts += torch.bincount(index, minlength=self.bins).cpu()

    def _finite(self, flat: Tensor) -> Tensor:
        finite = flat.isfinite()
        if bool(finite.all()):
            return flat
        self.infinite += int(flat.isinf().sum())
        return flat[finite]

    def _fit(self) -> None:
        """The coarsest grid so far or, if need be, the least coarser one that holds all values."""
        exponent = self._exponent
        largest = max(-self.low, self.high)
        if largest:
            exponent = max(exponent, math.frexp(largest)[1] - _SPAN)
        spread = self.high - self.low
        if 0.0 < spread < math.inf:
            exponent = max(exponent, math.frexp(spread / self.bins)[1] - 1)
        while _bin(self.high, exponent) - _bin(self.low, exponent) >= self.bins:
            exponent += 1
        old = torch.nonzero(self._counts).reshape(-1)
        moved = (old + self._first) >> min(exponent - self._exponent, 62)
        counts = self._counts[old]
        self._first, self._exponent = _bin(self.low, exponent), exponent
        self._counts = torch.zeros_like(self._counts).index_add_(0, moved - self._first, counts)


class _Candidates:
    """The edges at which a range may end, and the first three moments of what lies below each."""

    def __init__(self, counts: Tensor, first: int, width: float, low: float, high: float) -> None:
        count = counts.double()
        self.edges = (torch.arange(len(counts) + 1, dtype=torch.float64) + first) * width
        centers = ((self.edges[:-1] + self.edges[1:]) / 2).clamp(low, high)
        moments = torch.stack([count, count * centers, count * centers.square()])
        self.below = torch.nn.functional.pad(moments.cumsum(1), (1, 0))
        self.first, self.width = first, width
        self.low, self.high = low, high

    def percentile(self, share: float, symmetric: bool) -> tuple[float, float]:
        """The narrowest range, to a bin, with at least `share` of the values inside."""
        count = self.below[0]
        total = count[-1].item()
        if symmetric:
            tops = self._tops()
            inside = self._under(tops)[0] - self._under(-tops)[0]
            top = tops[int((inside >= share * total).nonzero()[0])].item()
            return -top, top
        cut = (1.0 - share) / 2 * total
        low = self.edges[int((count <= cut).nonzero()[-1])].item()
        high = self.edges[int((total - count <= cut).nonzero()[0])].item()
        return min(max(low, self.low), 0.0), max(min(high, self.high), 0.0)

    def least_error(self, symmetric: bool) -> tuple[float, float]:
        """The range of least expected squared error, searched on a coarse grid, then a fine one."""
        if symmetric:
            tops = self._tops()
            top = tops[int(self._error(-tops, tops, 254).argmin())].item()
            return -top, top
        lows, highs = self._lows(), self._highs()
        stride = max(len(lows), len(highs)) // _CANDIDATES + 1
        rows, columns = torch.arange(0, len(lows), stride), torch.arange(0, len(highs), stride)
        while True:
            best = int(self._error(lows[rows, None], highs[None, columns], 255).argmin())
            low, high = int(rows[best // len(columns)]), int(columns[best % len(columns)])
            if stride == 1:
                return lows[low].item(), highs[high].item()
            rows = torch.arange(max(low - stride, 0), min(low + stride + 1, len(lows)))
            columns = torch.arange(max(high - stride, 0), min(high + stride + 1, len(highs)))
            stride = 1

    def _tops(self) -> Tensor:
        """Magnitudes at which a symmetric range may end, ascending."""
        edges = self.edges.abs().unique()
        return torch.cat([edges[(edges > 0) & (edges < self.high)], _one(self.high)])

    def _lows(self) -> Tensor:
        """Where a range may begin, from its widest on."""
        return torch.cat([_one(self.low), self.edges[(self.edges > self.low) & (self.edges <= 0)]])

    def _highs(self) -> Tensor:
        """Where a range may end, from its widest on."""
        edges = self.edges[(self.edges >= 0) & (self.edges < self.high)]
        return torch.cat([_one(self.high), edges.flip(0)])

    def _under(self, ends: Tensor) -> Tensor:
        """Count, sum and sum of squares of the values below `ends` [...], as [3, ...]."""
        last = self.below.shape[1] - 1
        index = (ends / self.width).round().to(torch.int64) - self.first
        index[ends <= self.low], index[ends >= self.high] = 0, last
        return self.below[:, index.clamp(0, last)]

    def _error(self, low: Tensor, high: Tensor, steps: int) -> Tensor:
        """Sum of the expected squared errors of all values in the ranges [low, high]."""
        under, upto = self._under(low), self._under(high)
        over = self.below[:, -1].reshape(3, *[1] * high.ndim) - upto
        rounding = (upto[0] - under[0]) * ((high - low) / steps).square() / 12
        below = under[2] - 2 * low * under[1] + low.square() * under[0]
        above = over[2] - 2 * high * over[1] + high.square() * over[0]
        return rounding + below + above


def _one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _bin(value: float, exponent: int) -> int:
    return math.floor(math.ldexp(value, -exponent))
