"""Fine-tuning MiniLM on docstrings in full, mixed and half precision: accuracy, time and memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.conftest import Record
from benchmarks.finetune import compare_precisions
from benchmarks.finetune_recipe import MODES, Recipe, pretrained_folder

_OURS = ("full", "mixed", "half")


def test_precisions(quick: bool, tmp_path: Path, benchmark, record: Record) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("sklearn", reason="needs scikit-learn: see requirements.txt")
    pytest.importorskip("tensorboard", reason="needs tensorboard: see requirements.txt")
    try:
        recipe = Recipe(pretrained_folder())
    except ValueError as error:
        pytest.skip(str(error))
    if quick:
        recipe = replace(recipe, epochs=1, classes=4, per_class=8, length=16, batch=8, layers=1)
    figures = benchmark.pedantic(
        compare_precisions,
        args=(recipe, MODES if quick else _OURS),
        kwargs={"seeds": 1 if quick else 3, "out": tmp_path},
        rounds=1,
    )
    benchmark.extra_info.update(figures)
    record("finetune", figures)
