"""Which channels stay: by their scores, in numbers that kernels like, and to meet a cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fxopt.analyses.arithmetic import Cost, CutCosts
from fxopt.analyses.channels import Group
from fxopt.errors import PassError
from fxopt.program import Program

Normalization = Literal["mean", "max", "sum", "none"]
Ranking = Literal["local", "global"]
Scores = Mapping[str, Tensor]

_DIVISORS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "max": torch.amax,
    "sum": torch.sum,
    "none": torch.ones_like,
}
# 0.9 * 10 channels are 9, whatever the rounding of the product.
_ROUNDING = 1e-9
_HALVINGS = 24


def normalized(scores: Scores, how: Normalization = "mean") -> dict[str, Tensor]:
    """Scores in a unit of their own group, so that channels of two groups can be ranked together.

    Divided by the group's mean ("mean": an average channel of each group counts the same), its
    largest ("max": so does the best one), its sum ("sum": so does each group as a whole, and a
    channel of a large group less), or not at all ("none": for scores that have one unit in the
    whole program, such as "taylor"). A group of zeros stays zero.

    Raises `PassError` for an unknown `how`.
    """
    if how not in get_args(Normalization):
        raise PassError(f"normalized(how={how!r}): give one of {', '.join(_DIVISORS)}")
    found = {}
    for name, score in scores.items():
        divisor = _DIVISORS[how](score) if score.numel() else torch.ones(())
        found[name] = score / divisor.where(divisor > 0, torch.ones_like(divisor))
    return found


def select(
    groups: Sequence[Group],
    scores: Scores,
    *,
    ratio: float,
    ranking: Ranking = "local",
    round_to: int = 1,
    least: int = 1,
) -> dict[str, Tensor]:
    """The channels to keep: {group name: sorted int64 indices}, those of the highest scores.

    `ratio` in [0, 1] is the share to remove: "local" of each group's channels; "global" of the
    parameters that all channels cost together, by one threshold on the scores (`normalized`
    beforehand, as suits their kind). The number that stays is rounded up so that the indices it
    takes in every tensor are a multiple of `round_to` (whole heads, so many that heads x dimensions
    is one), and is at least `least`, but never more than there are. Of equal scores the first stay.
    A group with refusals keeps everything.

    Raises `PassError` for options out of range, and for scores that are missing or don't fit.
    """
    return _Selection(groups, scores, ranking, round_to, least).at(ratio)


def ratio_for(
    program: Program,
    groups: Sequence[Group],
    scores: Scores,
    *,
    target_flops: float | None = None,
    target_params: float | None = None,
    ranking: Ranking = "local",
    round_to: int = 1,
    least: int = 1,
) -> float:
    """The smallest ratio whose `select`, with the same options, leaves at most the target.

    `target_flops` or `target_params` is a share of the dense program in (0, 1). Costs are exact
    (`arithmetic.cut_cost`), and fall with the ratio, which is found by bisection to 1e-7.

    Raises `PassError` unless exactly one target in (0, 1) is given, and where even the largest cut
    leaves more, with what it leaves.
    """
    name, target, of = _target(target_flops, target_params)
    selection = _Selection(groups, scores, ranking, round_to, least)
    costs = CutCosts(program)
    dense = of(costs.after({}))

    def share(ratio: float) -> float:
        return of(costs.after(selection.at(ratio))) / max(1, dense)

    reachable = share(1.0)
    if reachable > target:
        raise PassError(
            f"{name}={target:g} can't be reached: the largest cut of these {len(groups)} groups "
            f"(round_to={round_to}, least={least}) leaves {reachable:.3f} of the dense program; "
            "give a larger target, or more groups to cut"
        )
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if share(middle) <= target else (middle, high)
    return high


def channel_parameters(group: Group) -> int:
    """How many parameters leave with one channel, where no other group is cut."""
    return sum(
        place.node.meta["val"].numel()
        // max(1, place.node.meta["val"].shape[place.axis])
        * place.positions.shape[1]
        for place in group.places
        if place.node.meta["val"].dtype.is_floating_point
    )


def _target(flops: float | None, params: float | None) -> tuple[str, float, Callable[[Cost], int]]:
    given = {"target_flops": flops, "target_params": params}
    found = [(name, value) for name, value in given.items() if value is not None]
    if len(found) != 1 or not 0.0 < found[0][1] < 1.0:
        texts = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise PassError(
            f"{texts}: give one of them, as the share of the dense program that is to be left, "
            "between 0 and 1"
        )
    name, value = found[0]
    return name, value, lambda cost: cost.flops if name == "target_flops" else cost.parameters


class _Selection:
    """Ranks once and selects for any ratio; what is kept only shrinks as the ratio grows."""

    def __init__(
        self,
        groups: Sequence[Group],
        scores: Scores,
        ranking: Ranking,
        round_to: int,
        least: int,
    ) -> None:
        _check(groups, scores, ranking, round_to, least)
        self.groups = groups
        self.ranking = ranking
        self.least = least
        self.steps = {group.name: _step(group, round_to) for group in groups}
        self.orders = {
            group.name: scores[group.name].argsort(descending=True, stable=True).cpu()
            for group in groups
            if not group.refusals
        }
        self.owners, self.spent = self._together(scores)

    def at(self, ratio: float) -> dict[str, Tensor]:
        """What is kept once the share `ratio` is removed."""
        if not 0.0 <= ratio <= 1.0:
            raise PassError(f"select(ratio={ratio!r}): give the share to remove, from 0 to 1")
        gone = None if self.ranking == "local" else self._gone(ratio)
        kept = {}
        for index, group in enumerate(self.groups):
            if group.refusals:
                kept[group.name] = torch.arange(group.size)
                continue
            wanted = (
                math.ceil((1.0 - ratio) * group.size - _ROUNDING)
                if gone is None
                else group.size - int(gone[index])
            )
            step = self.steps[group.name]
            count = min(group.size, -(-max(wanted, self.least) // step) * step)
            kept[group.name] = self.orders[group.name][:count].sort().values
        return kept

    def _together(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """All channels from the lowest score up: the group's index, and parameters spent so far."""
        empty = torch.empty(0, dtype=torch.int64)
        owners, costs, values = [empty], [empty], [torch.empty(0, dtype=torch.float64)]
        for index, group in enumerate(self.groups):
            if not group.refusals:
                owners.append(torch.full((group.size,), index))
                costs.append(torch.full((group.size,), channel_parameters(group)))
                values.append(scores[group.name].double().cpu())
        order = torch.cat(values).argsort(stable=True)
        return torch.cat(owners)[order], torch.cat(costs)[order].cumsum(0)

    def _gone(self, ratio: float) -> Tensor:
        """How many channels of each group are below the threshold at which `ratio` is gone."""
        total = int(self.spent[-1]) if len(self.spent) else 0
        count = int((self.spent <= ratio * total * (1 + _ROUNDING)).sum())
        return torch.bincount(self.owners[:count], minlength=len(self.groups))


def _step(group: Group, round_to: int) -> int:
    """The least number of channels that takes a multiple of `round_to` indices in every tensor."""
    widths = {place.positions.shape[1] for place in group.places}
    return math.lcm(*(round_to // math.gcd(round_to, width) for width in widths))


def _check(
    groups: Sequence[Group], scores: Scores, ranking: str, round_to: int, least: int
) -> None:
    if ranking not in get_args(Ranking):
        raise PassError(f"select(ranking={ranking!r}): give one of {get_args(Ranking)}")
    for name, value in (("round_to", round_to), ("least", least)):
        if value < 1:
            raise PassError(f"select({name}={value!r}): give 1 or more")
    for group in groups:
        score = scores.get(group.name)
        if score is None or tuple(score.shape) != (group.size,):
            given = "none" if score is None else f"a tensor of {tuple(score.shape)}"
            raise PassError(
                f"select: {group.name} has {group.size} channels, but its score is {given}; give "
                "what importance() returns for these groups"
            )
