"""Small encoder-decoders of every family that is read step by step, with random weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from torch import Tensor

import fxopt
from tests.architectures import randomize
from tests.generation.language_models import VOCAB, text

MELS, FRAMES = 8, 40
_BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "max_position_embeddings": 128,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
_WHISPER = {
    **{key: value for key, value in _BART.items() if key != "max_position_embeddings"},
    "num_mel_bins": MELS,
    "max_source_positions": FRAMES // 2,
    "max_target_positions": 128,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BART": ("BartConfig", "BartForConditionalGeneration", _BART),
    "Marian": ("MarianConfig", "MarianMTModel", {**_BART, "decoder_layers": 3}),
    "T5": ("T5Config", "T5ForConditionalGeneration", _T5),
    "T5 gated": (
        "T5Config",
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "Whisper": ("WhisperConfig", "WhisperForConditionalGeneration", _WHISPER),
}


def seq2seq_model(family: str, **changes: Any) -> Any:
    """A new model of `family` in eval mode, without a token that ends a text."""
    config, kind, options = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(transformers, config)(**{**options, **changes})
        model = randomize(getattr(transformers, kind)(made))
    model.generation_config.eos_token_id = None
    model.generation_config.forced_eos_token_id = None
    return model


@functools.cache
def original(family: str) -> Any:
    """A model of `family`; no test writes to it."""
    return seq2seq_model(family)


@functools.cache
def shared(family: str) -> tuple[Any, Any]:
    """The `original` of `family` and what `Canonicalize` makes of it; no test writes to either."""
    return original(family), fxopt.transform(original(family), "canonicalize")


def source(family: str, rows: int = 2, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """What the encoder is given: text with padding ahead and behind, or features."""
    if family == "Whisper":
        generator = torch.Generator().manual_seed(seed)
        return {"input_features": torch.randn(rows, MELS, FRAMES, generator=generator)}
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, : length // 3] = 0
    mask[-1, length - length // 4 :] = 0
    return {"input_ids": text(rows, length, seed), "attention_mask": mask}
