"""Known: which entries of a value are constants, and the algebra of such facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Known:
    """Which entries of a tensor are constants, and which.

    `mask` (bool) and `values` have one shape: each axis is as long as the tensor's or of length 1,
    which says the same of all positions along it; axes whose size is only known at run time are of
    length 1. `values` are float64 (integers and booleans as they are); state, and what is computed
    from state alone, has the program's own dtype. Where `mask` is False they mean nothing.
    """

    mask: Tensor
    values: Tensor

    @classmethod
    def everywhere(cls, values: Tensor) -> Known:
        """Each entry is known."""
        return cls(torch.ones((), dtype=torch.bool, device=values.device).expand_as(values), values)

    @property
    def ndim(self) -> int:
        """The rank."""
        return self.mask.ndim

    @property
    def shape(self) -> torch.Size:
        """The shape that both tensors have."""
        return self.mask.shape

    @property
    def is_complete(self) -> bool:
        """Whether all entries are known."""
        # One element expanded, as a whole weight has it, isn't worth a walk over all.
        if self.mask.numel() and not any(self.mask.stride()):
            return bool(self.mask[(0,) * self.ndim])
        return bool(self.mask.all())

    @property
    def zeros(self) -> Tensor:
        """Which entries are known to be zero: a mask of the same shape."""
        return self.mask & (self.values == 0)

    def map(self, function: Callable[[Tensor], Tensor]) -> Known:
        """`function`, which only moves entries, of both tensors."""
        return Known(function(self.mask), function(self.values))

    def only(self, mask: Tensor) -> Known:
        """What is known where `mask`, which broadcasts to this shape, holds as well."""
        return Known(self.mask & mask, self.values)

    def wide(self) -> Tensor:
        """The values in float64 where they are floating point, 0 where they mean nothing."""
        values = self.values.double() if self.values.is_floating_point() else self.values
        return torch.where(self.mask, values, torch.zeros((), dtype=values.dtype).to(values.device))

    def along(self, axis: int) -> Known:
        """What holds at every position of `axis`, with length 1 there."""
        if self.mask.shape[axis] == 1:
            return self
        first = self.values.narrow(axis, 0, 1)
        same = self.mask & (self.values == first)
        return Known(same.all(axis, keepdim=True), first)

    def compressed(self, axis: int) -> Known:
        """The same with length 1 along `axis`, if nothing is lost by it."""
        uniform = self.along(axis)
        return uniform if torch.equal(uniform.mask.expand_as(self.mask), self.mask) else self

    def channels(self, axis: int, size: int) -> Known:
        """What holds at every position of all other axes: of shape [size]."""
        known, axis = self, axis % self.ndim
        for other in range(self.ndim):
            if other != axis:
                known = known.along(other)
        return known.map(lambda t: t.reshape(-1).expand(size))

    def filled(self, axis: int, size: int) -> Known:
        """The same with its full length along `axis`."""
        shape = [-1] * self.ndim
        shape[axis] = size
        return self.map(lambda t: t.expand(shape))


def product(one: Known | None, other: Known | None) -> Known | None:
    """x * y entry by entry: known where both are, and zero where either is zero."""
    if one is None or other is None:
        factor = one or other
        if factor is None:
            return None
        return Known(factor.zeros, torch.zeros_like(factor.values, dtype=torch.float64))
    zeros = one.zeros | other.zeros
    return Known((one.mask & other.mask) | zeros, one.wide() * other.wide())


def total(one: Known | None, other: Known | None) -> Known | None:
    """x + y entry by entry: known where both are."""
    if one is None or other is None:
        return None
    return Known(one.mask & other.mask, one.wide() + other.wide())


def chosen(condition: Known | None, one: Known | None, other: Known | None) -> Known | None:
    """where(condition, x, y): the one that is chosen, or what both are."""
    both = None
    if one is not None and other is not None:
        values = one.wide()
        both = _fitted(one.mask & other.mask & (values == other.wide()), values)
    if condition is None:
        return both
    condition = Known(condition.mask, condition.values.bool())
    picked = [
        None if side is None else _fitted(side.mask & condition.mask & where, side.wide())
        for side, where in ((one, condition.values), (other, ~condition.values))
    ]
    return either(either(picked[0], picked[1]), both)


def either(one: Known | None, other: Known | None) -> Known | None:
    """What one or the other says of one value; they don't contradict each other."""
    if one is None or other is None:
        return one or other
    values = torch.where(one.mask, one.wide(), other.wide())
    return Known(one.mask | other.mask, values)


def spread(known: Known | None, after: int) -> Known | None:
    """Facts of shape [C] as those of [C, 1, ...], with `after` axes after the first."""
    return None if known is None else known.map(lambda t: t.reshape(-1, *(1,) * after))


def uniform(known: Known | None, axes: Sequence[int]) -> Known | None:
    """What holds at every position of all of `axes`."""
    for axis in axes:
        known = None if known is None else known.along(axis)
    return known


def _fitted(mask: Tensor, values: Tensor) -> Known:
    return Known(mask, values.expand(mask.shape))
