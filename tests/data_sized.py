"""Models whose sizes depend on data."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """A mixture of experts: each token goes to the one that the router prefers.

    `idle` are experts that get no token. The router is sure of itself, so that rounding decides
    no route.
    """

    def __init__(self, width: int = 64, count: int = 2, idle: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.router = nn.Linear(width, count)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(count)
        )
        with torch.no_grad():
            self.router.weight.mul_(20)
            self.router.bias[list(idle)] = -1e3

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weight, chosen = self.router(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == index)
            out = out.index_add(0, rows, expert(tokens[rows]) * weight[rows, None])
        return out.view(x.shape)


class Masked(nn.Module):
    """Boolean indexing before a linear."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.second(self.first(x)[keep]).sum(0)
