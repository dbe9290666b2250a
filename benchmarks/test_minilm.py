"""all-MiniLM-L6-v2 on real text: how fast and how true each system is, in one table."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.conftest import Effort, Record
from benchmarks.fidelity import agreement, embed, on_the_front
from benchmarks.models import Sentences, minilm
from benchmarks.sidebyside import Comparison, against_all, compare
from benchmarks.systems import (
    COMPILE_BF16,
    EAGER,
    FXOPT_CAREFUL,
    FXOPT_DYNAMIC,
    FXOPT_FP32,
    FXOPT_MIXED,
    ONNXRUNTIME_INT8,
    OPENVINO_BF16,
    OPENVINO_FP32,
    OPENVINO_INT8,
    TORCHAO_INT8,
    TORCHAO_INT8_BF16,
    TORCHAO_WEIGHT_ONLY,
)

_OURS = (FXOPT_MIXED, FXOPT_DYNAMIC, FXOPT_CAREFUL)
_PEERS = (
    EAGER,
    FXOPT_FP32,
    OPENVINO_FP32,
    OPENVINO_BF16,
    OPENVINO_INT8,
    COMPILE_BF16,
    TORCHAO_INT8,
    TORCHAO_INT8_BF16,
    TORCHAO_WEIGHT_ONLY,
    ONNXRUNTIME_INT8,
)
# Low: padding is compared too. Fidelity has its own figures; this only stops a broken system.
_FLOOR_DB = 6.0


def test_sentence_embeddings(effort: Effort, quick: bool, benchmark, record: Record) -> None:  # type: ignore[no-untyped-def]
    sentences = minilm(quick=quick)
    compared: Comparison = benchmark.pedantic(
        compare,
        args=(sentences.workload, (*_OURS, *_PEERS)),
        kwargs={"floor_db": _FLOOR_DB, **effort},
        rounds=1,
    )
    figures = {
        "model": "all-MiniLM-L6-v2",
        "batch": list(sentences.workload.inputs["input_ids"].shape),
        "texts": sum(len(batch["input_ids"]) for batch in sentences.evaluation),
        "systems": _table(compared, sentences),
        "ratios": compared.ratios(against_all(_OURS, _PEERS)),
    }
    benchmark.extra_info.update(figures)
    record("minilm_8x128", figures)


def _table(compared: Comparison, sentences: Sentences) -> dict[str, dict[str, Any]]:
    """Latency and fidelity by system; `front` where none is both faster and truer on the mean."""
    rows = compared.systems()
    with torch.no_grad():
        reference = embed(compared.calls[EAGER.name], sentences.evaluation)
        for name, call in compared.calls.items():
            rows[name] |= agreement(reference, embed(call, sentences.evaluation))
    front = on_the_front({name: (r["median_ms"], r["cosine_mean"]) for name, r in rows.items()})
    for name, row in rows.items():
        row["front"] = front[name]
    return rows
