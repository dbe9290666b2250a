"""all-MiniLM-L6-v2 on real sentences: what bf16, int8 and pruning cost and are worth, as a page.

    python -m benchmarks.compare_minilm --out runs/minilm

The original runs as PyTorch runs it, all others are lowered. They are timed in turns on 8 texts of
128 tokens and judged by the mean cosine of their sentence embeddings with the original's, over 640
paragraphs of the standard library's docstrings. What calibrates is other text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

import fxopt
from benchmarks.fidelity import agreement, embed
from benchmarks.models import Sentences, minilm
from benchmarks.systems import LISTS, Inputs, first
from fxopt.comparison import Comparison, compare
from fxopt.errors import FxoptError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_HALF = "prune-channels{ratio=0.5, importance=obs, scope=ffn|heads, reconstruct=true}"
_BF16, _INT8 = str(LISTS["autocast bf16"]), str(LISTS["int8 mixed"])
_FP32 = str(LISTS["fp32"])

PASSES: dict[str, str] = {
    "bf16": _BF16,
    "int8": _INT8,
    "pruned": _FP32.replace("canonicalize,", f"canonicalize, {_HALF},", 1),
    "pruned + int8": _INT8.replace("canonicalize,", f"canonicalize, {_HALF},", 1),
}
"""The passes of each model beside the original."""


def compared(
    *,
    quick: bool,
    repeats: int,
    seconds: float,
    progress: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """The comparison; `quick` keeps two layers and 16 texts, and lowers nothing."""
    sentences = minilm(quick=quick)
    models = {"original": sentences.workload.model}
    for name, passes in PASSES.items():
        progress(f"{name}: {passes}")
        models[name] = _transformed(sentences, passes.replace(", lower", "") if quick else passes)
    progress(f"measuring {len(models)} models")
    return compare(
        models,
        sentences.evaluation,
        inputs=dict(sentences.workload.inputs),
        metric={"mean cosine of embeddings": embedding_cosine(sentences)},
        repeats=repeats,
        seconds=seconds,
    )


def embedding_cosine(sentences: Sentences) -> Callable[[Any, Iterable[Inputs]], float]:
    """A metric: the mean cosine of a model's sentence embeddings with the original's."""
    with torch.no_grad():
        reference = embed(_caller(sentences.workload.model), sentences.evaluation)

    def cosine(model: Any, batches: Iterable[Inputs]) -> float:
        return agreement(reference, embed(_caller(model), list(batches)))["cosine_mean"]

    return cosine


def _caller(model: Any) -> Callable[[Inputs], torch.Tensor]:
    return lambda batch: first(model(**batch))


def _transformed(sentences: Sentences, passes: str) -> nn.Module:
    workload = sentences.workload
    return fxopt.transform(
        workload.model,
        passes,
        example_inputs=dict(workload.inputs),
        calibration=[dict(batch) for batch in workload.calibration],
        verify=False,
        measure_cost=False,
    )


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for comparison.html and .json.")] = Path(
        "runs/minilm"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Rounds.")] = 40,
    seconds: Annotated[float, typer.Option(min=0.01, help="At most, for each model.")] = 20.0,
    quick: Annotated[bool, typer.Option(help="Two layers, not lowered: does it run?")] = False,
) -> None:
    """Compare MiniLM as it is with bf16, int8, pruned and pruned int8: table, page, JSON."""
    console = Console(stderr=True)
    try:
        found = compared(quick=quick, repeats=repeats, seconds=seconds, progress=console.print)
        out.mkdir(parents=True, exist_ok=True)
        for name in ("comparison.html", "comparison.json"):
            found.save(out / name)
            console.print(f"wrote {out / name}")
    except FxoptError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(str(found))


if __name__ == "__main__":
    app()
