"""Sums over what belongs to a channel, and the importances that follow from weights alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx

from fxopt.analyses.channels import Group, Place
from fxopt.errors import PassError
from fxopt.nodes import arguments
from fxopt.program import Program


def magnitude(
    program: Program, groups: Sequence[Group], power: int, readers_too: bool
) -> dict[str, Tensor]:
    """The p-norm over each channel's weights: those that produce it, or its readers' as well.

    Weights are matrices and kernels. Biases and the vectors of norms, which are of another scale,
    stand in only for a group that has nothing else.
    """
    found = {}
    sums: dict[tuple[str, int], Tensor] = {}
    for group in groups:
        places = parameters(group, group.places if readers_too else group.producers)
        total = torch.zeros(group.size, dtype=torch.float64)
        for place in [one for one in places if one.node.meta["val"].ndim > 1] or places:
            key = place.name, place.axis
            if key not in sums:
                powers = program.tensor(place.name).detach().abs().pow(power)
                sums[key] = finite(along(powers, place.axis), place.name)
            total += per_channel(sums[key], place)
        found[group.name] = total.pow(1.0 / power)
    return found


def parameters(group: Group, places: Iterable[Place]) -> list[Place]:
    """The places in floating-point state that is no running statistic.

    Raises `PassError` where there are none.
    """
    found = [
        place
        for place in places
        if place.node.op == "get_attr"
        and place.node.meta["val"].dtype.is_floating_point
        and not any(_is_statistic(place.node, user) for user in place.node.users)
    ]
    if not found:
        raise PassError(
            f"importance: the channels of {group.name} are made by no floating-point parameter, so "
            "they can't be ranked by one; use 'activation', or leave the group out"
        )
    return found


_BATCH_NORMS = (
    torch.ops.aten.batch_norm.default,
    torch.ops.aten._native_batch_norm_legit_functional.default,
)


def _is_statistic(state: fx.Node, user: fx.Node) -> bool:
    if user.target not in _BATCH_NORMS:
        return False
    args = arguments(user)
    return state in (args["running_mean"], args["running_var"])


def along(tensor: Tensor, axis: int) -> Tensor:
    """The sum over all other axes, float64."""
    others = [other for other in range(tensor.ndim) if other != axis]
    # An empty list of axes would stand for all of them.
    return tensor.sum(others, dtype=torch.float64) if others else tensor.double()


def per_channel(values: Tensor, place: Place) -> Tensor:
    """The sum of `values` [size of the axis] over the indices that each channel takes, [size]."""
    return values.cpu()[place.positions].sum(1)


def finite(values: Tensor, where: str) -> Tensor:
    """`values`, or `PassError` with the name of the place that holds NaN or infinity."""
    if not bool(values.isfinite().all()):
        index = int((~values.isfinite()).nonzero()[0, 0])
        raise PassError(
            f"importance: {where} gives NaN or infinity at channel {index}; no channel can be "
            "ranked by it. Look for what made the weights or gradients infinite."
        )
    return values
