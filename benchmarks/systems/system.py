"""What a system under comparison is: something that makes a callable of a model and its inputs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]
Call = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Workload:
    """A model, the inputs that it is timed on, and batches of the same shapes to calibrate with.

    The calibration batches are the same for every system and never those that it is judged on.
    """

    model: nn.Module
    inputs: Inputs
    calibration: tuple[Inputs, ...] = ()


@dataclass(frozen=True)
class System:
    """A name, how to make a callable for a workload, and the packages that this takes.

    The callable takes inputs of the workload's shapes and gives the model's first output tensor,
    which the next call may overwrite.
    """

    name: str
    prepare: Callable[[Workload], Call]
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """The packages that aren't installed here."""
        return tuple(name for name in self.needs if importlib.util.find_spec(name) is None)


class FirstOutput(nn.Module):
    """The model with positional inputs and its first output tensor, as exporters want it."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        return first(self.model(**dict(zip(self.names, inputs, strict=True))))


def first(output: Any) -> Tensor:
    """The first tensor of a model's output."""
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
