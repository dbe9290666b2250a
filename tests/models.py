"""Hypothesis strategies that draw models by composition, and pass lists in a legal order.

All randomness comes from the strategy: structure, sizes and dtype are drawn, and weights and inputs
follow from a drawn seed. A model prints as its modules, so that a falsifying example can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from tests.architectures import Inputs, randomize

_VOCAB = 23
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Drawn:
    """A model in eval mode, the inputs to capture it with, and inputs of other sizes."""

    model: nn.Module
    example: Inputs
    others: tuple[Inputs, ...]

    def __repr__(self) -> str:
        def shapes(inputs: Inputs) -> str:
            return ", ".join(
                f"{key}: {tensor.dtype}{tuple(tensor.shape)}" for key, tensor in inputs.items()
            )

        others = "; ".join(map(shapes, self.others))
        return f"{self.model}\n  example {shapes(self.example)}\n  others {others}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        # Hypothesis would print the fields of a dataclass, tensors and all.
        printer.text(repr(self))


class Activation(nn.Module):
    """One of the elementwise functions, by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return _ACTIVATIONS[self.kind](x)

    def extra_repr(self) -> str:
        return self.kind


class Residual(nn.Module):
    """x + inner(x)"""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class ParallelLinears(nn.Module):
    """Linears of several widths and biases that share one input; their outputs meet in another."""

    def __init__(self, width: int, outputs: Sequence[tuple[int, bool]]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(width, size, bias) for size, bias in outputs)
        self.join = nn.Linear(sum(size for size, _ in outputs), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([torch.tanh(branch(x)) for branch in self.branches], -1))


class Attention(nn.Module):
    """Multi-head self-attention with separate query, key and value projections."""

    def __init__(self, width: int, heads: int, causal: bool, bias: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value = (nn.Linear(width, width, bias) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, causal={self.causal}"


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias), nn.Linear(width, inner, bias)
        self.down = nn.Linear(inner, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class MatmulConstant(nn.Module):
    """x @ weight, the weight a parameter laid out as (in, out)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class TiedLinears(nn.Module):
    """Two linears that are one parameter, with an activation between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class SharedLinear(nn.Module):
    """One linear called twice in a row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.linear(x)))


class LinearsOnTwoInputs(nn.Module):
    """Three linears over two inputs, one called twice, one a matrix that is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + x @ self.b + self.a(x.sin())


class TiedHead(nn.Module):
    """A linear between an embedding and a head that are one parameter."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(ids)))


class IntegerLinear(nn.Module):
    """A linear layer [..., 8] -> [..., 4] of integers."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-3, 3, (4, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class NoOps(nn.Module):
    """Casts, views and copies that change nothing."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(x.dtype).view(x.shape).contiguous()
        return x.transpose(1, 2).transpose(1, 2).reshape(x.shape).float().to(x.dtype)


class DuplicateExpressions(nn.Module):
    """The same product written twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(self.linear(x)) + 2.0 * functional.gelu(self.linear(x))


class ConstantSubgraph(nn.Module):
    """Adds what can be computed without the inputs, from a buffer and from a literal."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(0.1, 1.0, width))

    def forward(self, x: Tensor) -> Tensor:
        angle = self.frequencies * torch.arange(x.shape[-1], device=x.device)
        return x + (angle.sin() * 0.5 + torch.ones_like(angle)).to(x.dtype)


class LinearBatchNorm(nn.Module):
    """A linear on flattened tokens, then a batch norm over its features."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width, bias), nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x.reshape(-1, x.shape[-1]))).view(x.shape)


class ConvBranch(nn.Module):
    """A convolution that its batch norm shares with another reader, so it can't be folded."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.relu(self.norm(y)) + y


class Embedded(nn.Module):
    """Token ids through an embedding and a body; the head may be tied to the embedding."""

    def __init__(self, body: nn.Module, width: int, tied: bool) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(_VOCAB, width), body
        self.head = nn.Linear(width, _VOCAB, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(ids)))


class Headed(nn.Module):
    """A body under a linear head; gives both, as models with hidden states do."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x)
        return {"hidden": hidden, "logits": self.head(hidden)}


class Pooled(nn.Module):
    """A convolutional body, pooled over the image, under a linear head."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def _heads(width: int) -> st.SearchStrategy[int]:
    return st.sampled_from([heads for heads in (1, 2, 4) if width % heads == 0])


def _leaf_blocks(width: int) -> st.SearchStrategy[nn.Module]:
    flags = st.booleans()
    return st.one_of(
        st.builds(nn.Linear, st.just(width), st.just(width), flags),
        st.builds(Activation, st.sampled_from(sorted(_ACTIVATIONS))),
        st.builds(nn.LayerNorm, st.just(width)),
        st.builds(
            ParallelLinears,
            st.just(width),
            st.lists(st.tuples(st.sampled_from([4, 7, width]), flags), min_size=2, max_size=4),
        ),
        st.builds(Attention, st.just(width), _heads(width), flags, flags),
        st.builds(GatedMlp, st.just(width), st.sampled_from([8, 20]), flags),
        st.builds(MatmulConstant, st.just(width)),
        st.builds(Conv1D, st.just(width), st.just(width)),
        st.builds(TiedLinears, st.just(width)),
        st.builds(SharedLinear, st.just(width)),
        st.builds(NoOps),
        st.builds(DuplicateExpressions, st.just(width)),
        st.builds(ConstantSubgraph, st.just(width)),
        st.builds(LinearBatchNorm, st.just(width), flags),
        st.builds(nn.Dropout, st.just(0.1)),
    )


def _blocks(width: int) -> st.SearchStrategy[nn.Module]:
    leaves = _leaf_blocks(width)
    return st.one_of(leaves, st.builds(lambda a, b: Residual(nn.Sequential(a, b)), leaves, leaves))


@st.composite
def _conv_blocks(draw: st.DrawFn, channels: int) -> nn.Module:
    if draw(st.integers(0, 5)) == 0:
        return ConvBranch(channels)
    kernel = draw(st.sampled_from([1, 3]))
    groups = draw(st.sampled_from([1, 2, channels]))
    bias = draw(st.booleans())
    layers: list[nn.Module] = [
        nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=groups, bias=bias)
    ]
    if draw(st.booleans()):
        layers.append(nn.BatchNorm2d(channels, affine=draw(st.booleans())))
    if draw(st.booleans()):
        layers.append(nn.ReLU())
    block = nn.Sequential(*layers)
    return Residual(block) if draw(st.booleans()) else block


_SEEDS = st.integers(0, 2**16)
_DTYPES = st.sampled_from([torch.float32] * 4 + [torch.float64])


def _sizes(ranks: int) -> st.SearchStrategy[list[tuple[int, ...]]]:
    """Sizes of the example, at least 2 since the capture would fix a 1, and of two other calls."""
    example = st.tuples(*[st.integers(2, 5)] * ranks)
    other = st.tuples(*[st.integers(1, 9)] * ranks)
    return st.tuples(example, other, other).map(list)


def _make_inputs(
    sizes: Sequence[tuple[int, ...]], seed: int, make: Callable[..., Any]
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [make(size, generator) for size in sizes]


@st.composite
def sequence_models(
    draw: st.DrawFn,
    *,
    dtypes: st.SearchStrategy[torch.dtype] = _DTYPES,
    last: Callable[[int], nn.Module] = lambda width: nn.Identity(),
) -> Drawn:
    """Stacks of token-wise blocks on [batch, length, width] floats or on [batch, length] ids.

    `last(width)` is the block under the head, for properties that need one of its kind.
    """
    width = draw(st.sampled_from([8, 12, 33]))
    body = nn.Sequential(*draw(st.lists(_blocks(width), min_size=1, max_size=4)), last(width))
    seed, dtype = draw(_SEEDS), draw(dtypes)
    if draw(st.booleans()):
        model: nn.Module = Embedded(body, width, tied=draw(st.booleans()))
        name = "ids"
        tensors = _make_inputs(
            draw(_sizes(2)), seed, lambda size, g: torch.randint(0, _VOCAB, size, generator=g)
        )
    else:
        model, name = Headed(body, width), "x"
        tensors = _make_inputs(
            draw(_sizes(2)),
            seed,
            lambda size, g: torch.randn(*size, width, generator=g).to(dtype),
        )
    model = randomize(model, seed).to(dtype)
    example, *others = ({name: tensor} for tensor in tensors)
    return Drawn(model, example, tuple(others))


@st.composite
def conv_models(
    draw: st.DrawFn,
    *,
    dtypes: st.SearchStrategy[torch.dtype] = _DTYPES,
    last: Callable[[int], nn.Module] = lambda channels: nn.Identity(),
) -> Drawn:
    """Stacks of convolutions with and without batch norm on [batch, channels, 6, 6] images.

    `last(channels)` is the block under the pooling, for properties that need one of its kind.
    """
    channels = draw(st.sampled_from([4, 6]))
    blocks = draw(st.lists(_conv_blocks(channels), min_size=1, max_size=3))
    body = nn.Sequential(*blocks, last(channels))
    seed, dtype = draw(_SEEDS), draw(dtypes)
    tensors = _make_inputs(
        draw(_sizes(1)),
        seed,
        lambda size, g: torch.randn(*size, channels, 6, 6, generator=g).to(dtype),
    )
    model = randomize(Pooled(body, channels), seed).to(dtype)
    example, *others = ({"x": tensor} for tensor in tensors)
    return Drawn(model, example, tuple(others))


def models() -> st.SearchStrategy[Drawn]:
    """Any drawn model; two of three are made of token-wise blocks."""
    return st.one_of(sequence_models(), sequence_models(), conv_models())


def pass_lists(*, int8: bool = True, lower: bool = False) -> st.SearchStrategy[list[Any]]:
    """Lists of passes in a legal order: as instances or as specs, at least one, some twice."""
    import fxopt

    stages: list[list[Any]] = [
        ["canonicalize", fxopt.Canonicalize()],
        [fxopt.FuseConvBatchNorm(), "fuse-conv-batch-norm"],
        ["fuse-linears", fxopt.FuseLinears()],
        [fxopt.Canonicalize()],
        [
            fxopt.Int8Linear(mode="dynamic"),
            "int8-linear{mode=dynamic}",
            fxopt.Int8Linear(mode="weight_only"),
            "int8-linear{mode=weight_only}",
            fxopt.Int8Linear(mode="static"),
            "int8-linear{mode=static, activations=symmetric, observer=minmax}",
            fxopt.Int8Linear(activations="affine", max_layers=1),
        ]
        if int8
        else [],
        [fxopt.HalfAttention(force=True), "half-attention{force=true}"] if int8 else [],
        [fxopt.Prepack(), "prepack"],
        [fxopt.Lower(fallback="eager")] if lower else [],
    ]
    choices = [st.sampled_from([None, *stage]) for stage in stages if stage]
    return (
        st.tuples(*choices)
        .map(lambda chosen: [one for one in chosen if one is not None])
        .filter(bool)
    )
