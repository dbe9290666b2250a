"""Other sizes at which a program is tried: within its guards, and at the edges 1 and 0.

Sizes change by repeating and cropping the example, so that ids stay in the vocabulary and masks
masks. Axes that have one size in the example keep having one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fxopt.guards import Tree
from fxopt.program import Program
from fxopt.signature import gathered

Key = tuple[bool, int]
"""(is it a batch axis, its size in the example)."""

_MOST_TRIED = 20_000
_REACH = 24


def other_sizes(program: Program) -> Iterator[tuple[Tensor, ...] | None]:
    """The example at two other sizes, each as near to what is wanted as the guards allow.

    Wanted are a batch of 1 with longer axes, and a larger batch with shorter ones. None stands for
    a wish that nothing near it, but the example itself, comes within the guards of.
    """
    limits = _limits(program)
    if not limits:
        return
    wishes: tuple[dict[Key, int], ...] = (
        {key: 1 if key[0] else key[1] + 3 for key in limits},
        {key: key[1] + 1 if key[0] else max(2, (2 * key[1]) // 3) for key in limits},
    )
    taken = [tuple(key[1] for key in limits)]
    fits = _fitting(program, list(limits))
    for wish in wishes:
        near = [_near(size, key[1], limits[key]) for key, size in wish.items()]
        tried = itertools.islice(itertools.product(*near), _MOST_TRIED)
        found = next((sizes for sizes in tried if sizes not in taken and fits(sizes)), None)
        if found is not None:
            taken.append(found)
        yield None if found is None else resized(program, dict(zip(limits, found, strict=True)))


def edge_sizes(program: Program, size: int) -> list[Mapping[Key, int]]:
    """One map for each kind of axis that the guards let have `size`: it alone does."""
    keys = [key for key in _limits(program) if key[1] != size]
    return [{key: size} for key in keys if _fitting(program, [key])([size])]


def reads(program: Program, key: Key) -> list[Tree]:
    """The sizes, as a guard reads them, that a key stands for; equal names once."""
    found: dict[int | str, Tree] = {}
    for index, axis, name, known in _axes(program):
        if known == key:
            found.setdefault(name, ("size", index, axis))
    return list(found.values())


def resized(program: Program, sizes: Mapping[Key, int]) -> tuple[Tensor, ...]:
    """The example with the sizes of `sizes`."""
    inputs = list(program.example)
    for index, axis, _, key in _axes(program):
        if key in sizes:
            order = torch.arange(sizes[key], device=inputs[index].device) % key[1]
            inputs[index] = inputs[index].index_select(axis, order)
    return tuple(inputs)


def shapes_text(program: Program, inputs: tuple[Tensor, ...]) -> str:
    """The shapes of inputs by name: `x (1, 7, 8), mask (1, 7)`."""
    shapes = [str(tuple(tensor.shape)) for tensor in inputs]
    named = gathered(list(zip(program.signature.paths, shapes, strict=True)))
    return ", ".join(f"{path} {shape}" for path, shape in named)


def _axes(program: Program) -> Iterator[tuple[int, int, int | str, Key]]:
    """(input, axis, name, key) of every dynamic size."""
    pairs = zip(program.signature.tensors, program.example, strict=True)
    for index, (tensor, value) in enumerate(pairs):
        for axis, (name, size) in enumerate(zip(tensor.sizes, value.shape, strict=True)):
            if isinstance(name, str):
                yield index, axis, name, (axis == 0, size)


def _limits(program: Program) -> dict[Key, int | None]:
    limits: dict[Key, int | None] = {}
    for _, _, name, key in _axes(program):
        bounds = program.signature.ranges.get(str(name))
        high = bounds.high if bounds else None
        known = limits.get(key)
        limits[key] = high if known is None else known if high is None else min(known, high)
    return limits


def _near(wish: int, size: int, limit: int | None) -> list[int]:
    """Sizes from 1 on, the wished one first and then by their distance from it."""
    sizes = {*range(max(1, wish - _REACH), wish + _REACH), size, 2 * size}
    within = [one for one in sizes if limit is None or one <= limit]
    return sorted(within, key=lambda one: (abs(one - wish), -one))


def _fitting(program: Program, keys: Sequence[Key]) -> Callable[[Sequence[int]], bool]:
    """Whether the example with these sizes of `keys` is within the guards; asked many times."""
    shapes = [list(value.shape) for value in program.example]
    number = {key: index for index, key in enumerate(keys)}
    places = [
        (shapes[index], axis, number[key])
        for index, axis, _, key in _axes(program)
        if key in number
    ]

    def fits(sizes: Sequence[int]) -> bool:
        for shape, axis, index in places:
            shape[axis] = sizes[index]
        return program.signature.fit(shapes)

    return fits
