"""Small language models of every family that is read step by step, with random weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers

import fxopt
from tests.architectures import randomize

VOCAB = 61
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
}
_GPT = {"vocab_size": VOCAB, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_WITHOUT_HEADS = {key: value for key, value in _LLAMA.items() if key != "head_dim"}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _WITHOUT_HEADS),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _LLAMA),
    "Qwen3Moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_LLAMA, **_EXPERTS}),
    "Mistral": ("MistralConfig", "MistralForCausalLM", {**_LLAMA, "sliding_window": 4}),
    "Mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_LLAMA, "num_local_experts": 4, "sliding_window": None},
    ),
    "Gemma": ("GemmaConfig", "GemmaForCausalLM", _LLAMA),
    "Gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_LLAMA, "sliding_window": 4}),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_LLAMA, "sliding_window": 4}),
    "Phi": ("PhiConfig", "PhiForCausalLM", _WITHOUT_HEADS),
    "Phi3": ("Phi3Config", "Phi3ForCausalLM", {**_WITHOUT_HEADS, "pad_token_id": 0}),
    "GPT2": ("GPT2Config", "GPT2LMHeadModel", {**_GPT, "bos_token_id": 1, "eos_token_id": 2}),
    "OPT": ("OPTConfig", "OPTForCausalLM", _OPT),
    "GPTNeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _WITHOUT_HEADS),
    "OLMo2": ("Olmo2Config", "Olmo2ForCausalLM", _WITHOUT_HEADS),
    "GptOss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {**_LLAMA, "num_local_experts": 4, "sliding_window": 4},
    ),
}


def language_model(family: str, **changes: Any) -> Any:
    """A new model of `family` in eval mode, without a token that ends a text."""
    config, kind, options = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(transformers, config)(**{**options, **changes})
        model = randomize(getattr(transformers, kind)(made))
    if family == "Gemma2":  # older transformers leave the soft cap out of others
        model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@functools.cache
def original(family: str) -> Any:
    """A model of `family`; no test writes to it."""
    return language_model(family)


@functools.cache
def shared(family: str) -> tuple[Any, Any]:
    """The `original` of `family` and what `Canonicalize` makes of it; no test writes to either."""
    return original(family), fxopt.transform(original(family), "canonicalize")


def text(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Ids int64 [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def words() -> Any:
    """A tokenizer of VOCAB words."""
    import tokenizers

    vocabulary = {f"w{index}": index for index in range(VOCAB)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="w0", unk_token="w0"
    )
