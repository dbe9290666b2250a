"""A BERT classifier of docstrings, trained, halved, and brought back by one epoch of distillation.

    python -m benchmarks.pruning_docstrings --out runs/pruning

all-MiniLM-L6-v2 is fine-tuned to tell which module a docstring is from (`benchmarks.finetune`'s
recipe); the trained model is kept in the folder and used again. Then half of its feed-forward units
and half of its heads are cut, by fxopt and by Torch-Pruning, and each result learns for the same
steps, from the same batches in the same order, with the same optimizer: from the trained model's
logits and hidden states, and from the labels. Accuracy is on what was held out.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.utils import logging

import fxopt
from benchmarks.finetune_recipe import Recipe, load_data, pretrained_folder
from benchmarks.prunable import parameters
from benchmarks.pruning_lesson import Lesson, trained
from benchmarks.systems.torch_pruning_peers import Importance as PeerImportance
from benchmarks.systems.torch_pruning_peers import pruned
from fxopt.analyses.importance import Importance
from fxopt.errors import FxoptError
from fxopt.train import Hidden, Logits, Task, distill

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Student = Callable[[Lesson], nn.Module]


_CALIBRATION = 32
"""Batches that importance and reconstruction look at."""

# Every student learns by these, whoever pruned it: its residual stream is as wide as the teacher's.
_TERMS = (Task(), Logits(temperature=2.0), Hidden())


def _ours(importance: Importance, *, reconstruct: bool) -> Student:
    def prune(lesson: Lesson) -> nn.Module:
        passes = [
            fxopt.PruneChannels(
                ratio=lesson.ratio,
                importance=importance,
                scope=("ffn", "heads"),
                reconstruct=reconstruct,
            )
        ]
        calibration = lesson.batches()[:_CALIBRATION]
        return fxopt.transform(
            lesson.load(),
            passes,
            mode="train",
            # With labels, so that the training program gives the loss that Task() reads.
            example_inputs=calibration[0],
            calibration=calibration,
            verify=False,
            measure_cost=False,
        )

    return prune


def _theirs(importance: PeerImportance) -> Student:
    def prune(lesson: Lesson) -> nn.Module:
        def backward(model: nn.Module) -> None:
            for batch in lesson.batches()[:_CALIBRATION]:
                model(**batch).loss.backward()

        looks_at_gradients = backward if importance == "taylor" else None
        return pruned(
            lesson.load(),
            lesson.batches()[0],
            ("ffn", "heads"),
            lesson.ratio,
            importance,
            looks_at_gradients,
        )

    return prune


STUDENTS: Mapping[str, Student] = {
    "fxopt l2": _ours("l2", reconstruct=False),
    "fxopt l2, refitted": _ours("l2", reconstruct=True),
    "fxopt taylor, refitted": _ours("taylor", reconstruct=True),
    "fxopt activation, refitted": _ours("activation", reconstruct=True),
    "fxopt obs, refitted": _ours("obs", reconstruct=True),
    "Torch-Pruning magnitude": _theirs("magnitude"),
    "Torch-Pruning taylor": _theirs("taylor"),
}


def compare_students(
    recipe: Recipe,
    names: Iterable[str],
    out: Path,
    *,
    ratio: float = 0.5,
    epochs: int = 1,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train or load the teacher, then prune and distill each student of `STUDENTS` that is named.

    Returns accuracies before and after, parameters and seconds; also in `results.json` in `out`.
    Raises `ValueError` for an unknown name.
    """
    names = tuple(names)
    unknown = [name for name in names if name not in STUDENTS]
    if unknown or not names:
        raise ValueError(f"students {unknown} are not known: choose among {', '.join(STUDENTS)}")
    data = load_data(recipe)
    folder = trained(recipe, data, out, seed, progress)
    lesson = Lesson(
        *(folder, data, recipe.device, recipe.batch, ratio, epochs, recipe.learning_rate, seed)
    )
    teacher = lesson.load()
    dense = lesson.accuracy(teacher)
    progress(f"dense: {100 * dense:.1f} %")
    rows = {name: _row(lesson, STUDENTS[name], name, progress) for name in names}
    settings = {**dataclasses.asdict(recipe), "model": "/".join(recipe.model.parts[-2:])}
    figures = {
        "recipe": settings,
        "ratio": ratio,
        "distillation": {
            "epochs": epochs,
            "seed": seed,
            "learning_rate": lesson.learning_rate,
            "terms": [repr(t) for t in _TERMS],
        },
        "examples": {"train": len(data.train), "test": len(data.test)},
        "dense": {"accuracy": round(dense, 4), "parameters": parameters(teacher)},
        "students": rows,
    }
    (out / "results.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def table(figures: Mapping[str, Any]) -> Table:
    """The figures to read, accuracy in percent."""
    dense = figures["dense"]
    shown = Table(
        title=f"accuracy in %, dense {100 * dense['accuracy']:.1f}",
        caption="after: distilling; lost: points below dense then; size: parameters over dense's\n"
        "s: seconds to prune, then to distill",
    )
    columns = ("pruned", "after", "lost", "size", "s", "then s")
    shown.add_column("student", no_wrap=True)
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for name, row in figures["students"].items():
        shown.add_row(
            name,
            f"{100 * row['pruned']:.1f}",
            f"{100 * row['distilled']:.1f}",
            f"{100 * (dense['accuracy'] - row['distilled']):+.1f}",
            f"{row['parameters'] / dense['parameters']:.2f}",
            f"{row['seconds_to_prune']:.1f}",
            f"{row['seconds_to_distill']:.1f}",
        )
    return shown


def _row(
    lesson: Lesson, prune: Student, name: str, progress: Callable[[str], None]
) -> dict[str, Any]:
    started = time.perf_counter()
    torch.manual_seed(lesson.seed)
    student = prune(lesson)
    pruning = time.perf_counter() - started
    before = lesson.accuracy(student)
    progress(f"{name}: {100 * before:.1f} % pruned")
    started = time.perf_counter()
    distill(
        student,
        lesson.load(),
        lesson.batches(),
        terms=_TERMS,
        epochs=lesson.epochs,
        learning_rate=lesson.learning_rate,
        seed=lesson.seed,
    )
    distilling = time.perf_counter() - started
    after = lesson.accuracy(student)
    progress(f"{name}: {100 * after:.1f} % distilled")
    return {
        "pruned": round(before, 4),
        "distilled": round(after, 4),
        "parameters": parameters(student),
        "seconds_to_prune": round(pruning, 1),
        "seconds_to_distill": round(distilling, 1),
    }


@app.command()
def main(
    students: Annotated[str, typer.Option(help="Names, separated by semicolons.")] = "; ".join(
        STUDENTS
    ),
    ratio: Annotated[float, typer.Option(min=0.0, max=1.0, help="What is cut.")] = 0.5,
    epochs: Annotated[int, typer.Option(min=1, help="Of distillation.")] = 1,
    teacher_epochs: Annotated[int, typer.Option(min=1)] = Recipe.epochs,
    classes: Annotated[int, typer.Option(min=2, help="Modules to choose from.")] = Recipe.classes,
    per_class: Annotated[int, typer.Option(min=2)] = Recipe.per_class,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a text.")] = Recipe.length,
    layers: Annotated[int | None, typer.Option(min=1, help="Keep only the first ones.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    model: Annotated[Path | None, typer.Option(help="A local transformers folder.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the trained model and results.")] = Path(
        "runs/pruning"
    ),
) -> None:
    """Halve a trained classifier of docstrings and bring it back, fxopt beside Torch-Pruning."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(stderr=True)
    try:
        recipe = Recipe(
            model or pretrained_folder(),
            epochs=teacher_epochs,
            classes=classes,
            per_class=per_class,
            length=length,
            layers=layers,
        )
        out.mkdir(parents=True, exist_ok=True)
        chosen = [name.strip() for name in students.split(";")]
        figures = compare_students(
            recipe, chosen, out, ratio=ratio, epochs=epochs, seed=seed, progress=console.print
        )
    except (ValueError, FxoptError) as error:
        raise typer.BadParameter(str(error)) from error
    Console().print(table(figures))


if __name__ == "__main__":
    app()
