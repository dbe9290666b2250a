"""One text of 16 tokens: where the work is small, overhead counts, and weights are read once."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.conftest import Effort, Record
from benchmarks.models import bert_base, minilm_one_short_text
from benchmarks.sidebyside import Comparison, compare
from benchmarks.systems import (
    COMPILE_BF16,
    COMPILE_FP32,
    EAGER,
    EAGER_BF16,
    FXOPT_DYNAMIC,
    FXOPT_FP32,
    FXOPT_MIXED,
    FXOPT_STATIC,
    FXOPT_WEIGHT_ONLY,
    ONNXRUNTIME_FP32,
    ONNXRUNTIME_INT8,
    OPENVINO_BF16,
    OPENVINO_FP32,
    OPENVINO_INT8,
    TORCHAO_INT8,
    TORCHAO_INT8_BF16,
    TORCHAO_WEIGHT_ONLY,
    Workload,
)

_LENGTH = 16
_OURS = (FXOPT_STATIC, FXOPT_MIXED, FXOPT_DYNAMIC, FXOPT_WEIGHT_ONLY, FXOPT_FP32)
_PEERS = (
    EAGER,
    EAGER_BF16,
    OPENVINO_FP32,
    OPENVINO_BF16,
    OPENVINO_INT8,
    COMPILE_FP32,
    COMPILE_BF16,
    TORCHAO_INT8,
    TORCHAO_INT8_BF16,
    TORCHAO_WEIGHT_ONLY,
    ONNXRUNTIME_FP32,
    ONNXRUNTIME_INT8,
)


@pytest.fixture(scope="module")
def many_rounds(quick: bool) -> Effort:
    return {"repeats": 3, "seconds": 0.2} if quick else {"repeats": 60, "seconds": 10.0}


def test_bert_base(many_rounds: Effort, quick: bool, benchmark, record: Record) -> None:  # type: ignore[no-untyped-def]
    workload = bert_base(1, _LENGTH, quick=quick)
    _run(workload, "BertModel(BertConfig())", "bert_base_1x16", many_rounds, benchmark, record)


def test_minilm(many_rounds: Effort, quick: bool, benchmark, record: Record) -> None:  # type: ignore[no-untyped-def]
    workload = minilm_one_short_text(_LENGTH, quick=quick)
    _run(workload, "all-MiniLM-L6-v2", "minilm_1x16", many_rounds, benchmark, record)


def _run(
    workload: Workload, model: str, name: str, effort: Effort, benchmark: Any, record: Record
) -> None:
    compared: Comparison = benchmark.pedantic(
        compare, args=(workload, (*_OURS, *_PEERS)), kwargs={"floor_db": 6.0, **effort}, rounds=1
    )
    peer = compared.fastest(system.name for system in _PEERS)
    figures = {
        "model": model,
        "batch": [1, _LENGTH],
        "systems": compared.systems(),
        "fastest peer": peer,
        "ratios": compared.ratios({system.name: [peer] for system in _OURS}),
    }
    benchmark.extra_info.update(figures)
    record(name, figures)
