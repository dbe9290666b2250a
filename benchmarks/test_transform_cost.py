"""What a transform costs: against `torch.export` alone, as the model grows, and in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import BertConfig, BertModel

from benchmarks.conftest import Record
from benchmarks.sidebyside import spread
from fxopt import Canonicalize, FuseLinears, Int8Linear, transform
from fxopt.capture import capture
from fxopt.timing import latency, ratio

_PASSES = (Canonicalize(), FuseLinears(), Int8Linear(mode="dynamic"))
_INPUTS = {"input_ids": torch.arange(16).view(2, 8)}
_ROOT = Path(__file__).parent.parent


def test_against_export_alone(quick: bool, benchmark, record: Record) -> None:  # type: ignore[no-untyped-def]
    model = _bert(1 if quick else 12)
    calls: dict[str, Callable[[], object]] = {
        "torch.export": lambda: _export(model),
        "capture and passes": lambda: _rewrite(model),
        "transform, judged": lambda: transform(model, _PASSES, example_inputs=_INPUTS),
    }
    _measure(benchmark, record, "transform_against_export", calls, "torch.export")


def test_layers_48_against_12(quick: bool, benchmark, record: Record) -> None:  # type: ignore[no-untyped-def]
    small, large = (_bert(1), _bert(4)) if quick else (_bert(12), _bert(48))
    calls: dict[str, Callable[[], object]] = {
        "12 layers": lambda: _rewrite(small),
        "48 layers": lambda: _rewrite(large),
    }
    _measure(benchmark, record, "transform_of_48_layers", calls, "12 layers")


def test_peak_memory(quick: bool, benchmark, record: Record) -> None:  # type: ignore[no-untyped-def]
    if quick:
        pytest.skip("peak memory is measured on the whole model only")
    command = [sys.executable, "-m", "benchmarks.transform_memory"]
    finished = benchmark.pedantic(
        subprocess.run,
        args=(command,),
        kwargs={"cwd": _ROOT, "capture_output": True, "text": True, "check": True},
        rounds=1,
    )
    row = json.loads(finished.stdout.splitlines()[-1])
    figures: dict[str, Any] = {"systems": {"transform": row}}
    if row["peak_bytes"] is not None:
        over = round(row["peak_bytes"] / row["rewritten_bytes"], 3)
        figures["ratios"] = {"peak bytes / rewritten bytes": over}
    benchmark.extra_info.update(figures)
    record("transform_memory", figures)


def _bert(layers: int) -> nn.Module:
    return BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False).eval()


def _export(model: nn.Module) -> object:
    dynamic = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}}
    with torch.no_grad():
        return torch.export.export(model, (), dict(_INPUTS), dynamic_shapes=dynamic, strict=False)


def _rewrite(model: nn.Module) -> dict[str, Tensor]:
    """Capture and three passes, all new parameters computed."""
    program = capture(model, _INPUTS)
    for pass_ in _PASSES:
        program = pass_.apply(program, pass_.plan(program))
    return dict(program.materialized().state)


def _measure(benchmark, record, name, calls, base) -> None:  # type: ignore[no-untyped-def]
    times = benchmark.pedantic(
        latency, args=(calls,), kwargs={"repeats": 5, "seconds": 8.0}, rounds=1
    )
    figures = {
        "systems": {call: {"seconds": round(time.median / 1e3, 3)} for call, time in times.items()},
        "ratios": {
            f"{call} / {base}": spread(ratio(times[call], times[base]))
            for call in times
            if call != base
        },
    }
    benchmark.extra_info.update(figures)
    record(name, figures)
