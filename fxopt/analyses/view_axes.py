"""Which channel each element of a view belongs to, followed up to what the view is of.

Sizes may be symbolic; axes that hold channels have numbers as sizes. Where a view can't be followed
the answer is the reason, a string.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from fxopt.nodes import label, same_sizes
from fxopt.operators.views import EXPANSIONS, PERMUTATIONS, RESHAPES, RESHAPES_LIKE, permutation

aten = torch.ops.aten

_VIEWS = frozenset(
    {*RESHAPES, *RESHAPES_LIKE, *PERMUTATIONS, *EXPANSIONS, aten.slice.Tensor, aten.select.int}
)


@dataclass(frozen=True)
class Layout:
    """Where the channels of one value lie in another.

    `index` has one dimension for each of `axes` (ascending) and holds the channel of each position,
    -1 where there is none; the channel is the same along all other axes. `ties` [K] gives equal
    numbers to channels that share an element upstream.
    """

    axes: tuple[int, ...]
    index: Tensor
    ties: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        if not self.ties.numel() and self.index.numel():
            object.__setattr__(self, "ties", torch.arange(int(self.index.max()) + 1))

    @classmethod
    def of_last_axis(cls, value: fx.Node) -> Layout:
        """The channels of `value` itself: its last axis, in order."""
        tensor = value.meta["val"]
        return cls((tensor.ndim - 1,), torch.arange(int(tensor.shape[-1])))

    def is_last_axis_of(self, value: fx.Node, index: Tensor) -> bool:
        """Whether the channels are the last axis of `value` in the order of `index`, untied."""
        return (
            self.axes == (value.meta["val"].ndim - 1,)
            and torch.equal(self.index, index)
            and torch.equal(self.ties, torch.arange(len(self.ties)))
        )

    def padded(self, axis: int, before: int, size: int) -> Layout:
        """The same channels inside a longer axis, after `before` positions without any."""
        place = self.axes.index(axis)
        shape = list(self.index.shape)
        length, shape[place] = shape[place], size
        index = torch.full(shape, -1)
        index.narrow(place, before, length).copy_(self.index)
        return replace(self, index=index)

    def with_axis(self, axis: int, size: int, at: int) -> Layout:
        """A new axis before which the others stay; the channels are at position `at` of it."""
        axes = tuple(old + (old >= axis) for old in self.axes)
        place = sum(old < axis for old in axes)
        lifted = replace(
            self,
            axes=(*axes[:place], axis, *axes[place:]),
            index=self.index.unsqueeze(place),
        )
        return lifted.padded(axis, at % size, size)

    def split_repeats(self, axis: int, groups: Any) -> Layout | str:
        """Channels along `axis` tied where `groups` groups each repeat one element."""
        if axis not in self.axes:
            return self
        if not isinstance(groups, int):
            return "the number of key/value heads isn't fixed"
        place = self.axes.index(axis)
        repeats = self.index.shape[place] // groups
        grouped = self.index.unflatten(place, (groups, repeats))
        return _tied(self, self.axes, grouped, place + 1)


def is_view(node: fx.Node) -> bool:
    """Whether `node` shows elements of its operand in another shape and computes nothing."""
    return node.op == "call_function" and node.target in _VIEWS


def through_view(view: fx.Node, layout: Layout) -> Layout | str:
    """The channels of `view`, as they lie in its operand."""
    source = view.args[0]
    assert isinstance(source, fx.Node)
    have, want = source.meta["val"], view.meta["val"]
    if view.target in PERMUTATIONS:
        return _through_permute(permutation(view), layout)
    if view.target in EXPANSIONS:
        return _through_expand(have, want, layout)
    if view.target is aten.slice.Tensor:
        axis = _integer(view.args[1] if len(view.args) > 1 else 0) % have.ndim
        if axis in layout.axes and not same_sizes(have.shape, want.shape):
            return f"{label(view)} cuts channels off"
        return layout
    if view.target is aten.select.int:
        axis = _integer(view.args[1]) % have.ndim
        return replace(layout, axes=tuple(old + (old >= axis) for old in layout.axes))
    found = _through_reshape(have.shape, want.shape, layout)
    return found or f"{label(view)} mixes channels with other axes"


def _integer(argument: object) -> int:
    assert isinstance(argument, int)
    return argument


def _through_permute(order: Sequence[int], layout: Layout) -> Layout:
    axes = [order[axis] for axis in layout.axes]
    places = sorted(range(len(axes)), key=axes.__getitem__)
    return replace(
        layout,
        axes=tuple(axes[place] for place in places),
        index=layout.index.permute(places),
    )


def _through_expand(have: Tensor, want: Tensor, layout: Layout) -> Layout | str:
    added = want.ndim - have.ndim
    for axis in reversed(layout.axes):
        place = layout.axes.index(axis)
        size = layout.index.shape[place]
        if axis < added or not same_sizes(have.shape[axis - added : axis - added + 1], (size,)):
            axes = (*layout.axes[:place], *layout.axes[place + 1 :])
            tied = _tied(layout, axes, layout.index, place)
            if isinstance(tied, str):
                return tied
            layout = tied
    return replace(layout, axes=tuple(axis - added for axis in layout.axes))


def _tied(layout: Layout, axes: tuple[int, ...], index: Tensor, place: int) -> Layout | str:
    """`index` without its dimension `place`, the channels along which share one element."""
    if bool((index < 0).any()):
        return "only some of the channels that share one element are to be scaled"
    first = index.narrow(place, 0, 1).expand_as(index)
    relabel = torch.arange(len(layout.ties))
    relabel[layout.ties[index.flatten()]] = layout.ties[first.flatten()]
    ties = relabel[layout.ties]
    if not torch.equal(ties[index], ties[first]):
        return "channels share elements in a way that isn't followed"
    return Layout(axes, index.select(place, 0), ties)


def _through_reshape(have: Sequence[Any], want: Sequence[Any], layout: Layout) -> Layout | None:
    """Match blocks of axes of equal size from the right; a block holds channels only, or none."""
    layout = _without_ones(layout)
    axes: list[int] = []
    sizes: list[int] = []
    for old, new in blocks(have, want):
        held = [axis for axis in new if axis in layout.axes]
        if not held:
            continue
        count = sympy.prod([_size(want[axis]) for axis in new])
        channels = sympy.prod([layout.index.shape[layout.axes.index(axis)] for axis in held])
        if count != channels:
            return None
        axes = [*old, *axes]
        sizes = [*(int(have[axis]) for axis in old), *sizes]
    covered = {axis for _, new in blocks(have, want) for axis in new}
    if not covered.issuperset(layout.axes):
        return None
    return replace(layout, axes=tuple(axes), index=layout.index.reshape(sizes))


def _without_ones(layout: Layout) -> Layout:
    """Axes of one position hold channels in name only, and a block may put them anywhere."""
    pairs = zip(layout.axes, layout.index.shape, strict=True)
    return replace(
        layout,
        axes=tuple(axis for axis, size in pairs if size > 1),
        index=layout.index.squeeze(),
    )


def blocks(have: Sequence[Any], want: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes of both shapes that hold the same elements, the rightmost first."""
    found: list[tuple[list[int], list[int]]] = []
    i, j = len(have), len(want)
    while i and j:
        i, j = i - 1, j - 1
        old, new = [i], [j]
        one, other = _size(have[i]), _size(want[j])
        while one != other:
            if i and (not j or _divides(one, other)):
                i -= 1
                old.insert(0, i)
                one *= _size(have[i])
            elif j:
                j -= 1
                new.insert(0, j)
                other *= _size(want[j])
            else:
                return found
        found.append((old, new))
    return found


def _divides(one: sympy.Expr, other: sympy.Expr) -> bool:
    """Whether `other` is a multiple of `one`, so that `one` has to grow to reach it."""
    if one.is_number and other.is_number:
        return bool(one < other)
    return bool(sympy.fraction(sympy.cancel(other / one))[1] == 1)


def _size(size: Any) -> sympy.Expr:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr
