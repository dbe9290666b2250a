"""What can be cut in a model, by the names that its modules carry, and channels made constant.

For models of transformers: hidden units of the feed-forward nets and attention heads. For
convolutional networks: the output channels of every convolution but the head's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.systems.system import Inputs

# query, key and value, as the model families name them.
_PROJECTIONS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
)
_FFN_SIZES = ("intermediate_size", "encoder_ffn_dim", "ffn_dim", "d_ff", "hidden_dim", "n_inner")
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads")
_KEEPS_ITS_CHANNELS = ("head", "squeeze")


@dataclass(frozen=True)
class Attention:
    """An attention as it was found: its module, projections, numbers of heads, features of one."""

    module: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    heads: int
    key_heads: int
    head_size: int

    @property
    def projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return (self.query, self.key, self.value)


def attentions(model: nn.Module) -> list[Attention]:
    """Every module that holds three linear projections under one of the usual triples of names."""
    return [found for module in model.modules() if (found := _attention(module)) is not None]


def feed_forward(model: nn.Module) -> dict[str, nn.Linear]:
    """By name, the linear layers that give the hidden units: the up, and the gate where it is one.

    Where a model keeps these weights in another kind of module or parameter, nothing is found.
    """
    size = ffn_size(model)
    projections = {layer for found in attentions(model) for layer in found.projections}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == size
        and module not in projections
    }


def ffn_size(model: nn.Module) -> int | None:
    """Hidden units of a feed-forward net, by the model's config; None without a config."""
    config = getattr(model, "config", None)
    sizes = [getattr(config, name, None) for name in _FFN_SIZES]
    found = next((size for size in sizes if size), None)
    if found is None and (width := getattr(config, "n_embd", None)):
        return 4 * int(width)
    return found


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d | nn.ConvTranspose2d]:
    """By name, the convolutions whose output channels may go: not the head, not the gates."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
        and not any(part in _KEEPS_ITS_CHANNELS for part in name.split("."))
    }


def constant_positions(channels: int, groups: int) -> list[int]:
    """The first half of each of `groups` equal runs of `channels` positions."""
    run = channels // groups
    return [start + i for start in range(0, channels, run) for i in range(run // 2)]


def channel_groups(model: nn.Module) -> int:
    """The most groups that any group norm or grouped, not depthwise, convolution has; else 1."""
    found = [module.num_groups for module in model.modules() if isinstance(module, nn.GroupNorm)]
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    found += [conv.groups for conv in convs if 1 < conv.groups < conv.out_channels]
    return max(found, default=1)


@torch.no_grad()
def make_constant(model: nn.Module, kind: str, inputs: Inputs, *, zero: bool = False) -> None:
    """Half of the channels of `kind` get zero weights and keep their biases, so they are constant.

    `kind` is "ffn", "heads" (the values of the first half of the key/value heads) or "channels".
    With `zero`, what they are is zero: biases go too, and the weight and bias of each norm wherever
    one call with `inputs` shows it a constant channel.
    """
    for weight, bias, rows in _producers(model, kind):
        weight[rows] = 0.0
        if zero and bias is not None:
            bias[rows] = 0.0
    if zero and kind == "channels":
        norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))]
        hooks = [norm.register_forward_pre_hook(_forget_constants) for norm in norms]
        model(**inputs)
        for hook in hooks:
            hook.remove()


def _forget_constants(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    image = inputs[0]
    constant = image.amax((0, 2, 3)) == image.amin((0, 2, 3))
    for parameter in norm.parameters():
        parameter[constant] = 0.0


def _producers(model: nn.Module, kind: str) -> Iterator[tuple[Tensor, Tensor | None, list[int]]]:
    """Weights with the output channels in front, their biases, and the rows to make constant."""
    if kind == "ffn":
        yield from _hidden_units(model)
    elif kind == "heads":
        for found in attentions(model):
            rows = list(range(found.key_heads // 2 * found.head_size))
            yield found.value.weight, found.value.bias, rows
        for fused in _conv1d(model, "c_attn"):
            size = fused.nf // 3
            yield fused.weight.t(), fused.bias, list(range(2 * size, 2 * size + size // 2))
    else:
        for conv in convolutions(model).values():
            transposed = isinstance(conv, nn.ConvTranspose2d)
            weight = conv.weight.transpose(0, 1) if transposed else conv.weight
            yield weight, conv.bias, constant_positions(conv.out_channels, channel_groups(model))


def _hidden_units(model: nn.Module) -> Iterator[tuple[Tensor, Tensor | None, list[int]]]:
    for layer in feed_forward(model).values():
        yield layer.weight, layer.bias, constant_positions(layer.out_features, 1)
    for layer in _conv1d(model, "c_fc"):
        yield layer.weight.t(), layer.bias, constant_positions(layer.nf, 1)
    for experts in _experts(model).values():
        # [experts, gates then ups, hidden]: the same half of each.
        yield experts.transpose(0, 1), None, constant_positions(experts.shape[1], 2)


@dataclass(frozen=True)
class Width:
    """The axis of a parameter on which channels stand, `unit` indices each, in `times` copies."""

    name: str
    axis: int
    unit: int = 1
    times: int = 1

    def count(self, state: Mapping[str, Tensor]) -> int:
        """How many channels stand there in this state.

        A pass that computes a parameter anew puts its own word behind the name.
        """
        names = (n for n in state if n == self.name or n.startswith(f"{self.name}_"))
        return state[next(names)].shape[self.axis] // self.unit * self.times


def widths(model: nn.Module) -> dict[str, list[Width]]:
    """Where what can be cut stands: "ffn" units, query "heads", conv "channels".

    A gate and its up make one unit. What the model doesn't have is left out.
    """
    names = {module: name for name, module in model.named_modules()}
    units = {name.rpartition(".")[0]: name for name in feed_forward(model)}
    ffn = [Width(f"{name}.weight", 0) for name in units.values()]
    ffn += [Width(f"{names[layer]}.weight", 1) for layer in _conv1d(model, "c_fc")]
    for name, experts in _experts(model).items():
        ffn.append(Width(name, 1, 2, len(experts)))
    heads = [Width(f"{names[a.query]}.weight", 0, a.head_size) for a in attentions(model)]
    for fused in _conv1d(model, "c_attn"):
        heads.append(Width(f"{names[fused]}.weight", 1, fused.nf // _head_count(model)))
    if heads:
        return {"ffn": ffn, "heads": heads}
    convs = convolutions(model).items()
    transposed = (nn.ConvTranspose2d,)
    return {"channels": [Width(f"{n}.weight", int(isinstance(c, transposed))) for n, c in convs]}


def sizes(found: Mapping[str, Sequence[Width]], state: Mapping[str, Tensor]) -> dict[str, int]:
    """How many channels of each kind there are in a state, of the model or of one cut from it."""
    return {kind: sum(width.count(state) for width in of_it) for kind, of_it in found.items()}


def parameters(model: nn.Module) -> int:
    """Entries of all parameters; what is tied counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _conv1d(model: nn.Module, name: str) -> list[Any]:
    """GPT-2's linear layers of that name, whose weights are `[in, out]`."""
    modules = model.named_modules()
    return [m for path, m in modules if path.endswith(name) and type(m).__name__ == "Conv1D"]


def _head_count(model: nn.Module) -> int:
    return int(getattr(model, "config").num_attention_heads)  # noqa: B009


def _experts(model: nn.Module) -> dict[str, Tensor]:
    """Weights of all experts' gates and ups in one parameter, `[experts, 2 x units, hidden]`."""
    named = model.named_parameters()
    return {name: p for name, p in named if name.endswith("gate_up_proj") and p.ndim == 3}


def _attention(module: nn.Module) -> Attention | None:
    for names in _PROJECTIONS:
        layers = [getattr(module, name, None) for name in names]
        if not all(isinstance(layer, nn.Linear) for layer in layers):
            continue
        heads = _heads(module)
        if heads is None:
            return None
        query, key, value = (layer for layer in layers if isinstance(layer, nn.Linear))
        size = query.out_features // heads
        return Attention(module, query, key, value, heads, key.out_features // size, size)
    return None


def _heads(module: nn.Module) -> int | None:
    for holder in (module, getattr(module, "config", None)):
        for name in _HEAD_COUNTS:
            if isinstance(found := getattr(holder, name, None), int):
                return found
    return None
