"""An encoder-decoder of transformers as a step: three programs of one module.

    step(source, source_seen)  =  hidden states of the source, once a text
    step(hidden)  =  keys and values that cross-attention reads, once a text
    step(ids, positions, keep, seen, past_seen, keys, values, cross_seen, cross_keys, cross_values)
        =  logits, new keys, new values

The last is the step of a decoder (`fxopt.generation.seam`), which is told of the source besides.
Cross-attention is attention to a prefix of which every slot lies before every query: the same
operator, whose new slots nothing sees.

The scores of T5's self-attention have a bias that depends on the distance of two slots. That
attention is plain operators of the graph, over prefix and new slots put together.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fxopt.errors import ModelError
from fxopt.generation.cache import by_head
from fxopt.generation.seam import StepCache, active, attention, stepping
from fxopt.kernels.cached_attention import visible_slots

ATTENTION = "fxopt_seq2seq"
"""The name under which transformers knows the attention of a step that has a source."""

Pair = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


class _CrossLayers(Cache):
    """The given keys and values [B, G, T, D] of a source, as a cache that is filled."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        super().__init__(layers=[])
        self.layers: list[Any] = [
            SimpleNamespace(keys=key, values=value) for key, value in zip(keys, values, strict=True)
        ]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Some: that a source has slots is no branch of the graph."""
        return 1


class _CrossRecorder(Cache):
    """Notes keys and values of a source as the model makes them."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values themselves."""
        self.keys[layer_idx], self.values[layer_idx] = key_states, value_states
        return key_states, value_states


class Seq2SeqCache(StepCache):
    """What one step of a decoder knows of earlier slots and of the source.

    `offset` is what makes positions of 0, 1, ...: of the prefix's slots where `distances` says that
    attention is told how far slots are apart.
    """

    def __init__(
        self,
        past_seen: Tensor,
        seen: Tensor,
        own: Pair,
        cross_seen: Tensor,
        cross: Pair,
    ) -> None:
        super().__init__(past_seen, seen, *own)
        self.cross_seen, self.cross = cross_seen, _CrossLayers(*cross)
        self.distances = False
        self.offset: Tensor | int = past_seen.shape[1]
        self._masks: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values [B, G, S, D]; with `distances` behind those of the prefix."""
        keys, values = super().update(key_states, value_states, layer_idx)
        if not self.distances:
            return keys, values
        past = by_head(self.past_keys[layer_idx]), by_head(self.past_values[layer_idx])
        return torch.cat((past[0], keys), 2), torch.cat((past[1], values), 2)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """What the model adds to 0, 1, ... to have the positions of the new slots."""
        return self.offset

    def mask(self, bias: Tensor) -> Tensor:
        """`bias` [1, H, S, P + S] where a query sees a slot, [B, H, S, P + S]; kept for layers."""
        if id(bias) not in self._masks:
            visible = visible_slots(self.past_seen, self.seen, None)
            mask = torch.where(visible, bias, torch.finfo(bias.dtype).min)
            self._masks[id(bias)] = (bias, mask)
        return self._masks[id(bias)][1]


def seq2seq_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of the S new slots [B, H, S, D] to the source or to text, as [B, S, H, D].

    Raises `ModelError` for what a step can't hold.
    """
    cache: Any = active.get()
    layer: Any = getattr(module, "layer_idx", None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    is_cross = layer in range(len(cache.cross)) and cache.cross.layers[layer].keys is key
    if is_cross and attention_mask is None:
        return _to_source(module, query, key, value, scale, position_bias), None
    if position_bias is not None:
        kwargs["position_bias"] = position_bias
    if position_bias is None or not cache.distances or attention_mask is not None:
        return attention(module, query, key, value, attention_mask, scaling, **kwargs)
    if layer not in cache.new_keys:
        raise ModelError(f"{type(module).__name__} attends to other keys than the cache's")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    attended = sdpa(query, key, value, cache.mask(position_bias), scale=scale)
    return attended.transpose(1, 2), None


def _to_source(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    if bias is not None and getattr(module, "has_relative_attention_bias", True):
        raise ModelError(f"{type(module).__name__} biases its attention to the source")
    cache: Any = active.get()
    none = torch.zeros_like(query)  # new keys and values, which nothing sees
    attended: Tensor = torch.ops.fxopt.cached_attention(
        query,
        none,
        none,
        key,
        value,
        cache.cross_seen,
        torch.zeros_like(cache.seen),
        scale,
    )
    return attended


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, seq2seq_attention)


class Seq2SeqStep:
    """The forward of the three programs, in front of a model's own class."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        keep: Tensor | None = None,
        seen: Tensor | None = None,
        past_seen: Tensor | None = None,
        keys: tuple[Tensor, ...] | None = None,
        values: tuple[Tensor, ...] | None = None,
        cross_seen: Tensor | None = None,
        cross_keys: tuple[Tensor, ...] | None = None,
        cross_values: tuple[Tensor, ...] | None = None,
        source: Tensor | None = None,
        source_seen: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Any:
        """One of three, by what is given.

        `source` (ids int64 [B, T] or features float [B, M, F]), for text with `source_seen` bool
        [B, T]: the hidden states [B, T, C]. `hidden`: keys and values [B, G, T, D] of every layer
        for it. Else logits [B, K, V], new keys and new values [S, B, G, D], of what a step of a
        decoder takes, `cross_seen` bool [B, T], `cross_keys` and `cross_values`.
        """
        if source is not None:
            return _encoded(self, source, source_seen)
        forward: Any = super().forward  # type: ignore[misc]
        if hidden is not None:
            return _crossed(forward, hidden)
        told: Any = (past_seen, seen, (keys, values), cross_seen, (cross_keys, cross_values))
        read: Any = (input_ids, position_ids, keep)
        return _stepped(self, forward, Seq2SeqCache(*told), *read)


def _encoded(model: Any, source: Tensor, seen: Tensor | None) -> Tensor:
    encoder = model.get_encoder()
    given = {encoder.main_input_name: source}
    if seen is not None:
        given["attention_mask"] = seen
    hidden: Tensor = encoder(**given, return_dict=True).last_hidden_state
    return hidden


def _crossed(forward: Any, hidden: Tensor) -> Pair:
    """Keys and values of the source as the decoder makes them; what else it makes isn't used."""
    recorder = _CrossRecorder()
    forward(
        encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
        decoder_input_ids=torch.zeros(hidden.shape[0], 1, dtype=torch.int64, device=hidden.device),
        past_key_values=EncoderDecoderCache(DynamicCache(), recorder),
        use_cache=True,
        return_dict=True,
    )
    layers = sorted(recorder.keys)
    return (
        tuple(recorder.keys[layer].contiguous() for layer in layers),
        tuple(recorder.values[layer].contiguous() for layer in layers),
    )


def _stepped(
    model: Any, forward: Any, cache: Seq2SeqCache, ids: Tensor, positions: Tensor, keep: Tensor
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    named: dict[str, Any] = {}
    cache.distances = has_distances(model)
    if "decoder_position_ids" in inspect.signature(forward).parameters:
        named["decoder_position_ids"] = positions
    elif not cache.distances:  # those of the first row, since these models have them of all rows
        slots = torch.arange(positions.shape[1], device=positions.device)
        cache.offset = positions[0] - slots
    with stepping(model, cache, ATTENTION):
        output = forward(
            encoder_outputs=BaseModelOutput(last_hidden_state=cache.cross.layers[0].keys),
            decoder_input_ids=ids,
            decoder_attention_mask=cache.seen,
            past_key_values=EncoderDecoderCache(cache, cache.cross),
            use_cache=True,
            return_dict=True,
            **named,
        )
    return (output.logits[:, keep], *cache.new_slots(type(model).__name__))


def has_distances(model: Any) -> bool:
    """Whether the decoder's attention has a bias that depends on how far slots are apart."""
    return any(hasattr(part, "relative_attention_bias") for part in model.get_decoder().modules())
