"""Channels made constant in models as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def idle(model: nn.Module, seed: int, share: float = 0.4) -> nn.Module:
    """`model` with a share of what makes channels zeroed: rows, scales of norms; some tables'
    columns are one number."""
    generator = torch.Generator().manual_seed(seed)

    def some(count: int) -> Tensor:
        return torch.rand(count, generator=generator) < share

    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, nn.Parameter):
                continue
            if isinstance(module, nn.Embedding):
                weight[:, some(weight.shape[1])] = 0.25
            elif type(module).__name__ == "Conv1D" or isinstance(
                module, (nn.ConvTranspose1d, nn.ConvTranspose2d)
            ):
                weight[:, some(weight.shape[1])] = 0.0
            else:
                weight[some(len(weight))] = 0.0
    return model
