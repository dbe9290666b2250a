"""Blocks whose channels are hard to cut: every way that models split, share, scale and mix them.

Token blocks map [batch, length, width] to the same, image blocks [batch, channels, side, side].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.models import Activation

_POSITIONS = 16


class WrittenRmsNorm(nn.Module):
    """weight * x * rsqrt(mean(x^2) + eps), written out as in Llama."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Mlp(nn.Module):
    """down(act(norm(up(x)))), each linear with or without a bias."""

    def __init__(
        self, width: int, inner: int, kind: str, biases: tuple[bool, bool], norm: nn.Module
    ) -> None:
        super().__init__()
        self.up, self.norm, self.act = nn.Linear(width, inner, biases[0]), norm, Activation(kind)
        self.down = nn.Linear(inner, width, biases[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.norm(self.up(x))))


class FusedGatedMlp(nn.Module):
    """down(silu(gate) * up), gate and up the halves of one linear."""

    def __init__(self, width: int, inner: int, bias: bool, glu: bool) -> None:
        super().__init__()
        self.both, self.glu = nn.Linear(width, 2 * inner, bias), glu
        self.down = nn.Linear(inner, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.glu:
            return self.down(functional.glu(self.both(x)))
        gate, up = self.both(x).chunk(2, -1)
        return self.down(functional.silu(gate) * up)

    def extra_repr(self) -> str:
        return f"glu={self.glu}"


@dataclass(frozen=True)
class AttentionShape:
    """How an attention block is laid out; fused projections have as many key as query heads."""

    heads: int
    key_heads: int
    head_dim: int
    layout: Literal["separate", "(3, heads, dim)", "(heads, 3, dim)"]
    written: bool
    causal: bool
    rotary: bool
    relative: bool
    query_norm: bool
    repeat: Literal["interleave", "expand"]
    bias: bool


class AnyAttention(nn.Module):
    """Multi-head self-attention in one of many layouts."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, shape: AttentionShape) -> None:
        super().__init__()
        self.shape = shape
        size, bias = shape.heads * shape.head_dim, shape.bias
        if shape.layout == "separate":
            key_size = shape.key_heads * shape.head_dim
            self.query = nn.Linear(width, size, bias)
            self.key, self.value = (nn.Linear(width, key_size, bias) for _ in range(2))
        else:
            self.fused = nn.Linear(width, 3 * size, bias)
        self.out = nn.Linear(size, width, bias)
        if shape.relative:
            self.distances = nn.Embedding(2 * _POSITIONS, shape.heads)
        if shape.query_norm:
            self.norm = WrittenRmsNorm(shape.head_dim)
        angle = torch.outer(torch.arange(_POSITIONS), torch.linspace(1.0, 0.1, shape.head_dim // 2))
        self.register_buffer("cos", torch.cat([angle, angle], -1).cos())
        self.register_buffer("sin", torch.cat([angle, angle], -1).sin())

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self._projected(x)
        if self.shape.query_norm:
            q = self.norm(q)
        if self.shape.rotary:
            q, k = self._rotated(q), self._rotated(k)
        k, v = self._repeated(k), self._repeated(v)
        y = self._attended(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape, (batch, length, _) = self.shape, x.shape
        if shape.layout == "separate":
            q, k, v = (
                linear(x).view(batch, length, -1, shape.head_dim).transpose(1, 2)
                for linear in (self.query, self.key, self.value)
            )
            return q, k, v
        if shape.layout == "(3, heads, dim)":
            y = self.fused(x).view(batch, length, 3, shape.heads, shape.head_dim)
            q, k, v = y.permute(2, 0, 3, 1, 4)
            return q, k, v
        y = self.fused(x).view(batch, length, shape.heads, 3, shape.head_dim)
        q, k, v = (y[..., part, :].transpose(1, 2) for part in range(3))
        return q, k, v

    def _rotated(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, -1)
        length = x.shape[-2]
        turned = torch.cat([-other, one], -1)
        return x * self.cos[:length] + turned * self.sin[:length]

    def _repeated(self, x: Tensor) -> Tensor:
        times = self.shape.heads // self.shape.key_heads
        if times == 1:
            return x
        if self.shape.repeat == "interleave":
            return x.repeat_interleave(times, 1)
        batch, heads, length, dim = x.shape
        copies = x[:, :, None].expand(batch, heads, times, length, dim)
        return copies.reshape(batch, heads * times, length, dim)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[-2]
        mask = None
        if self.shape.relative:
            place = torch.arange(length, device=q.device)
            mask = self.distances(place[:, None] - place + _POSITIONS).permute(2, 0, 1)[None]
        if not self.shape.written:
            causal = self.shape.causal and mask is None
            return functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        scores = q @ k.transpose(-1, -2) / self.shape.head_dim**0.5
        if mask is not None:
            scores = scores + mask
        if self.shape.causal:
            later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, -1e4)
        return scores.softmax(-1) @ v

    def extra_repr(self) -> str:
        return str(self.shape)


class CatSplit(nn.Module):
    """Two linears side by side, split again at another place; one part gates the other's head."""

    def __init__(self, width: int, sizes: tuple[int, int], cut: int, kind: str) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(width, sizes[0]), nn.Linear(width, sizes[1], False)
        self.act, self.cut = Activation(kind), (cut, sum(sizes) - cut)
        self.left, self.right = (nn.Linear(size, width) for size in self.cut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(torch.cat([self.one(x), self.other(x)], -1))
        left, right = y.split(self.cut, -1)
        return self.left(left) + self.right(right)


class Transposed(nn.Module):
    """A block of convolutions over the positions: inner(x with positions last)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class ShuffledMlp(nn.Module):
    """A hidden layer seen as [inner, 2] and merged as [2, inner], as a pixel shuffle does."""

    def __init__(self, width: int, inner: int, kind: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * inner), nn.Linear(2 * inner, width)
        self.act = Activation(kind)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        y = self.act(self.up(x)).view(batch, length, -1, 2).transpose(-1, -2)
        return self.down(y.reshape(batch, length, -1))


class Scaled(nn.Module):
    """x * scale + shift, one of each for a channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.shift


class TokenGate(nn.Module):
    """x times a gate computed of its mean over the positions: squeeze and excitation of tokens."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean(1, keepdim=True)))))


class MixedHidden(nn.Module):
    """A hidden layer whose channels depend on each other: no channel of it can be cut."""

    def __init__(self, width: int, inner: int, how: str) -> None:
        super().__init__()
        self.up, self.down, self.how = nn.Linear(width, inner), nn.Linear(inner, width), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.how == "softmax":
            return self.down(y.softmax(-1))
        if self.how == "cumsum":
            return self.down(y.cumsum(-1))
        return self.down(torch.tanh(y) * y.amax(-1, keepdim=True))

    def extra_repr(self) -> str:
        return self.how


class TiedTranspose(nn.Module):
    """act(x Wᵀ) W: one parameter up and down."""

    def __init__(self, width: int, inner: int, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inner, width))
        self.bias, self.act = nn.Parameter(torch.zeros(inner)), Activation(kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(functional.linear(x, self.weight, self.bias)) @ self.weight


class TwiceRead(nn.Module):
    """One hidden layer with two readers, one of them shared with a second hidden layer."""

    def __init__(self, width: int, inner: int, kind: str) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, inner), nn.Linear(width, inner)
        self.down, self.gate = nn.Linear(inner, width), nn.Linear(inner, width, False)
        self.act = Activation(kind)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.one(x))
        return self.down(y) * torch.sigmoid(self.gate(y)) + self.down(self.two(x))


class Gate(nn.Module):
    """Each channel of an image times a gate that a small net computes of all channels' means."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = functional.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.up(torch.relu(self.down(mean))))


class Grown(nn.Module):
    """The input beside what `inner` makes of it, narrowed again."""

    def __init__(self, channels: int, growth: int, kernel: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, growth, kernel, padding=kernel // 2)
        self.narrow = nn.Conv2d(channels + growth, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(torch.relu(torch.cat([x, self.inner(x)], 1)))


class PixelShuffled(nn.Module):
    """Four maps of half the side as one of the whole, by views; strided back."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Conv2d(channels, 4 * inner, 1)
        self.down = nn.Conv2d(inner, channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, high, wide = x.shape
        y = self.up(x).view(batch, -1, 2, 2, high, wide).permute(0, 1, 4, 2, 5, 3)
        return self.down(torch.relu(y.reshape(batch, -1, 2 * high, 2 * wide)))


class Flattened(nn.Module):
    """A convolutional body on images of a fixed side, flattened under a linear head."""

    def __init__(self, body: nn.Module, channels: int, side: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(channels * side**2, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


class Head(nn.Module):
    """A body under a linear head, whose hidden state nobody sees."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Stem(nn.Module):
    """A body between a linear stem and a head: a residual stream that is neither in nor out."""

    def __init__(self, given: int, body: nn.Module, width: int) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(given, width), body, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))
