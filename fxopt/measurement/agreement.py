"""How far rows of one model's output stand from another's, summed batch by batch in float64.

SQNR     10 log10( sum ref² / sum (out - ref)² )            decibels
cosine   ref · out / (|ref| |out|)                           of each row
KL       sum p (log p - log q),  p = softmax(ref)            nats, of each row
top-1    argmax ref = argmax out                             share of the rows

SQNR and cosine are taken in each part of the entries that stands apart in magnitude
(`fxopt.parts`), of which the worst counts: a banned logit of -1e9 would hide all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.claim import decibels, powers, unit
from fxopt.parts import GAP, Part, split

# A float64 piece of each of the two, whatever the size of the batch: 32 MB.
_PIECE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Tally:
    """The powers of one part over all rows seen, in units of `unit(high)`^2, and its scales."""

    low: float
    high: float
    signal: float
    noise: float

    @property
    def db(self) -> float:
        """Decibels of signal over noise."""
        return decibels(self.signal, self.noise)

    @staticmethod
    def of(part: Part) -> Tally:
        """The tally of one batch's part; infinitely noisy where a sentinel is lost."""
        signal, noise = powers(part)
        return Tally(part.low, part.high, signal, math.inf if part.lost else noise)

    def plus(self, other: Tally) -> Tally:
        """Both together."""
        high = max(self.high, other.high)
        mine, others = ((unit(one.high) / unit(high)) ** 2 for one in (self, other))
        return Tally(
            min(self.low, other.low),
            high,
            self.signal * mine + other.signal * others,
            self.noise * mine + other.noise * others,
        )


class Agreement:
    """Sums over pairs of rows `[rows, features]`; what they come to is in the properties.

    Rows in which the reference holds a NaN, or another infinity than the candidate, say nothing of
    the candidate and are only counted, in `blind`; `broken` counts those in which the candidate
    alone does. The same infinity on both sides (a masked logit) counts as equal.
    """

    def __init__(self) -> None:
        self.rows = self.blind = self.broken = 0
        self.features = 0
        self.tallies: list[Tally] = []
        self._cosines = self._divergence = self._worst_divergence = 0.0
        self._lowest = math.inf
        self._agreed = 0

    def add(self, reference: Tensor, candidate: Tensor) -> None:
        """Take in rows of both, of one shape `[rows, features]` and any floating-point dtype."""
        self.features = reference.shape[-1]
        size = max(1, _PIECE_ELEMENTS // max(1, self.features))
        pairs = zip(reference.split(size), candidate.to(reference.device).split(size), strict=True)
        for ref, out in pairs:
            self._add(ref.detach().double(), out.detach().double())

    @property
    def sqnr_db(self) -> float:
        """Decibels of the worst part; inf when equal, -inf where the candidate holds a NaN."""
        if self.broken:
            return -math.inf
        return min((tally.db for tally in self.tallies), default=math.inf)

    @property
    def cosine_mean(self) -> float | None:
        """None for rows of one feature, and where the candidate holds a NaN or infinity."""
        return self._cosines / self.rows if self._has_rows and not self.broken else None

    @property
    def cosine_min(self) -> float | None:
        """As `cosine_mean`."""
        return self._lowest if self._has_rows and not self.broken else None

    @property
    def kl(self) -> float | None:
        """Nats, the mean over rows; None for rows of one feature."""
        if not self._has_rows:
            return None
        return math.inf if self.broken else self._divergence / self.rows

    @property
    def kl_max(self) -> float | None:
        """Nats of the worst row; None for rows of one feature."""
        if not self._has_rows:
            return None
        return math.inf if self.broken else self._worst_divergence

    @property
    def top1(self) -> float | None:
        """Share of rows; None for rows of one feature."""
        return self._agreed / (self.rows + self.broken) if self._has_rows else None

    @property
    def _has_rows(self) -> bool:
        return self.features > 1 and self.rows + self.broken > 0

    def _add(self, ref: Tensor, out: Tensor) -> None:
        same = (ref == out) & ref.isinf()
        seen, sound = (torch.isfinite(ref) | same).all(-1), (torch.isfinite(out) | same).all(-1)
        self.blind += int((~seen).sum())
        self.broken += int((seen & ~sound).sum())
        kept = seen & sound
        ref, out, same = ref[kept], out[kept], same[kept]
        if not len(ref):
            return
        self.rows += len(ref)
        if self.features > 1:
            divergence = _divergence(ref, out)
            self._divergence += float(divergence.sum())
            self._worst_divergence = max(self._worst_divergence, float(divergence.max()))
            self._agreed += int((ref.argmax(-1) == out.argmax(-1)).sum())
        ref, out = ref.masked_fill(same, 0.0), out.masked_fill(same, 0.0)
        parts = split(ref, out)
        self.tallies = _merged([*self.tallies, *map(Tally.of, parts)])
        cosine = torch.stack([_cosine_of(part) for part in parts]).amin(0)
        self._cosines += float(cosine.sum())
        self._lowest = min(self._lowest, float(cosine.min()))


def _merged(tallies: Iterable[Tally]) -> list[Tally]:
    """Those of different batches that would be one part in a batch of all rows, added up."""
    merged: list[Tally] = []
    for tally in sorted(tallies, key=lambda one: one.low):
        if merged and tally.low <= GAP * merged[-1].high:
            merged[-1] = merged[-1].plus(tally)
        else:
            merged.append(tally)
    return merged


def _cosine_of(part: Part) -> Tensor:
    ref, out, outside = part.reference, part.output, part.outside
    if outside is None:
        return _cosine(ref, out)
    return _cosine(ref.masked_fill(outside, 0.0), out.masked_fill(outside, 0.0))


def _cosine(ref: Tensor, out: Tensor) -> Tensor:
    """Of each row; two rows of zeros are alike, one is at right angles to all others."""
    lengths = ref.norm(dim=-1) * out.norm(dim=-1)
    both_zero = (ref == 0).all(-1) & (out == 0).all(-1)
    cosine: Tensor = (ref * out).sum(-1) / lengths.clamp_min(torch.finfo(torch.float64).tiny)
    return cosine.clamp(-1.0, 1.0).masked_fill(both_zero, 1.0)


def _divergence(ref: Tensor, out: Tensor) -> Tensor:
    log_p, log_q = ref.log_softmax(-1), out.log_softmax(-1)
    p = log_p.exp()
    terms: Tensor = p * (log_p - log_q)
    return terms.masked_fill(p == 0.0, 0.0).sum(-1).clamp_min(0.0)
