"""Parts of models whose gradients, buffers or evaluation differ from what their values tell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

WIDTH = 4


class StraightThrough(nn.Module):
    """Rounds forward, is the identity backward."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x.round() - x).detach()


class SelfGate(nn.Module):
    """x times its own value, through which no gradient flows."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.detach()


class StoppedBranch(nn.Module):
    """A teacher's branch without gradients beside a batch norm that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.teacher = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        with torch.no_grad():
            target = self.teacher(y).tanh()
        return y * target


class Quantizer(nn.Module):
    """Vector quantization whose codebook follows the inputs by moving averages."""

    codes: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("codes", torch.randn(5, WIDTH, generator=generator))
        self.register_buffer("counts", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.detach(), self.codes).argmin(1)
        chosen = self.codes[nearest]
        if self.training:
            with torch.no_grad():
                hits = functional.one_hot(nearest, 5).to(x.dtype)
                self.counts.mul_(0.9).add_(hits.sum(0), alpha=0.1)
                means = hits.t() @ x / hits.sum(0).clamp_min(1.0)[:, None]
                self.codes.mul_(0.9).add_(means, alpha=0.1)
        return x + (chosen - x).detach() + 0.1 * (chosen - x)


class Memory(nn.Module):
    """A buffer of which each call writes a part, through a view."""

    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.last[1:].copy_(self.last[:-1].clone())
            self.last[0] = x.mean(0)
        return x - self.last.mean(0)


class ModeScale(nn.Module):
    """Another branch in each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.train_gain = nn.Parameter(torch.ones(WIDTH))
        self.eval_gain = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.train_gain if self.training else (x * self.eval_gain).relu()


def frozen(module: nn.Module) -> nn.Module:
    """`module` in eval mode, as users freeze it, in a model that trains."""
    return module.eval()


def frozen_norm() -> nn.Module:
    norm = nn.BatchNorm1d(WIDTH)
    norm.running_mean = torch.linspace(-1.0, 1.0, WIDTH)
    return frozen(norm)


class OnSequence(nn.Module):
    """An instance norm with running statistics, over a batch [N, width] as N images of 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(2, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.unflatten(1, (2, WIDTH // 2))).flatten(1)


PIECES = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "unbiased linear": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "relu": lambda: nn.ReLU(inplace=True),
    "dropout": lambda: nn.Dropout(0.3),
    "dropout in place": lambda: nn.Dropout(0.3, inplace=True),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "frozen batch norm": frozen_norm,
    "frozen dropout": lambda: frozen(nn.Dropout(0.5)),
    "instance norm": OnSequence,
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "straight through": StraightThrough,
    "self gate": SelfGate,
    "stopped branch": StoppedBranch,
    "quantizer": Quantizer,
    "memory": Memory,
    "another branch in each mode": ModeScale,
}
"""Modules [N, width] -> [N, width] by name, each made anew."""


class Composed(nn.Module):
    """Pieces one after the other, an auxiliary head in training, and a loss where labels are."""

    def __init__(self, pieces: list[str], auxiliary: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, WIDTH), *(PIECES[piece]() for piece in pieces))
        self.head = nn.Linear(WIDTH, 2)
        self.auxiliary = nn.Linear(WIDTH, 2) if auxiliary else None

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        hidden = self.body(x)
        logits = self.head(hidden)
        outputs = {"logits": logits}
        if self.auxiliary is not None:
            if not self.training:
                return (logits.softmax(-1),)
            outputs["auxiliary"] = self.auxiliary(hidden)
        if labels is not None:
            outputs["loss"] = functional.cross_entropy(logits, labels)
        return outputs


def composed(*pieces: str, auxiliary: bool = False, seed: int = 0) -> Composed:
    """A model of `pieces` in train mode, frozen parts kept, of seeded weights."""
    torch.manual_seed(seed)
    return Composed(list(pieces), auxiliary)


def batch(seed: int, size: int = 6, labels: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, generator=generator)
    drawn = torch.randint(0, 2, (size,), generator=generator)
    return {"x": x, "labels": drawn} if labels else {"x": x}


def summed(outputs: object) -> Tensor:
    """A scalar of all outputs that learn."""
    leaves = [x for x in torch.utils._pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
    tracked = [leaf for leaf in leaves if leaf.requires_grad]
    return torch.stack([leaf.square().sum() for leaf in tracked]).sum()
