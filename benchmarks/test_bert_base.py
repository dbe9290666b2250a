"""BERT-base, batch 8 x 128 tokens: fxopt beside its peers, in one process, in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from benchmarks.breakdown import breakdown
from benchmarks.conftest import Effort, Record
from benchmarks.models import bert_base
from benchmarks.products import int8_products
from benchmarks.sidebyside import Comparison, against_all, compare
from benchmarks.systems import (
    AUTOCAST_BF16,
    AUTOCAST_BF16_COMPILE,
    COMPILE_BF16,
    COMPILE_FP32,
    FXOPT_AUTOCAST,
    FXOPT_DYNAMIC,
    FXOPT_FP32,
    FXOPT_HALF,
    FXOPT_HALF_LINEAR,
    FXOPT_STATIC,
    ONNXRUNTIME_FP32,
    ONNXRUNTIME_INT8,
    OPENVINO_BF16,
    OPENVINO_FP32,
    OPENVINO_INT8,
    TORCHAO_INT8,
    TORCHAO_INT8_BF16,
    TORCHAO_INT8_FROZEN,
    System,
    Workload,
)

_BATCH, _LENGTH = 8, 128
_PRODUCTS = "its int8 matrix products alone"


@pytest.fixture(scope="module")
def bert(quick: bool) -> Workload:
    return bert_base(_BATCH, _LENGTH, quick=quick)


def test_fp32(bert, effort: Effort, benchmark, record: Record) -> None:  # type: ignore[no-untyped-def]
    peers = (OPENVINO_FP32, ONNXRUNTIME_FP32, COMPILE_FP32)
    compared = _timed(benchmark, bert, (FXOPT_FP32, *peers), floor_db=80.0, **effort)
    _record(benchmark, record, "bert_base_fp32", _figures(compared, (FXOPT_FP32,), peers))


def test_bf16(bert, effort: Effort, benchmark, record: Record) -> None:  # type: ignore[no-untyped-def]
    """Beside whole models in bfloat16 and torch.autocast, whose error is the measure of ours."""
    ours = (FXOPT_AUTOCAST, FXOPT_HALF, FXOPT_HALF_LINEAR)
    peers = (OPENVINO_BF16, COMPILE_BF16, AUTOCAST_BF16_COMPILE, AUTOCAST_BF16)
    compared = _timed(benchmark, bert, (*ours, *peers), floor_db=30.0, **effort)
    figures = _figures(compared, ours, peers)
    errors = {name: row["relative_error"] for name, row in figures["systems"].items()}
    figures["relative error over torch.autocast's"] = {
        system.name: round(errors[system.name] / errors[AUTOCAST_BF16.name], 3) for system in ours
    }
    _record(benchmark, record, "bert_base_bf16", figures)


def test_int8_dynamic(bert, effort: Effort, benchmark, record: Record) -> None:  # type: ignore[no-untyped-def]
    peers = (TORCHAO_INT8, TORCHAO_INT8_FROZEN, TORCHAO_INT8_BF16, ONNXRUNTIME_INT8)
    compared = _timed(benchmark, bert, (FXOPT_DYNAMIC, *peers), floor_db=20.0, **effort)
    _record(
        benchmark, record, "bert_base_int8_dynamic", _figures(compared, (FXOPT_DYNAMIC,), peers)
    )


def test_int8_static(bert, effort: Effort, quick: bool, benchmark, record: Record) -> None:  # type: ignore[no-untyped-def]
    """Beside the fastest peer and beside a floor: the same products with nothing between them."""
    peers = (OPENVINO_INT8, OPENVINO_BF16, COMPILE_BF16)
    products = {_PRODUCTS: int8_products(bert.model, _BATCH * _LENGTH)}
    compared = _timed(
        benchmark, bert, (FXOPT_STATIC, *peers), floor_db=20.0, alongside=products, **effort
    )
    figures = _figures(compared, (FXOPT_STATIC,), peers)
    figures["ratios"] |= compared.ratios({FXOPT_STATIC.name: [_PRODUCTS]})
    figures["where the time goes"] = breakdown(FXOPT_STATIC, bert, calls=3 if quick else 20)
    _record(benchmark, record, "bert_base_int8_static", figures)


def _timed(benchmark: Any, *args: Any, **options: Any) -> Comparison:
    compared: Comparison = benchmark.pedantic(compare, args=args, kwargs=options, rounds=1)
    return compared


def _figures(
    compared: Comparison, ours: Sequence[System], peers: Sequence[System]
) -> dict[str, Any]:
    return {
        "model": "BertModel(BertConfig())",
        "batch": [_BATCH, _LENGTH],
        "systems": compared.systems(),
        "ratios": compared.ratios(against_all(ours, peers)),
    }


def _record(benchmark: Any, record: Record, name: str, figures: Mapping[str, Any]) -> None:
    benchmark.extra_info.update(figures)
    record(name, figures)
