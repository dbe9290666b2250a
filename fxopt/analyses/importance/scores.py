"""Importance: how much each channel of a group matters, by one of seven measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor

from fxopt.analyses.channels import Group
from fxopt.analyses.importance.activations import activation, obs
from fxopt.analyses.importance.gradients import taylor
from fxopt.analyses.importance.magnitude import magnitude
from fxopt.errors import PassError
from fxopt.observation.gram import Weighting
from fxopt.program import Program

Importance = Literal["l1", "l2", "group_l2", "taylor", "activation", "obs", "random"]
KINDS: tuple[Importance, ...] = get_args(Importance)

_Measure = Callable[[Program, Sequence[Group], int, Weighting], dict[str, Tensor]]


def importance(
    program: Program,
    groups: Sequence[Group],
    kind: Importance,
    seed: int = 0,
    weighting: Weighting = "uniform",
) -> dict[str, Tensor]:
    """How much each channel matters: {group name: float64 [size]}, higher is more important.

    - "l1", "l2": the norm of the weights that produce the channel
    - "group_l2": the same over all of its weights, producers' and readers' (Fang et al.,
      "DepGraph: Towards Any Structural Pruning", CVPR 2023)
    - "taylor": gradient x weight, squared, over the calibration (Molchanov et al., CVPR 2019), of
      the output `loss` where there is one, else of the outputs' energy
    - "activation": magnitude of the readers' weights x norm of what they read over the calibration
      (Wanda: Sun et al., ICLR 2024)
    - "obs": what the readers' outputs lose on the calibration when the channel leaves and all
      others are refitted; channels leave greedily (Optimal Brain Surgeon: Hassibi, Stork, NIPS
      1992; in groups: ZipLM, Kurtic et al., NeurIPS 2023)
    - "random": uniform in [0, 1)

    `weighting` is what a row of the calibration counts in "obs": "uniform", or with "fisher" how
    sensitive the program's outputs are to an error there (`fxopt.observation.fisher`). `seed` is
    that of the random numbers of "taylor" (without a loss), "random" and "fisher". Without a
    calibration the example stands in. Scores of two kinds, and of two groups, are in different
    units: see `normalized`.

    Raises `PassError` for an unknown kind, for NaN or infinity (naming the parameter), and where a
    group has nothing to be measured by (nothing reads it with a weight; a reader can't be
    refitted), and `CalibrationError` for unusable inputs.
    """
    if kind not in _MEASURES:
        raise PassError(f"importance(kind={kind!r}): give one of {', '.join(KINDS)}")
    return _MEASURES[kind](program, groups, seed, weighting)


def _random(
    program: Program, groups: Sequence[Group], seed: int, _: Weighting
) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.rand(group.size, generator=draw, dtype=torch.float64) for group in groups
    }


_MEASURES: Mapping[str, _Measure] = MappingProxyType(
    {
        "l1": lambda program, groups, *_: magnitude(program, groups, 1, readers_too=False),
        "l2": lambda program, groups, *_: magnitude(program, groups, 2, readers_too=False),
        "group_l2": lambda program, groups, *_: magnitude(program, groups, 2, readers_too=True),
        "taylor": lambda program, groups, seed, _: taylor(program, groups, seed),
        "activation": lambda program, groups, *_: activation(program, groups),
        "obs": obs,
        "random": _random,
    }
)
