"""Bytes that casts move in one forward: torch.autocast beside ours, counted while both run eagerly.

torch.autocast to bfloat16, one region a call, on the model as it is; ours after `[Canonicalize,
Autocast]`, evaluated without a compiler, which would only remove casts. Nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import fxopt
from benchmarks.conftest import Record
from benchmarks.models import bert_base, gpt2, smollm2, t5_base_encoder, vit_base
from benchmarks.systems import InAutocast, Workload
from fxopt.analyses.precision import Casts, autocast_casts, counted_casts
from fxopt.capture import capture

_PASSES = "canonicalize, autocast{dtype=bfloat16, force=true}"
_BATCH, _LENGTH = 8, 128


def _smollm2_next_token(quick: bool) -> Workload:
    """A prompt of 512 tokens, the logits of its last position."""
    return smollm2(64 if quick else 512, quick=quick).workload(1)


def _smollm2_all_logits(quick: bool) -> Workload:
    """A batch of 8 x 128, the logits of every position, as a loss takes them."""
    language = smollm2(16 if quick else _LENGTH, quick=quick)
    ids = torch.cat(language.evaluation[:_BATCH])
    return replace(language.workload(0), inputs={"input_ids": ids})


_MODELS: dict[str, Callable[[bool], Workload]] = {
    "BERT-base, 8 x 128": lambda quick: bert_base(_BATCH, _LENGTH, quick=quick),
    "GPT-2, 8 x 128": lambda quick: gpt2(_BATCH, _LENGTH, quick=quick),
    "GPT-2 with its head, 8 x 128, all logits": lambda quick: gpt2(
        _BATCH, _LENGTH, quick=quick, head=True
    ),
    "SmolLM2-135M, 1 x 512, next token": _smollm2_next_token,
    "SmolLM2-135M, 8 x 128, all logits": _smollm2_all_logits,
    "ViT-base, 8 images": lambda quick: vit_base(_BATCH, quick=quick),
    "T5-base encoder, 8 x 128": lambda quick: t5_base_encoder(_BATCH, _LENGTH, quick=quick),
}


def test_bytes_cast_in_a_forward(quick: bool, record: Record) -> None:
    models = {name: _figures(make(quick)) for name, make in _MODELS.items()}
    ratios = {
        f"fxopt / torch.autocast, {name}{kind}": rows.pop(f"ratio{kind}")
        for name, rows in models.items()
        for kind in ("", " of activations")
    }
    record("casts", {"ratios": ratios, **models})


@torch.no_grad()
def _figures(workload: Workload) -> dict[str, Any]:
    theirs = _under_autocast(workload)
    ours = _transformed(workload)
    told = autocast_casts(capture(workload.model, dict(workload.inputs)), torch.bfloat16)
    if not theirs.count:
        pytest.fail("torch.autocast cast nothing, so that there is nothing to compare with")
    return {
        "torch.autocast": _row(theirs),
        "torch.autocast, told from the graph": _row(told),
        "fxopt": _row(ours),
        "ratio": round(ours.bytes / theirs.bytes, 4),
        "ratio of activations": round(ours.activation_bytes / theirs.activation_bytes, 4),
    }


def _under_autocast(workload: Workload) -> Casts:
    model = InAutocast(workload.model, torch.bfloat16)
    return counted_casts(lambda: model(**workload.inputs), _tensors(workload.model))


def _transformed(workload: Workload) -> Casts:
    optimized = fxopt.transform(
        workload.model,
        _PASSES,
        example_inputs=dict(workload.inputs),
        verify=False,
        measure_cost=False,
    )
    return counted_casts(lambda: optimized(**workload.inputs), _tensors(optimized))


def _tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _row(casts: Casts) -> dict[str, Any]:
    return {
        "casts": casts.count,
        "megabytes": round(casts.bytes / 1e6, 2),
        "of_weights": round(casts.weight_bytes / 1e6, 2),
        "of_activations": round(casts.activation_bytes / 1e6, 2),
    }
