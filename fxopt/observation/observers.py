"""Observers: what calibration keeps of the values at a node, in memory that doesn't grow.

Each sees one value after the other through `update` and holds a summary that doesn't depend on how
the stream was cut into batches (sums: up to rounding). Rows are all axes but the last, channels the
last. Infinite values, which a mask may hold legitimately, enter no summary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fxopt.errors import PassError
from fxopt.observation.histogram import Histogram

__all__ = [
    "ChannelMagnitude",
    "ChannelRange",
    "Histogram",
    "MinMax",
    "Observer",
    "Rows",
    "SecondMoment",
]

# 2³² / golden ratio: no other number's multiples spread more evenly modulo 2³².
# Knuth, "The Art of Computer Programming" 3, section 6.4.
_GOLDEN = 2654435769


class Observer(Protocol):
    """What `observe` feeds: anything that takes one value after the other."""

    def update(self, value: Tensor) -> None:
        """Take in one batch's value of the observed node."""


class MinMax:
    """The least and the largest finite value: `low` and `high`, 0.0 before any value."""

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.count = 0

    @property
    def is_constant(self) -> bool:
        """Whether all values seen are one and the same."""
        return self.count > 0 and self.low == self.high

    def update(self, value: Tensor) -> None:
        """Take in `value`, of any shape and real dtype."""
        value = value.detach()
        if not value.numel():
            return None
        low, high = (float(extreme) for extreme in value.aminmax())
        if not -torch.inf < low <= high < torch.inf:
            return self.update(value[value.isfinite()])
        self.low = min(self.low, low) if self.count else low
        self.high = max(self.high, high) if self.count else high
        self.count += value.numel()
        return None


class ChannelMagnitude:
    """`largest`: the largest finite magnitude of each channel, float32 [K]; empty before any."""

    def __init__(self) -> None:
        self.largest = torch.empty(0)
        self.count = 0

    @property
    def is_constant(self) -> bool:
        """Whether all values seen are zero."""
        return self.count > 0 and not bool(self.largest.any())

    def update(self, value: Tensor) -> None:
        """Take in `value` [..., K]."""
        rows = _finite_or_zero(_rows(value))
        if not rows.numel():
            return
        largest = rows.abs().amax(0)
        self.largest = torch.maximum(self.largest, largest) if self.count else largest
        self.count += rows.numel()


class ChannelRange:
    """`low` and `high`: the least and largest finite value of each channel, float32 [K]; empty
    before any, 0.0 for a channel without."""

    def __init__(self) -> None:
        self.low = self.high = torch.empty(0)
        self.count = 0

    @property
    def is_constant(self) -> bool:
        """Whether no channel has seen two values."""
        return self.count > 0 and bool((self.low == self.high).all())

    def update(self, value: Tensor) -> None:
        """Take in `value` [..., K]."""
        rows = _finite_or_zero(_rows(value))
        if not rows.numel():
            return
        low, high = rows.aminmax(dim=0)
        self.low = torch.minimum(self.low, low) if self.count else low
        self.high = torch.maximum(self.high, high) if self.count else high
        self.count += rows.numel()


class SecondMoment:
    """`matrix`: the sum of x xᵀ over all finite rows x, float32 [K, K]; `rows`: their number."""

    def __init__(self) -> None:
        self.matrix = torch.empty(0, 0)
        self.rows = 0

    @property
    def count(self) -> int:
        """How many values were seen."""
        return self.rows * self.matrix.shape[0]

    @property
    def is_constant(self) -> bool:
        """Whether all values seen are zero."""
        return self.rows > 0 and not bool(self.matrix.diagonal().any())

    def update(self, value: Tensor) -> None:
        """Take in `value` [..., K]."""
        rows = _finite_rows(value)
        if not rows.numel():
            return
        if not self.rows:
            self.matrix = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.matrix.addmm_(rows.t(), rows)
        self.rows += rows.shape[0]


class Rows:
    """`rows`: at most `limit` of the finite rows seen, [<= limit, K] in their order and dtype.

    Row i is kept while i·φ mod 1 is among the `limit` least, φ being the golden ratio: an evenly
    spread sample (the three-gap theorem) that no period of the stream, such as the length of a
    sentence, can align with.
    """

    def __init__(self, limit: int = 512) -> None:
        if limit < 1:
            raise PassError(f"Rows(limit={limit!r}): at least 1 row must be kept")
        self.limit = limit
        self.rows = torch.empty(0, 0)
        self.seen = 0
        self._ranks = torch.empty(0, dtype=torch.int64)

    @property
    def count(self) -> int:
        """How many values were seen."""
        return self.seen * self.rows.shape[-1]

    @property
    def is_constant(self) -> bool:
        """Whether all rows kept are one and the same value."""
        return self.seen > 0 and bool((self.rows == self.rows.reshape(-1)[0]).all())

    def update(self, value: Tensor) -> None:
        """Take in `value` [..., K]."""
        rows = value.detach().reshape(-1, value.shape[-1] if value.ndim else 1)
        rows = rows[rows.isfinite().all(-1)]
        if not rows.numel():
            return
        index = torch.arange(self.seen, self.seen + rows.shape[0], device=rows.device)
        ranks = (index % 2**31 * _GOLDEN) % 2**32
        if self.seen:
            ranks = torch.cat([self._ranks, ranks])
        kept = torch.arange(len(ranks), device=rows.device)
        if len(ranks) > self.limit:
            kept = ranks.topk(self.limit, largest=False).indices.sort().values
        old = kept[kept < len(self.rows)]
        new = rows[kept[len(old) :] - len(self.rows)]
        self.rows = torch.cat([self.rows[old], new]) if self.seen else new
        self._ranks = ranks[kept]
        self.seen += rows.shape[0]


def _finite_or_zero(rows: Tensor) -> Tensor:
    finite = rows.isfinite()
    return rows if bool(finite.all()) else rows.masked_fill(~finite, 0.0)


def _rows(value: Tensor) -> Tensor:
    """`value` as float32 [rows, K]."""
    return value.detach().float().reshape(-1, value.shape[-1] if value.ndim else 1)


def _finite_rows(value: Tensor) -> Tensor:
    rows = _rows(value)
    finite = rows.isfinite().all(-1)
    return rows if bool(finite.all()) else rows[finite]
