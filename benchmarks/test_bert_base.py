"""BERT-base, batch 8 x 128 tokens: fxopt beside its peers, in one process, in turns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from benchmarks.conftest import Record
from benchmarks.sidebyside import compare
from benchmarks.systems import (
    COMPILE_FP32,
    FXOPT_FP32,
    FXOPT_INT8,
    ONNXRUNTIME_FP32,
    OPENVINO_FP32,
    TORCHAO_INT8,
    TORCHAO_INT8_FROZEN,
)

_BATCH, _LENGTH = 8, 128


@pytest.fixture(scope="module")
def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = BertModel(BertConfig(), add_pooling_layer=False).eval()
    inputs = {
        "input_ids": torch.randint(1000, 20000, (_BATCH, _LENGTH)),
        "attention_mask": torch.ones(_BATCH, _LENGTH, dtype=torch.int64),
    }
    return model, inputs


def test_fp32(bert, benchmark, record: Record) -> None:  # type: ignore[no-untyped-def]
    peers = (OPENVINO_FP32, ONNXRUNTIME_FP32, COMPILE_FP32)
    against = {FXOPT_FP32.name: [peer.name for peer in peers]}
    _run(bert, benchmark, record, "bert_base_fp32", (FXOPT_FP32, *peers), against, 80.0)


def test_int8_dynamic(bert, benchmark, record: Record) -> None:  # type: ignore[no-untyped-def]
    peers = (TORCHAO_INT8, TORCHAO_INT8_FROZEN)
    against = {FXOPT_INT8.name: [peer.name for peer in peers]}
    _run(bert, benchmark, record, "bert_base_int8_dynamic", (FXOPT_INT8, *peers), against, 25.0)


def _run(bert, benchmark, record, name, systems, against, floor_db) -> None:  # type: ignore[no-untyped-def]
    model, inputs = bert
    figures = benchmark.pedantic(
        compare,
        args=(model, inputs, systems, against),
        kwargs={"floor_db": floor_db},
        rounds=1,
    )
    benchmark.extra_info.update(figures)
    record(name, {"model": "BertModel(BertConfig())", "batch": [_BATCH, _LENGTH], **figures})
