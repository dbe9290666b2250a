"""Views: every entry of the result is an entry of the first operand, and nothing is computed.

Some give the operand's memory, some a copy, some either: `sharing` tells which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

SWAPS = (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
"""Two axes, which are named, change places."""

REVERSALS = (aten.t.default, aten.numpy_T.default)
"""The axes in reverse order."""

PERMUTATIONS = (
    aten.permute.default,
    *SWAPS,
    *REVERSALS,
    aten.mT.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.moveaxis.int,
    aten.moveaxis.intlist,
)
"""All axes in another order: see `permutation`."""

SIZED_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
"""The same entries in the same order under sizes that the call spells out, as one argument."""

REGROUPINGS = (*SIZED_RESHAPES, aten.flatten.using_ints, aten.unflatten.int, aten.ravel.default)
"""The same entries in the same order, axes merged and split."""

RESHAPES_LIKE = (aten.view_as.default, aten.reshape_as.default)
"""The same entries in the same order under the sizes of another tensor."""

SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)

RESHAPES = (*REGROUPINGS, *SQUEEZES, aten.unsqueeze.default)
"""The same entries in the same order under other sizes, which are the call's own."""

RESHAPES_BY_STRIDES = (
    aten.reshape.default,
    aten.reshape_as.default,
    aten.flatten.using_ints,
    aten.ravel.default,
)
"""Reshapes that give a view or a copy, whichever the strides at the call allow."""

EXPANSIONS = (aten.expand.default, aten.expand_as.default)
"""Entries repeated along axes of size 1 and new ones."""

WHOLE_VIEWS = (*RESHAPES, *RESHAPES_LIKE, *PERMUTATIONS, *EXPANSIONS)
"""Views that show every entry of the operand."""

VIEWS = (*WHOLE_VIEWS, aten.slice.Tensor, aten.select.int)

SPLITS = (
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
)
"""A list of runs of one axis: the third argument, `dim`, which is 0 where it isn't given."""

PARTS = (*SPLITS, aten.unbind.int)
"""A list that shows every entry of the operand once."""


def permutation(node: fx.Node) -> list[int]:
    """Which axis of its operand each axis of the value of a call of one of `PERMUTATIONS` is."""
    source: Any = node.args[0]
    return permutation_of(node.target, source.meta["val"].ndim, node.args[1:], node.kwargs)


def permutation_of(
    target: Any, rank: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[int]:
    """Which axis of a tensor of `rank` each axis of `target(tensor, *args, **kwargs)` is."""
    if target in REVERSALS:
        return list(range(rank))[::-1]
    # Strides move with their axes.
    probe = torch.empty_strided([1] * rank, list(range(rank)), device="meta")
    return list(target(probe, *args, **kwargs).stride())
