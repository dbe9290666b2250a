"""How a scale lies along the tensor it scales, in the three ways that ONNX knows.

    q [..]        s [], [1], [1, 1]       per tensor     s as a scalar
    q [N, K]      s [N, 1]                per axis 0     s as [N]
    q [N, G, g]   s [N, G, 1]             in blocks      of g along axis 2, s as it is

Source: the ONNX operator documentation, DequantizeLinear-21.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Sizes = Sequence[int | None]
"""Sizes of a tensor; None where a size is dynamic."""


@dataclass(frozen=True)
class Placement:
    """Where a scale lies: per tensor, along `axis`, or in blocks of `block` along it."""

    kind: Literal["tensor", "axis", "blocks"]
    axis: int = 1
    block: int = 0


def place(sizes: Sizes, scale: Sizes) -> Placement | None:
    """How `scale` lies along a tensor of `sizes` that it broadcasts against (or divides in blocks).

    None where ONNX can't say it: sizes that are dynamic, or scales that differ along two axes.
    """
    if all(size == 1 for size in scale):
        return Placement("tensor")
    if len(scale) > len(sizes) or None in scale:
        return None
    padded = (*[1] * (len(sizes) - len(scale)), *scale)
    several = [axis for axis, size in enumerate(padded) if size != 1]
    if len(several) == 1 and sizes[several[0]] == padded[several[0]]:
        return Placement("axis", several[0])
    return _blocks(sizes, scale) if len(scale) == len(sizes) else None


def _blocks(sizes: Sizes, scale: Sizes) -> Placement | None:
    unequal = [axis for axis, size in enumerate(sizes) if size != scale[axis]]
    if len(unequal) != 1:
        return None
    (axis,) = unequal
    size, count = sizes[axis], scale[axis]
    if not size or not count or size % count:
        return None
    return Placement("blocks", axis, size // count)
