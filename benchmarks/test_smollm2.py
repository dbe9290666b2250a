"""SmolLM2-135M reads a prompt of 512 tokens: perplexity on real text, and prefill latency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from benchmarks.conftest import Effort, Record
from benchmarks.fidelity import perplexity
from benchmarks.models import Language, smollm2
from benchmarks.sidebyside import Comparison, against_all, compare
from benchmarks.systems import (
    COMPILE_BF16,
    EAGER,
    EAGER_BF16,
    FXOPT_DYNAMIC,
    FXOPT_LANGUAGE,
    OPENVINO_BF16,
    OPENVINO_INT8,
    TORCHAO_INT8,
    TORCHAO_INT8_BF16,
    TORCHAO_INT8_KEPT_HEAD,
    TORCHAO_WEIGHT_ONLY,
    System,
)
from benchmarks.systems.llamacpp_peer import LLAMACPP_F16, LLAMACPP_Q4_1, LLAMACPP_Q8_0

_LENGTH = 512
# On 4 thousand tokens the ratio of two perplexities of int8 is known to 0.2 %, on 16 to 0.1 %.
_JUDGED = 32
_OURS = (FXOPT_LANGUAGE, FXOPT_DYNAMIC)
_PEERS = (
    EAGER_BF16,
    COMPILE_BF16,
    TORCHAO_INT8,
    TORCHAO_INT8_BF16,
    TORCHAO_INT8_KEPT_HEAD,
    TORCHAO_WEIGHT_ONLY,
    OPENVINO_BF16,
    OPENVINO_INT8,
)
_LLAMACPP = (LLAMACPP_F16, LLAMACPP_Q8_0, LLAMACPP_Q4_1)
# Low: perplexity is the figure that counts, and this only stops a broken system.
_FLOOR_DB = 6.0


@pytest.fixture(scope="module")
def language(quick: bool) -> Language:
    return smollm2(64 if quick else _LENGTH, quick=quick, judged=_JUDGED)


def test_prefill_last_position(language, effort: Effort, benchmark, record: Record) -> None:  # type: ignore[no-untyped-def]
    """What a server waits for: the logits of the next token."""
    compared = _timed(language, 1, effort, benchmark)
    figures = _figures(compared, language)
    benchmark.extra_info.update(figures)
    record("smollm2_prefill_last_position", figures)


def test_prefill_all_positions(language, effort: Effort, benchmark, record: Record) -> None:  # type: ignore[no-untyped-def]
    """The logits of every position, from which the perplexity is computed."""
    compared = _timed(language, 0, effort, benchmark)
    figures = _figures(compared, language)
    figures["windows"] = len(language.evaluation)
    with torch.no_grad():
        original = perplexity(EAGER.prepare(language.workload(0)), language.evaluation)
        figures["perplexity of eager fp32"] = round(original, 4)
        for name, call in compared.calls.items():
            found = perplexity(call, language.evaluation)
            figures["systems"][name] |= {
                "perplexity": round(found, 4),
                "over_fp32": round(found / original, 5),
            }
    benchmark.extra_info.update(figures)
    record("smollm2_prefill_all_positions", figures)


def test_prefill_beside_llamacpp(  # type: ignore[no-untyped-def]
    language, effort: Effort, quick: bool, benchmark, record: Record
) -> None:
    """The logits of the next token; apart from the others, since llama.cpp compiles for minutes."""
    if quick:
        pytest.skip("llama.cpp runs the real SmolLM2 alone: there is no file of the tiny model")
    compared = _timed(language, 1, effort, benchmark, _LLAMACPP)
    figures = _figures(compared, language, _LLAMACPP)
    benchmark.extra_info.update(figures)
    record("smollm2_prefill_beside_llamacpp", figures)


def _timed(
    language: Language,
    positions: int,
    effort: Effort,
    benchmark: Any,
    peers: Sequence[System] = _PEERS,
) -> Comparison:
    compared: Comparison = benchmark.pedantic(
        compare,
        args=(language.workload(positions), (*_OURS, *peers)),
        kwargs={"floor_db": _FLOOR_DB, **effort},
        rounds=1,
    )
    return compared


def _figures(
    compared: Comparison, language: Language, peers: Sequence[System] = _PEERS
) -> dict[str, Any]:
    return {
        "model": "SmolLM2-135M-Instruct",
        "batch": list(language.evaluation[0].shape),
        "systems": compared.systems(),
        "ratios": compared.ratios(against_all(_OURS, peers)),
    }
