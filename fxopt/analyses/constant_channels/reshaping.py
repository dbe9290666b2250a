"""Facts through reshapes, run by run of axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxopt.analyses.constant_channels.facts import fixed_size
from fxopt.analyses.constant_channels.known import Known, uniform
from fxopt.analyses.view_axes import blocks


def reshaped(known: Known, have: Sequence[Any], want: Sequence[Any]) -> Known:
    """The facts of a reshape from `have` to `want`, run by run of axes that hold the same entries.

    Within a run the facts repeat with the period that its last axes of fixed size have.
    """
    old_axes = [axis for axis, size in enumerate(have) if fixed_size(size) != 1]
    new_axes = [axis for axis, size in enumerate(want) if fixed_size(size) != 1]
    known = known.map(lambda t: t.reshape([t.shape[axis] for axis in old_axes]))
    old_sizes = [have[axis] for axis in old_axes]
    new_sizes = [want[axis] for axis in new_axes]
    runs = blocks(old_sizes, new_sizes)
    rest_old, rest_new = (sum(len(run[side]) for run in runs) for side in (0, 1))
    rest = (
        list(range(len(old_sizes) - rest_old)),
        list(range(len(new_sizes) - rest_new)),
    )
    done = 0
    for old, new in (rest, *reversed(runs)):
        period = _fixed_tail([new_sizes[axis] for axis in new])
        known, length = _merge(known, done, [old_sizes[axis] for axis in old], period)
        tail = _tail_shape([new_sizes[axis] for axis in new])
        shape = [1] * len(new) if length == 1 else [1] * (len(new) - len(tail)) + tail
        known = known.map(
            lambda t, at=done, shape=shape: t.reshape(  # type: ignore[misc]
                *t.shape[:at], *shape, *t.shape[at + 1 :]
            )
        )
        done += len(new)
    sizes = dict(zip(new_axes, known.shape, strict=True))
    return known.map(lambda t: t.reshape([sizes.get(axis, 1) for axis in range(len(want))]))


def _merge(known: Known, at: int, sizes: list[Any], period: int) -> tuple[Known, int]:
    """The axes from `at` on, of `sizes`, as one: of length `period`, or 1 where nothing differs."""
    axes = range(at, at + len(sizes))
    if not all(known.shape[axis] == 1 for axis in axes):
        tail = _tail_shape(sizes)
        inner = axes[len(axes) - len(tail) :]
        known = _required(uniform(known, axes[: len(axes) - len(tail)]))
        for axis, size in zip(inner, tail, strict=True):
            known = known.filled(axis, size)
        length = math.prod(tail)
        if period % length and length % period:
            known = _required(uniform(known, inner))
    held = math.prod(known.shape[axis] for axis in axes)

    def merge(t: Tensor) -> Tensor:
        before, after = t.shape[:at], t.shape[at + len(sizes) :]
        if held == 1:
            return t.reshape(*before, 1, *after)
        if held > period:
            return t.reshape(*before, held // period, period, *after)
        copies = period // held
        flat = t.reshape(*before, 1, held, *after)
        return flat.expand(*before, copies, held, *after).reshape(*before, period, *after)

    known = known.map(merge)
    if held > max(period, 1):
        known = known.along(at).map(lambda t: t.squeeze(at))
    return known, 1 if held == 1 else period


def _required(known: Known | None) -> Known:
    assert known is not None
    return known


def _tail_shape(sizes: Sequence[Any]) -> list[int]:
    """The last sizes, as many as are the same in every call."""
    fixed: list[int] = []
    for size in map(fixed_size, reversed(sizes)):
        if size is None:
            break
        fixed.insert(0, size)
    return fixed


def _fixed_tail(sizes: Sequence[Any]) -> int:
    return math.prod(_tail_shape(sizes))
