"""Seq2SeqGenerating: an optimised encoder-decoder that `generate` takes as one of its own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from fxopt.errors import InputError
from fxopt.generation import PrefixCache, append, prefix
from fxopt.generation.prefix import PREFIX
from fxopt.optimized.generating import (
    Generating,
    check_others,
    checked_ids,
    kept_slots,
    packed,
    seen_slots,
)
from fxopt.optimized.pipeline_result import PipelineResult


class SourceCache(EncoderDecoderCache):
    """The cache of an optimised encoder-decoder: a text that grows, and its source.

    `layers` of the source's part are those of transformers; all of it is cropped, reordered and
    repeated as its own.
    """

    def __init__(self) -> None:
        super().__init__(PrefixCache(), DynamicCache())

    def check_dynamic_cache(self, method: str) -> None:
        """Nothing: both parts crop, repeat and select."""


class Encoder:
    """The encoder of an optimised model, which `generate` asks for and calls itself."""

    def __init__(self, owner: Seq2SeqGenerating) -> None:
        self.owner, self.main_input_name = owner, owner.main_input_name

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        input_features: Tensor | None = None,
    ) -> BaseModelOutput:
        """The hidden states [B, T, C] of ids [B, T] with a mask, or of features [B, M, F].

        Raises `InputError` for what no program computes.
        """
        check_others(
            {
                "inputs_embeds": inputs_embeds,
                "output_attentions": output_attentions,
                "output_hidden_states": output_hidden_states,
            }
        )
        source = input_ids if self.main_input_name == "input_ids" else input_features
        hidden = self.owner.encode(source, attention_mask)
        return BaseModelOutput(last_hidden_state=hidden)


class Seq2SeqGenerating(Generating):
    """An encoder-decoder whose encoder and steps are fxopt programs over one set of weights.

    The encoder runs once a text, and so does what makes keys and values of its hidden states for
    cross-attention; each token is a step that is told of them. `opt.programs` holds the step that
    reads many tokens, the one that reads one, the encoder, and what makes keys and values.
    """

    kind: ClassVar[str] = "seq2seq"

    def install(self, outcome: PipelineResult) -> None:
        """Take over a finished pipeline."""
        super().install(outcome)
        object.__setattr__(self, "_encoder", Encoder(self))
        holder = self._modules.get("encoder")
        if holder is not None:  # of tensors; `generate` asks it for this
            holder.main_input_name = self.main_input_name  # type: ignore[assignment]

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits [B, K, V] for `decoder_input_ids` [B, S] behind what `past_key_values` holds.

        The source is `input_ids` [B, T], or the `encoder_outputs` for it, or held by the cache;
        `attention_mask` [B, T] is 0 where it is padding, and `decoder_attention_mask` [B, P + S]
        where the text is. `logits_to_keep` is the number of last slots, 0 for all, or their
        indices. Raises `InputError` for what no step computes.
        """
        ids = checked_ids(
            decoder_input_ids, decoder_inputs_embeds, labels, kwargs, "decoder_input_ids"
        )
        check_others({"inputs_embeds": inputs_embeds})
        use_cache = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        cache = self._new_cache() if past_key_values is None and use_cache else past_key_values
        given = {"hidden": hidden_of(encoder_outputs), "source": input_ids}
        return self._written(
            ids,
            cache,
            given,
            attention_mask,
            decoder_attention_mask,
            None,
            logits_to_keep,
            (use_cache, return_dict),
        )

    def _written(
        self,
        ids: Tensor,
        cache: Any,
        given: dict[str, Tensor | None],
        source_mask: Tensor | None,
        mask: Tensor | None,
        positions: Tensor | None,
        keep: int | Tensor,
        asked: tuple[bool, bool | None],
    ) -> Any:
        rows, length = ids.shape
        if cache is not None and not isinstance(cache, EncoderDecoderCache):
            raise InputError(
                f"past_key_values is a {type(cache).__name__}, and an encoder-decoder keeps an "
                "EncoderDecoderCache, of its text and of the source"
            )
        held = 0 if cache is None else int(cache.get_seq_length())
        hidden, keys, values = self._source(cache, given, source_mask)
        told = {
            "cross_seen": _mask_of(source_mask, keys[0], rows),
            "cross_keys": keys,
            "cross_values": values,
        }
        seen = seen_slots(mask, rows, held, length, ids.device, "decoder_attention_mask")
        own = None if cache is None else cache.self_attention_cache
        past_seen, sides = prefix(self.kept_shapes(), own, packed(seen[:, :held]))
        logits, new_keys, new_values = self._ask(
            "many" if length > 1 else "one",
            input_ids=ids,
            position_ids=self._positions(positions, seen, held),
            keep=kept_slots(keep, length, ids.device),
            seen=packed(seen[:, held:]),
            past_seen=past_seen,
            **dict(zip(PREFIX, sides, strict=False)),
            **told,
        )
        if own is not None:
            append(own, new_keys, new_values)
        use_cache, whole = asked
        output = Seq2SeqLMOutput(
            logits=logits,
            past_key_values=cache if use_cache else None,
            encoder_last_hidden_state=hidden,
        )
        whole = getattr(self.config, "return_dict", True) if whole is None else whole
        return output if whole else output.to_tuple()

    def encode(self, source: Tensor | None, mask: Tensor | None) -> Tensor:
        """The hidden states [B, T, C] of a source; raises `InputError` where none is given."""
        if source is None:
            raise InputError(
                f"there is no source: give {self.main_input_name}, encoder_outputs, or a "
                "past_key_values that was filled"
            )
        given = {"source": source}
        if self.main_input_name == "input_ids":
            given["source_seen"] = _mask_of(mask, source, len(source))
        hidden: Tensor = self._ask("source", **given)
        return hidden

    def get_encoder(self, modality: str | None = None) -> Encoder:
        """What gives the hidden states of a source."""
        encoder: Encoder = self._encoder
        return encoder

    def _source(
        self, cache: Any, given: dict[str, Tensor | None], mask: Tensor | None
    ) -> tuple[Tensor | None, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Hidden states where they are known, keys and values [B, G, T, D] of all layers."""
        layers = range(len(self.kept_shapes()))
        hidden = given["hidden"]
        if cache is not None and cache.cross_attention_cache.get_seq_length():
            filled: Any = cache.cross_attention_cache.layers
            keys = tuple(filled[layer].keys.contiguous() for layer in layers)
            return hidden, keys, tuple(filled[layer].values.contiguous() for layer in layers)
        if hidden is None:
            hidden = self.encode(given["source"], mask)
        keys, values = self._ask("hidden", hidden=hidden)
        if cache is not None:
            for layer in layers:
                cache.cross_attention_cache.update(keys[layer], values[layer], layer)
                cache.is_updated[layer] = True
        return hidden, keys, values

    def _new_cache(self) -> Cache:
        return SourceCache()


def hidden_of(outputs: Any) -> Tensor | None:
    """The hidden states in what an encoder gave."""
    found: Tensor | None = None if outputs is None else outputs[0]
    return found


def _mask_of(mask: Tensor | None, source: Tensor, rows: int) -> Tensor:
    """Which slots [B, T] of a source, ids [B, T] or keys [B, G, T, D], aren't padding."""
    length = source.shape[1] if source.dim() == 2 else source.shape[2]
    if mask is None:
        return torch.ones(rows, length, dtype=torch.bool, device=source.device)
    if mask.shape != (rows, length):
        raise InputError(
            f"attention_mask must be that of the source, [{rows}, {length}] in this call, not "
            f"{tuple(mask.shape)}"
        )
    return mask.to(device=source.device, dtype=torch.bool)
