"""WhisperGenerating: an optimised Whisper, whose `generate` is transformers' own for speech."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

from torch import Tensor
from transformers import Cache, GenerationMixin
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from fxopt.optimized.generating import checked_ids
from fxopt.optimized.pipeline_result import PipelineResult
from fxopt.optimized.seq2seq import Seq2SeqGenerating, hidden_of

_STRIDES = {"conv1": 1, "conv2": 2}
"""Of the encoder's convolutions: frames to a slot of the source."""


class WhisperGenerating(WhisperGenerationMixin, Seq2SeqGenerating):
    """Whisper as fxopt programs: speech is a source of which every slot is heard."""

    main_input_name = "input_features"
    input_modalities = ("audio", "text")
    kind: ClassVar[str] = "whisper"

    def install(self, outcome: PipelineResult) -> None:
        """Take over a finished pipeline, with what `generate` reads of the model inside."""
        super().install(outcome)
        holder: Any = self._modules["model"]
        if "encoder" not in holder._modules:
            holder.encoder = self._encoder
        for name, stride in _STRIDES.items():
            setattr(holder.encoder, name, SimpleNamespace(stride=(stride,)))
        holder.config = self.config

    def forward(  # type: ignore[override]
        self,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits [B, K, V] for `decoder_input_ids` [B, S] about `input_features` [B, M, F].

        `attention_mask`, of frames, says nothing to this model. Else as for other encoder-decoders;
        `decoder_position_ids` [B, S] left out are the slots.
        """
        ids = checked_ids(
            decoder_input_ids, decoder_inputs_embeds, labels, kwargs, "decoder_input_ids"
        )
        use_cache = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        cache = self._new_cache() if past_key_values is None and use_cache else past_key_values
        given = {"hidden": hidden_of(encoder_outputs), "source": input_features}
        return self._written(
            ids,
            cache,
            given,
            None,
            decoder_attention_mask,
            decoder_position_ids,
            logits_to_keep,
            (use_cache, return_dict),
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """The arguments of one step; positions count what is seen where a text is padded."""
        mask = kwargs.get("decoder_attention_mask")
        if mask is not None and kwargs.get("decoder_position_ids") is None:
            positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
            kwargs["decoder_position_ids"] = positions[..., -input_ids.shape[1] :]
        mixin: Any = GenerationMixin
        given: dict[str, Any] = mixin.prepare_inputs_for_generation(
            self, input_ids, *args, **kwargs
        )
        return given
