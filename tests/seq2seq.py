"""Tiny models with an encoder and a decoder, as transformers has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import transformers

_WIDTHS: dict[str, Any] = {
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "vocab_size": 30,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def t5() -> Any:
    """T5 with a head, its decoder started by the id 0."""
    config = transformers.T5Config(
        vocab_size=30,
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    """BART with 20 positions."""
    config = transformers.BartConfig(max_position_embeddings=20, **_WIDTHS)
    return transformers.BartForConditionalGeneration(config)


def whisper() -> Any:
    """Whisper for 20 frames of 4 mels."""
    config = transformers.WhisperConfig(
        num_mel_bins=4, max_source_positions=10, max_target_positions=14, **_WIDTHS
    )
    return transformers.WhisperForConditionalGeneration(config)


def vision_encoder_decoder() -> Any:
    """ViT that writes by GPT-2."""
    vit = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
    )
    gpt2 = transformers.GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=20)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt2)
    return transformers.VisionEncoderDecoderModel(config)


SEQ2SEQ: Mapping[str, Callable[[], Any]] = {
    "t5": t5,
    "bart": bart,
    "whisper": whisper,
    "vision-encoder-decoder": vision_encoder_decoder,
}
