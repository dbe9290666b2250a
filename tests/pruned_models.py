"""Models with channels to cut, drawn by composition, and mutations that make channels needless.

A mutation zeroes what makes a channel (its bias may stay: the channel is a constant then) or what
reads it. What is drawn here says nothing about what can be cut: that is for the oracles to judge.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from fxopt.analyses.channels import Group, Place
from fxopt.program import Program
from tests.architectures import randomize
from tests.models import Drawn, Embedded, GatedMlp, Headed, Pooled, Residual, SharedLinear
from tests.pruned_blocks import (
    AnyAttention,
    AttentionShape,
    CatSplit,
    Flattened,
    FusedGatedMlp,
    Gate,
    Grown,
    Head,
    MixedHidden,
    Mlp,
    PixelShuffled,
    Scaled,
    ShuffledMlp,
    Stem,
    TiedTranspose,
    TokenGate,
    Transposed,
    TwiceRead,
    WrittenRmsNorm,
)

_VOCAB, _SIDE = 23, 5
_FLAGS = st.booleans()
_KINDS = st.sampled_from(["relu", "gelu", "gelu_tanh", "silu", "tanh"])
_SEEDS = st.integers(0, 2**16)
DTYPES = st.sampled_from([torch.float32, torch.float64])


def _norms(width: int) -> st.SearchStrategy[nn.Module]:
    return st.one_of(
        st.builds(nn.LayerNorm, st.just(width), elementwise_affine=_FLAGS),
        st.builds(WrittenRmsNorm, st.just(width)),
        st.builds(nn.RMSNorm, st.just(width)),
        st.builds(Scaled, st.just(width)),
    )


@st.composite
def _attention_shapes(draw: st.DrawFn) -> AttentionShape:
    layout = draw(st.sampled_from(["separate", "separate", "(3, heads, dim)", "(heads, 3, dim)"]))
    heads = draw(st.sampled_from([2, 4]))
    key_heads = draw(st.sampled_from([1, 2, heads])) if layout == "separate" else heads
    return AttentionShape(
        heads,
        key_heads,
        draw(st.sampled_from([2, 4])),
        layout,  # type: ignore[arg-type]
        written=draw(_FLAGS),
        causal=draw(_FLAGS),
        rotary=draw(_FLAGS),
        relative=draw(_FLAGS),
        query_norm=draw(_FLAGS),
        repeat=draw(st.sampled_from(["interleave", "expand"])),
        bias=draw(_FLAGS),
    )


@st.composite
def _token_convolutions(draw: st.DrawFn, width: int) -> nn.Module:
    inner, kernel = draw(st.sampled_from([6, 8])), draw(st.sampled_from([1, 3]))
    bias, groups = draw(_FLAGS), draw(st.sampled_from([1, 2, inner]))
    return Transposed(
        nn.Sequential(
            nn.Conv1d(width, inner, kernel, padding=kernel // 2, bias=bias),
            nn.GELU(),
            nn.Conv1d(inner, inner, 3, padding=1, groups=groups, bias=draw(_FLAGS)),
            nn.SiLU(),
            nn.Conv1d(inner, width, kernel, padding=kernel // 2, bias=draw(_FLAGS)),
        )
    )


def _token_leaves(width: int) -> st.SearchStrategy[nn.Module]:
    wide, inner = st.just(width), st.sampled_from([4, 6, 12])
    hidden_norms = st.one_of(st.builds(nn.Identity), _norms(12))
    return st.one_of(
        st.builds(Mlp, wide, st.just(12), _KINDS, st.tuples(_FLAGS, _FLAGS), hidden_norms),
        st.builds(AnyAttention, wide, _attention_shapes()),
        st.builds(AnyAttention, wide, _attention_shapes()),
        st.builds(GatedMlp, wide, inner, _FLAGS),
        st.builds(FusedGatedMlp, wide, inner, _FLAGS, _FLAGS),
        st.builds(
            CatSplit, wide, st.sampled_from([(4, 8), (6, 6)]), st.sampled_from([3, 6, 8]), _KINDS
        ),
        _token_convolutions(width),
        st.builds(ShuffledMlp, wide, inner, _KINDS),
        st.builds(TokenGate, wide, inner),
        st.builds(MixedHidden, wide, inner, st.sampled_from(["softmax", "cumsum", "amax"])),
        st.builds(TiedTranspose, wide, inner, _KINDS),
        st.builds(TwiceRead, wide, inner, _KINDS),
        st.builds(SharedLinear, wide),
        st.builds(nn.Linear, wide, wide, _FLAGS),
    )


@st.composite
def _token_blocks(draw: st.DrawFn, width: int) -> nn.Module:
    inner = draw(_token_leaves(width))
    where = draw(st.sampled_from(["none", "pre", "pre", "post", "plain"]))
    if where == "none":
        return inner
    if where == "plain":
        return Residual(inner)
    norm = draw(_norms(width))
    pair = (norm, inner) if where == "pre" else (inner, norm)
    return Residual(nn.Sequential(*pair)) if draw(_FLAGS) else nn.Sequential(*pair)


@st.composite
def _image_norms(draw: st.DrawFn, channels: int) -> nn.Module:
    kind = draw(st.sampled_from(["none", "batch", "batch", "group"]))
    if kind == "batch":
        return nn.BatchNorm2d(channels, affine=draw(_FLAGS))
    return nn.GroupNorm(2, channels) if kind == "group" else nn.Identity()


@st.composite
def _image_hidden(draw: st.DrawFn, inner: int) -> nn.Module:
    """A layer from `inner` channels to as many, of the same side."""
    kind = draw(st.sampled_from(["grouped", "transposed", "gate", "max", "average", "none"]))
    groups, bias = draw(st.sampled_from([1, 2, inner])), draw(_FLAGS)
    if kind == "grouped":
        return nn.Conv2d(inner, inner, 3, padding=1, groups=groups, bias=bias)
    if kind == "transposed":
        return nn.ConvTranspose2d(inner, inner, 3, padding=1, groups=groups, bias=bias)
    if kind == "gate":
        return Gate(inner, 3)
    if kind == "max":
        return nn.MaxPool2d(3, 1, 1)
    return nn.AvgPool2d(3, 1, 1, count_include_pad=draw(_FLAGS)) if kind == "average" else nn.ReLU()


@st.composite
def _image_blocks(draw: st.DrawFn, channels: int) -> nn.Module:
    inner = draw(st.sampled_from([4, 8]))
    kind = draw(st.sampled_from(["bottleneck"] * 4 + ["grown", "shuffled"]))
    if kind == "grown":
        return Grown(channels, 4, draw(st.sampled_from([1, 3])))
    if kind == "shuffled":
        block: nn.Module = PixelShuffled(channels, inner)
    else:
        kernels = [draw(st.sampled_from([1, 3])) for _ in range(2)]
        up, down = (
            nn.Conv2d(*sizes, kernel, padding=kernel // 2, bias=draw(_FLAGS))
            for sizes, kernel in zip([(channels, inner), (inner, channels)], kernels, strict=True)
        )
        act = draw(st.sampled_from([nn.ReLU, nn.Hardswish, nn.SiLU, nn.Identity]))()
        block = nn.Sequential(up, draw(_image_norms(inner)), act, draw(_image_hidden(inner)), down)
    return Residual(block) if draw(_FLAGS) else block


def _sizes(ranks: int) -> st.SearchStrategy[list[tuple[int, ...]]]:
    """Sizes of the example, at least 2 since the capture would fix a 1, and of another call."""
    return st.tuples(
        st.tuples(*[st.integers(2, 4)] * ranks), st.tuples(*[st.integers(1, 7)] * ranks)
    ).map(list)


def _drawn(model: nn.Module, seed: int, dtype: torch.dtype, calls: Sequence[Tensor]) -> Drawn:
    name = next(iter(inspect.signature(model.forward).parameters))
    example, *others = ({name: call} for call in calls)
    return Drawn(randomize(model, seed).to(dtype), example, tuple(others))


def _noise(sizes: Sequence[tuple[int, ...]], tail: Sequence[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*size, *tail, generator=generator) for size in sizes]


@st.composite
def token_models(
    draw: st.DrawFn, *, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, blocks: int = 3
) -> Drawn:
    """Up to `blocks` token blocks on floats [batch, length, 8] or ids [batch, length]."""
    width = 8
    body = nn.Sequential(*draw(st.lists(_token_blocks(width), min_size=1, max_size=blocks)))
    seed, dtype, sizes = draw(_SEEDS), draw(dtypes), draw(_sizes(2))
    kind = draw(st.sampled_from(["stem", "stem", "head", "hidden", "ids", "tied"]))
    if kind in ("ids", "tied"):
        generator = torch.Generator().manual_seed(seed)
        calls = [torch.randint(0, _VOCAB, size, generator=generator) for size in sizes]
        return _drawn(Embedded(body, width, tied=kind == "tied"), seed, dtype, calls)
    given = 6 if kind == "stem" else width
    tops = {"head": Head, "hidden": Headed}
    model = Stem(given, body, width) if kind == "stem" else tops[kind](body, width)
    return _drawn(model, seed, dtype, [one.to(dtype) for one in _noise(sizes, [given], seed)])


@st.composite
def image_models(
    draw: st.DrawFn, *, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, blocks: int = 3
) -> Drawn:
    """A convolution and up to `blocks` image blocks on [batch, 3, 5, 5]; pooled or flattened."""
    channels = 4
    stem = nn.Conv2d(3, channels, draw(st.sampled_from([1, 3])), padding="same", bias=draw(_FLAGS))
    drawn = draw(st.lists(_image_blocks(channels), min_size=1, max_size=blocks))
    body = nn.Sequential(stem, draw(_image_norms(channels)), *drawn)
    seed, dtype, sizes = draw(_SEEDS), draw(dtypes), draw(_sizes(1))
    flat = draw(_FLAGS)
    model = Flattened(body, channels, _SIDE) if flat else Pooled(body, channels)
    calls = _noise(sizes, [3, _SIDE, _SIDE], seed)
    return _drawn(model, seed, dtype, [one.to(dtype) for one in calls])


def prunable_models(
    *, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, blocks: int = 3
) -> st.SearchStrategy[Drawn]:
    """Any of them; two of three are made of token blocks."""
    tokens = token_models(dtypes=dtypes, blocks=blocks)
    images = image_models(dtypes=dtypes, blocks=blocks)
    return st.integers(0, 2).flatmap(lambda third: images if third == 2 else tokens)


@dataclass(frozen=True)
class Kill:
    """Channels of one group that are made needless.

    `how` is "zero" (all weights and biases that make them), "constant" (biases stay) or "unread"
    (the columns of the weights that read them).
    """

    group: str
    channels: tuple[int, ...]
    how: str


@st.composite
def kills(draw: st.DrawFn, groups: Sequence[Group]) -> list[Kill]:
    """Mutations of about every second group, whether it can be cut or not."""
    found = []
    for group in groups:
        if not draw(_FLAGS):
            continue
        channels = draw(
            st.sets(st.integers(0, group.size - 1), min_size=1, max_size=group.size - 1)
        )
        how = draw(st.sampled_from(["zero", "constant", "constant", "unread"]))
        found.append(Kill(group.name, tuple(sorted(channels)), how))
    return found


def kill(program: Program, groups: Mapping[str, Group], mutations: Sequence[Kill]) -> None:
    """Mutate the state of `program`, which is the model's own."""
    for one in mutations:
        group, chosen = groups[one.group], torch.tensor(one.channels)
        if one.how == "unread":
            for reader in group.readers:
                if reader.kind == "weight" and reader.weight is not None:
                    _zero(program, reader.weight, chosen)
            continue
        for place in group.producers:
            is_weight = place.node.meta["val"].ndim > 1
            if is_weight or (one.how == "zero" and place.name.endswith("bias")):
                _zero(program, place, chosen)


def _zero(program: Program, place: Place, chosen: Tensor) -> None:
    tensor = program.tensor(place.name)
    if isinstance(tensor, nn.Parameter):  # a buffer is a table of angles, not a weight
        tensor.data.index_fill_(place.axis, place.positions[chosen].flatten(), 0)


@st.composite
def masked(draw: st.DrawFn, models: st.SearchStrategy[Drawn]) -> Drawn:
    """A model with some layers under masks of `torch.nn.utils.prune`, left in or made permanent."""
    drawn = draw(models)
    prunable = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
    for module in drawn.model.modules():
        if not isinstance(module, prunable) or draw(st.integers(0, 2)):
            continue
        dim = draw(st.integers(0, 1))
        size = module.weight.shape[dim]
        rows = draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
        mask = torch.ones_like(module.weight).index_fill_(
            dim, torch.tensor([*rows], dtype=torch.int64), 0
        )
        prune.custom_from_mask(module, "weight", mask)
        if draw(_FLAGS):
            prune.remove(module, "weight")
    return drawn
