"""Where a value of a program lies: memory, an offset, sizes and strides, all of them numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

Sizes = tuple[int, ...]


@dataclass(eq=False)
class Buffer:
    """Memory that an instruction may read or write.

    `place` says whose it is: the call's own, or tensor number `index` among those that are held,
    given, returned or made by an operator. Own memory has `size` bytes and, once it is placed, an
    `offset`.
    """

    place: Literal["own", "held", "input", "output", "result"]
    index: int = 0
    size: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Array:
    """A strided view of a buffer; offset and strides in entries."""

    buffer: Buffer
    sizes: Sizes
    strides: Sizes
    dtype: torch.dtype
    offset: int = 0

    @property
    def count(self) -> int:
        """How many entries it has."""
        return math.prod(self.sizes)

    @property
    def is_dense(self) -> bool:
        """Whether the entries lie one after the other."""
        expected = contiguous(self.sizes)
        pairs = zip(self.sizes, self.strides, expected, strict=True)
        return all(size == 1 or stride == wanted for size, stride, wanted in pairs)

    def permuted(self, axes: Sequence[int]) -> Array:
        """Its axes in the order `axes`."""
        sizes, strides = (tuple(one[a] for a in axes) for one in (self.sizes, self.strides))
        return replace(self, sizes=sizes, strides=strides)

    def cut(self, axis: int, start: int, size: int, step: int = 1) -> Array:
        """`size` entries of an axis from `start` on, every `step`-th."""
        sizes, strides = list(self.sizes), list(self.strides)
        sizes[axis], strides[axis] = size, strides[axis] * step
        offset = self.offset + start * self.strides[axis]
        return replace(self, sizes=tuple(sizes), strides=tuple(strides), offset=offset)

    def expanded(self, sizes: Sizes) -> Array:
        """Broadcast to `sizes`."""
        added = len(sizes) - len(self.sizes)
        own = zip(self.sizes, self.strides, sizes[added:], strict=True)
        strides = (0,) * added + tuple(0 if a != b else stride for a, stride, b in own)
        return replace(self, sizes=sizes, strides=strides)

    def viewed(self, sizes: Sizes) -> Array | None:
        """The same entries in other sizes, where strides can say it."""
        strides = _strides_as(self, sizes)
        return None if strides is None else replace(self, sizes=sizes, strides=strides)


def contiguous(sizes: Sequence[int]) -> Sizes:
    """The strides of entries that lie one after the other."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(1, size)
    return tuple(reversed(strides))


def _strides_as(array: Array, sizes: Sizes) -> Sizes | None:
    """Strides for `sizes`: each run of old axes that lie together is cut up anew."""
    runs = merged(array.sizes, (array.strides,))
    strides = [0] * len(sizes)
    axis = len(sizes) - 1
    for size, (stride,) in reversed(runs):
        left, step = size, stride
        while axis >= 0 and (left > 1 or sizes[axis] == 1):
            if left % sizes[axis]:
                return None
            strides[axis] = step
            left //= sizes[axis]
            step *= sizes[axis]
            axis -= 1
        if left > 1:
            return None
    if any(size != 1 for size in sizes[: axis + 1]):
        return None
    return tuple(strides)


def merged(sizes: Sizes, strides: Sequence[Sizes]) -> list[tuple[int, Sizes]]:
    """Sizes and the strides of each operand, with axes put together where all operands allow it."""
    runs: list[tuple[int, Sizes]] = []
    for axis, size in enumerate(sizes):
        steps = tuple(one[axis] for one in strides)
        if size == 1:
            continue
        if runs and all(b == a * size for a, b in zip(steps, runs[-1][1], strict=True)):
            runs[-1] = (runs[-1][0] * size, steps)
        else:
            runs.append((size, steps))
    return runs
