"""Structured pruning: what half of BERT-base costs, who can cut what, what is left of a task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

import fxopt
from benchmarks.conftest import Effort, Record
from benchmarks.finetune_recipe import Recipe, pretrained_folder
from benchmarks.models import bert_base, smollm2
from benchmarks.prunable import make_constant, parameters
from benchmarks.pruning_coverage import MODELS, by_toolkit, coverage
from benchmarks.pruning_docstrings import compare_students
from benchmarks.pruning_perplexity import IMPORTANCES, RATIOS, perplexities
from benchmarks.sidebyside import in_turns, spread, timing
from benchmarks.systems import (
    FXOPT_DYNAMIC,
    FXOPT_FP32,
    FXOPT_STATIC,
    LISTS,
    Call,
    Inputs,
    System,
    Workload,
    transformed,
)
from benchmarks.systems.torch_pruning_peers import INSTALLED
from fxopt.capture import capture
from fxopt.claim import sqnr
from fxopt.timing import latency, peak_memory, ratio

_HALF = "prune-channels{ratio=0.5, importance=l2, scope=ffn|heads}"
_STUDENTS = (
    "fxopt obs, refitted, fisher",
    "Torch-Pruning magnitude",
    "Torch-Pruning taylor",
)
_DENSE: Mapping[str, System] = {
    "fp32": FXOPT_FP32,
    "int8 dynamic": FXOPT_DYNAMIC,
    "int8 static": FXOPT_STATIC,
}
# Against the same half, neither lowered nor quantized.
_FLOOR_DB = {"fp32": 80.0, "int8 dynamic": 15.0, "int8 static": 15.0}


@pytest.mark.parametrize("kind", _DENSE)
def test_half_of_bert_base(
    kind: str,
    quick: bool,
    effort: Effort,
    benchmark: Any,
    record: Record,
) -> None:
    """Half of the feed-forward units and of the heads against all of them, both lowered alike."""
    workload = bert_base(8, 128, quick=quick)
    torch._dynamo.reset()
    with torch.no_grad():
        calls = {"dense": _DENSE[kind].prepare(workload), "half": _half_lowered(kind, workload)}
        half = transformed(f"canonicalize, {_HALF}")(workload)
        db = sqnr(half(workload.inputs).clone(), calls["half"](workload.inputs))
        if not db >= _FLOOR_DB[kind]:
            pytest.fail(f"the lowered half is {db:.1f} dB from the half, below {_FLOOR_DB[kind]:g}")
        runs = {name: partial(call, workload.inputs) for name, call in calls.items()}
        times = benchmark.pedantic(in_turns, args=(runs,), kwargs=effort, rounds=1)
        memory = {name: peak_memory(run, "cpu") for name, run in runs.items()}
    counts = {"dense": parameters(workload.model), "half": parameters(half.optimized)}  # type: ignore[attr-defined]
    figures = {
        "model": "BertModel(BertConfig())",
        "batch": [8, 128],
        "half": str(LISTS[kind]).replace("canonicalize,", f"canonicalize, {_HALF},", 1),
        "systems": {
            name: {
                **timing(times[name]),
                "parameters": counts[name],
                "peak_bytes": None if (found := memory[name]) is None else found.bytes,
            }
            for name in calls
        },
        "ratios": {
            "time, half / dense": spread(ratio(times["half"], times["dense"])),
            "parameters, half / dense": round(counts["half"] / counts["dense"], 3),
        },
        "sqnr_db of the lowered half against the half": round(min(db, 200.0), 1),
    }
    benchmark.extra_info.update(figures)
    record(f"pruned_bert_base_{kind.replace(' ', '_')}", figures)


def test_folding_grows_with_layers(quick: bool, benchmark: Any, record: Record) -> None:
    """FoldPruned, planned and applied, on BERT-base with half of its FFN units constant."""
    counts = (1, 4) if quick else (12, 48)
    calls = {f"{count} layers": _folding(count) for count in counts}
    small, large = calls
    times = benchmark.pedantic(
        latency, args=(calls,), kwargs={"repeats": 5, "seconds": 8.0}, rounds=1
    )
    figures = {
        "seconds": {name: round(time.median / 1e3, 3) for name, time in times.items()},
        f"{large} / {small}": spread(ratio(times[large], times[small])),
        "layers, ratio": counts[1] / counts[0],
    }
    benchmark.extra_info.update(figures)
    record("fold_pruned_of_48_layers", figures)


def test_who_cuts_what(quick: bool, record: Record) -> None:
    """Every architecture, feed-forward units, heads, residual and convolutional channels."""
    _needs_torch_pruning()
    names = ("bert", "gpt2", "mobilenet-v2") if quick else tuple(MODELS)
    record("pruning_coverage", {"half of the channels": by_toolkit(coverage(names))})


def test_docstring_classifier(quick: bool, tmp_path: Path, benchmark: Any, record: Record) -> None:
    """A trained classifier halved, then one epoch of distillation; Torch-Pruning's half as well."""
    _needs_torch_pruning()
    try:
        recipe = Recipe(pretrained_folder())
    except ValueError as error:
        pytest.skip(str(error))
    if quick:
        recipe = replace(recipe, epochs=1, classes=4, per_class=8, length=16, batch=8, layers=1)
    options = {"seeds": (0,) if quick else (0, 1, 2)}
    figures = benchmark.pedantic(
        compare_students, args=(recipe, _STUDENTS, tmp_path), kwargs=options, rounds=1
    )
    benchmark.extra_info.update(figures)
    record("pruned_docstring_classifier", figures)


def test_smollm2_perplexity(quick: bool, benchmark: Any, record: Record) -> None:
    """Narrower feed-forward nets by each importance, as cut and with the readers refitted."""
    language = smollm2(64 if quick else 512, quick=quick)
    args = (language, (0.5,) if quick else RATIOS, ("l2", "taylor") if quick else IMPORTANCES)
    figures = benchmark.pedantic(perplexities, args=args, rounds=1)
    figures = {"model": "SmolLM2-135M-Instruct", **figures}
    benchmark.extra_info.update(figures)
    record("pruned_smollm2_perplexity", figures)


def _half_lowered(kind: str, workload: Workload) -> Call:
    passes = LISTS[kind]
    assert isinstance(passes, str)
    start = "canonicalize,"
    assert passes.startswith(start), "pruning comes right after canonicalize"
    return transformed(f"{start} {_HALF},{passes.removeprefix(start)}")(workload)


def _folding(layers: int) -> Callable[[], object]:
    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False).eval()
    inputs: Inputs = {"input_ids": torch.arange(16).view(2, 8)}
    constant = copy.deepcopy(model)
    make_constant(constant, "ffn", inputs)
    program = capture(constant, dict(inputs))
    pass_ = fxopt.FoldPruned()

    def fold() -> Any:
        return pass_.apply(program, pass_.plan(program)).materialized()

    return fold


def _needs_torch_pruning() -> None:
    if not INSTALLED:
        pytest.skip("needs torch-pruning: see requirements.txt")
