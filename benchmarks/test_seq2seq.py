"""Encoder-decoders of random weights write 48 tokens: whole `generate` calls in turns.

T5-small, a Marian of opus-mt's sizes and Whisper-tiny, greedy and with four beams.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import fxopt
from benchmarks.conftest import Effort, Record
from benchmarks.sidebyside import in_turns, spread, timing
from fxopt.timing import ratio

_SOURCE, _NEW = 32, 48
_PASSES = "canonicalize, fuse-linears, lower"
_WIDTHS: dict[str, Any] = {
    "d_model": 512,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
    "decoder_ffn_dim": 2048,
}
_QUICK: dict[str, Any] = {name: 32 if name == "d_model" else 2 for name in _WIDTHS}
_TINY: dict[str, Any] = {
    "d_model": 384,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
}


def _t5(quick: bool) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4} if quick else {}
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes))


def _marian(quick: bool) -> Any:
    from transformers import MarianConfig, MarianMTModel

    special = {"pad_token_id": 58100, "decoder_start_token_id": 58100, "eos_token_id": 0}
    sizes = {**(_QUICK if quick else _WIDTHS), "max_position_embeddings": 512}
    return MarianMTModel(MarianConfig(vocab_size=58101, scale_embedding=True, **special, **sizes))


def _whisper(quick: bool) -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    return WhisperForConditionalGeneration(WhisperConfig(**(_QUICK if quick else _TINY)))


_MODELS: dict[str, Callable[[bool], Any]] = {
    "t5_small": _t5,
    "marian": _marian,
    "whisper_tiny": _whisper,
}


@pytest.mark.parametrize("name", _MODELS)
def test_seq2seq(name: str, quick: bool, effort: Effort, benchmark, record: Record) -> None:  # type: ignore[no-untyped-def]
    """Milliseconds of a call, and whether each token is the original's."""
    torch.manual_seed(0)
    model = _MODELS[name](quick).eval()
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    source = _source(model)
    opt = fxopt.transform(model, _PASSES, generation=True, measure_cost=False)
    figures: dict[str, Any] = {"model": name, "new_tokens": _NEW, "passes": _PASSES}
    runs: dict[str, Callable[[], object]] = {}
    for beams in (1, 4):
        calls = {"transformers fp32": model, "fxopt fp32": opt}
        mine = {
            f"{who}, {beams} beams": partial(_written, one, source, beams)
            for who, one in calls.items()
        }
        wanted, found = (call() for call in mine.values())
        figures[f"same tokens, {beams} beams"] = bool(torch.equal(wanted, found))
        runs |= mine
    times = benchmark.pedantic(
        in_turns, args=(runs, effort["repeats"], effort["seconds"]), rounds=1
    )
    figures["systems"] = {who: timing(one) for who, one in times.items()}
    figures["ratios"] = {
        f"fxopt / transformers, {beams} beams": spread(
            ratio(times[f"fxopt fp32, {beams} beams"], times[f"transformers fp32, {beams} beams"])
        )
        for beams in (1, 4)
    }
    benchmark.extra_info.update(figures)
    record(f"{name}_generation", figures)


def _source(model: Any) -> dict[str, torch.Tensor]:
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(1, model.config.num_mel_bins, 3000)}
    ids = torch.randint(10, 30000, (1, _SOURCE))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _written(model: Any, source: dict[str, torch.Tensor], beams: int) -> torch.Tensor:
    return model.generate(  # type: ignore[no-any-return]
        **source, max_new_tokens=_NEW, min_new_tokens=_NEW, do_sample=False, num_beams=beams
    )
