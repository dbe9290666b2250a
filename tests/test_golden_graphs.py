"""One golden text a pass: a small graph before it and after, typed, as `print(opt.graph)` shows it.

A reader sees here what a pass does to a graph; a change of it shows in the diff of the snapshot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.kernels import native
from fxopt.pass_list import PASSES


class Block(nn.Module):
    """y = x + down(gelu(up(norm(x)))), and what of it a pass looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    """Three projections of one input, attention, and a projection out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class Untidy(nn.Module):
    """Constants, a copy of nothing, the same value twice."""

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.arange(4.0) * 2
        return (x.float() * scale).relu() + (x.float() * scale).relu().contiguous()


class Cached(nn.Module):
    """Attention of a new slot to itself and to a prefix in int8."""

    def forward(
        self, q: Tensor, keys: Tensor, key_scales: Tensor, values: Tensor, value_scales: Tensor
    ) -> Tensor:
        ops = torch.ops.fxopt
        past = [
            ops.dequantize(one, scale, torch.float32)
            for one, scale in ((keys, key_scales), (values, value_scales))
        ]
        seen = [torch.ones_like(one[:, 0, :, 0], dtype=torch.bool) for one in (keys, q)]
        return ops.cached_attention(q, q, q, *past, *seen, 0.5)


class Embedded(nn.Module):
    """A table of rows, looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 32), nn.Linear(32, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


def convolved() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def dead() -> nn.Module:
    """Two of six channels between the layers are zero, one is constant."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight[1:4] = 0.0
        model[0].bias[1:4] = torch.tensor([0.0, -1.0, 2.0])
    return model


def outlier() -> nn.Module:
    """One channel of the norm is far larger than the others."""
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16))
    with torch.no_grad():
        model[0].weight[3] = 60.0
    return model


def off_centre() -> nn.Module:
    """Each channel of the norm has another middle."""
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16))
    with torch.no_grad():
        model[0].bias.copy_(torch.linspace(-30.0, 30.0, 16))
    return model


ROWS, IMAGE = torch.randn(4, 5, 16), torch.randn(2, 3, 6, 6)
CACHED = (
    torch.randn(2, 2, 1, 8),
    *(torch.ones(2, 2, 5, 8, dtype=torch.int8), torch.ones(2, 2, 5, 1)) * 2,
)
CASES: dict[str, tuple[str, Callable[[], nn.Module], Any]] = {
    "canonicalize": ("canonicalize", Untidy, torch.randn(3, 4)),
    "fold-pruned": ("fold-pruned", dead, torch.randn(3, 8)),
    "prune-channels": ("prune-channels{ratio=0.5, scope=ffn}", Block, ROWS),
    "fuse-linears": ("fuse-linears", Attention, ROWS),
    "fuse-conv-batch-norm": ("fuse-conv-batch-norm", convolved, IMAGE),
    "fold-norms": ("fold-norms", Block, ROWS),
    "half-attention": ("half-attention{force=true}", Attention, ROWS),
    "half-linear": ("half-linear{dtype=bfloat16, force=true}", Block, ROWS),
    "sparsify24": ("sparsify24{force=true}", Block, ROWS),
    "smooth-quant": ("smooth-quant", outlier, ROWS),
    "split-outliers": ("split-outliers{channels=2}", outlier, ROWS),
    "shift-channels": ("shift-channels", off_centre, ROWS),
    "int8-linear": ("int8-linear{where=always, range=8}", Block, ROWS),
    "int8-linear, static": ("int8-linear{mode=static, where=always, range=8}", Block, ROWS),
    "int8-linear, weight-only": ("int8-linear{mode=weight_only, where=always}", Block, ROWS),
    "int8-embedding": ("int8-embedding", Embedded, torch.randint(0, 50, (2, 7))),
    "quantize-cache": ("quantize-cache", Cached, CACHED),
    "int4-linear": ("int4-linear{group=16}", Block, ROWS),
    "float8-linear": ("float8-linear{force=true}", Block, ROWS),
    "autocast": ("autocast{dtype=bfloat16, force=true}", Block, ROWS),
    "select-kernels": ("int8-linear{where=always, range=8}, select-kernels", Block, ROWS),
    "prepack": ("prepack", Block, ROWS),
}


@pytest.mark.parametrize("name", CASES)
def test_the_graph_before_and_after(name: str, snapshot: Any) -> None:
    spec, model, example = CASES[name]
    torch.manual_seed(0)
    with native.without():  # which kernels are chosen mustn't depend on the CPU
        opt = fxopt.transform(
            model().eval(), spec, example_inputs=example, verify=False, measure_cost=False
        )
    before, after = opt.steps[-2], opt.steps[-1]
    assert after.record.firings, "a golden text of nothing"
    text = f"{before.graph}\n\n{after.record.spec}\n\n{after.graph}"
    assert text == snapshot


def test_every_pass_has_a_golden_text() -> None:
    assert {name.partition(",")[0] for name in CASES} == set(PASSES) - {"lower"}
