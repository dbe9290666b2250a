"""Tensors that aren't computed yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """A tensor that isn't computed yet: `make(*sources)`, of known shape and dtype.

    Fusing three weights and then quantizing the result needs the fused floats for a moment only;
    a recipe holds the sources, which are shared with the model, instead of their concatenation.
    """

    make: Callable[..., Tensor]
    sources: tuple[Tensor | Recipe, ...]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False

    def materialize(self) -> Tensor:
        """Compute the tensor; a `Parameter` when its sources were trainable."""
        with torch.no_grad():
            value = self.make(*(materialize(source) for source in self.sources))
        return torch.nn.Parameter(value) if self.requires_grad else value


def materialize(tensor: Tensor | Recipe) -> Tensor:
    """The tensor itself, or what its recipe computes."""
    return tensor.materialize() if isinstance(tensor, Recipe) else tensor


def concatenate(*parts: Tensor) -> Tensor:
    """The parts one below the other."""
    return torch.cat(parts)
