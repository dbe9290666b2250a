"""A BERT classifier of docstrings, trained, halved, and brought back by one epoch of distillation.

    python -m benchmarks.pruning_docstrings --out runs/pruning

all-MiniLM-L6-v2 is fine-tuned to tell which module a docstring is from (`benchmarks.finetune`'s
recipe); the trained model is kept in the folder and used again. Then half of its feed-forward units
and half of its heads are cut, by fxopt and by Torch-Pruning, and each result learns for the same
steps, from the same batches in the same order, with the same optimizer: from the trained model's
logits and hidden states, and from the labels. All training texts are looked at once to prune, once
to distill. Accuracy is on what was held out, for each seed.

Each student has the learning rate that suits it: of `RATES`, that of the least loss on fifths of
the training set, where the student and the model that it is cut from learned from the rest alone.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.utils import logging

import fxopt
from benchmarks.finetune_recipe import Data, Recipe, load_data, pretrained_folder
from benchmarks.prunable import parameters
from benchmarks.pruning_task import PruningTask, for_tuning, trained
from benchmarks.systems.torch_pruning_peers import Importance as PeerImportance
from benchmarks.systems.torch_pruning_peers import pruned
from fxopt.analyses.importance import Importance
from fxopt.errors import FxoptError
from fxopt.observation.gram import Weighting
from fxopt.train import Hidden, Logits, Task, distill

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Student = Callable[[PruningTask], nn.Module]
Progress = Callable[[str], None]

RATES = (1e-4, 3e-4, 6e-4, 1e-3)
"""Learning rates to choose among."""

FOLDS = (0, 1)
"""Fifths of the training set that they are judged on."""

# Every student learns by these, whoever pruned it: its residual stream is as wide as the teacher's.
# Squares of hidden states are small beside the other two; their weight was chosen on such fifths.
_TERMS = (Task(), Logits(temperature=2.0), Hidden(weight=30.0))


def _ours(
    importance: Importance, *, reconstruct: bool = True, weighting: Weighting = "uniform"
) -> Student:
    def prune(task: PruningTask) -> nn.Module:
        passes = [
            fxopt.PruneChannels(
                ratio=task.ratio,
                importance=importance,
                scope=("ffn", "heads"),
                reconstruct=reconstruct,
                weighting=weighting,
            )
        ]
        calibration = task.batches()
        return fxopt.transform(
            task.load(),
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
    def prune(task: PruningTask) -> nn.Module:
        def backward(model: nn.Module) -> None:
            for batch in task.batches():
                model(**batch).loss.backward()

        looks_at_gradients = backward if importance == "taylor" else None
        return pruned(
            task.load(),
            task.batches()[0],
            ("ffn", "heads"),
            task.ratio,
            importance,
            looks_at_gradients,
        )

    return prune


STUDENTS: Mapping[str, Student] = {
    "fxopt l2": _ours("l2", reconstruct=False),
    "fxopt l2, refitted": _ours("l2"),
    "fxopt taylor, refitted": _ours("taylor"),
    "fxopt activation, refitted": _ours("activation"),
    "fxopt obs, refitted": _ours("obs"),
    "fxopt obs, refitted, fisher": _ours("obs", weighting="fisher"),
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
    seeds: Sequence[int] = (0,),
    rates: Sequence[float] = RATES,
    progress: Progress = lambda line: None,
) -> dict[str, Any]:
    """Prune and distill each student of `STUDENTS` that is named, from a teacher for each seed.

    Teachers that `out` holds are used again. Returns accuracies before and after, a list over the
    seeds, parameters and seconds; also in `results.json` in `out`. Raises `ValueError` for an
    unknown name.
    """
    names = tuple(names)
    unknown = [name for name in names if name not in STUDENTS]
    if unknown or not names:
        raise ValueError(f"students {unknown} are not known: choose among {', '.join(STUDENTS)}")
    data = load_data(recipe)

    def task(recipe: Recipe, data: Data, folder: Path, seed: int) -> PruningTask:
        teacher = trained(recipe, data, folder, seed, progress)
        return PruningTask(teacher, data, recipe.device, recipe.batch, ratio, epochs, seed)

    chosen = dict.fromkeys(names, rates[0])
    if len(rates) > 1:
        tuning = [
            task(*for_tuning(recipe, data, fold), out / f"tuning-{fold}", seeds[0])
            for fold in FOLDS
        ]
        chosen = {name: _best_rate(tuning, name, rates, progress) for name in names}
    dense: list[float] = []
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in seeds:
        taught = task(recipe, data, out, seed)
        teacher = taught.load()
        dense.append(round(taught.accuracy(teacher), 4))
        progress(f"seed {seed}, dense: {100 * dense[-1]:.1f} %")
        for name in names:
            runs[name].append(_run(taught, name, chosen[name], progress))
    settings = {**dataclasses.asdict(recipe), "model": "/".join(recipe.model.parts[-2:])}
    figures = {
        "recipe": settings,
        "ratio": ratio,
        "seeds": list(seeds),
        "distillation": {
            "epochs": epochs,
            "learning rates": list(rates),
            "terms": [repr(t) for t in _TERMS],
        },
        "examples": {"train": len(data.train), "test": len(data.test)},
        "dense": {"accuracy": dense, "parameters": parameters(teacher)},
        "students": {name: _row(chosen[name], runs[name], dense) for name in names},
    }
    (out / "results.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def table(figures: Mapping[str, Any]) -> Table:
    """The figures to read, accuracy in percent."""
    dense = figures["dense"]
    shown = Table(
        title=f"accuracy in %, dense {100 * mean(dense['accuracy']):.1f}, mean of "
        f"{len(figures['seeds'])} seeds",
        caption="after: distilling; lost: points below dense then, and at worst; size: parameters\n"
        "over dense's; s: seconds to prune, then to distill",
    )
    columns = ("pruned", "after", "lost", "at worst", "size", "rate", "s", "then s")
    shown.add_column("student", no_wrap=True)
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for name, row in figures["students"].items():
        shown.add_row(
            name,
            f"{100 * mean(row['pruned']):.1f}",
            f"{100 * mean(row['distilled']):.1f}",
            f"{row['points_lost']['mean']:+.1f}",
            f"{row['points_lost']['worst']:+.1f}",
            f"{row['parameters'] / dense['parameters']:.2f}",
            f"{row['learning_rate']:g}",
            f"{row['seconds_to_prune']:.1f}",
            f"{row['seconds_to_distill']:.1f}",
        )
    return shown


def _pruned(task: PruningTask, name: str) -> nn.Module:
    torch.manual_seed(task.seed)
    return STUDENTS[name](task)


def _distill(task: PruningTask, student: nn.Module, rate: float) -> None:
    distill(
        student,
        task.load(),
        task.batches(),
        terms=_TERMS,
        epochs=task.epochs,
        learning_rate=rate,
        seed=task.seed,
    )


def _best_rate(
    tasks: Sequence[PruningTask], name: str, rates: Sequence[float], progress: Progress
) -> float:
    losses: dict[float, list[float]] = {rate: [] for rate in rates}
    for task in tasks:
        pruned = _pruned(task, name)
        for rate in rates:
            student = copy.deepcopy(pruned)
            _distill(task, student, rate)
            losses[rate].append(task.loss(student))
    for rate, found in losses.items():
        progress(f"{name} at {rate:g}: loss {mean(found):.4f} where it is tuned")
    return min(rates, key=lambda rate: mean(losses[rate]))


def _run(task: PruningTask, name: str, rate: float, progress: Progress) -> dict[str, Any]:
    started = time.perf_counter()
    student = _pruned(task, name)
    pruning = time.perf_counter() - started
    before = task.accuracy(student)
    started = time.perf_counter()
    _distill(task, student, rate)
    distilling = time.perf_counter() - started
    after = task.accuracy(student)
    progress(f"seed {task.seed}, {name}: {100 * before:.1f} -> {100 * after:.1f} %")
    return {
        "pruned": round(before, 4),
        "distilled": round(after, 4),
        "parameters": parameters(student),
        "seconds_to_prune": round(pruning, 1),
        "seconds_to_distill": round(distilling, 1),
    }


def _row(rate: float, runs: Sequence[dict[str, Any]], dense: Sequence[float]) -> dict[str, Any]:
    lost = [100 * (one - run["distilled"]) for one, run in zip(dense, runs, strict=True)]
    return {
        "learning_rate": rate,
        "pruned": [run["pruned"] for run in runs],
        "distilled": [run["distilled"] for run in runs],
        "points_lost": {"mean": round(mean(lost), 2), "worst": round(max(lost), 2)},
        "parameters": runs[0]["parameters"],
        "seconds_to_prune": round(mean(run["seconds_to_prune"] for run in runs), 1),
        "seconds_to_distill": round(mean(run["seconds_to_distill"] for run in runs), 1),
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
    seeds: Annotated[str, typer.Option(help="Whole numbers, separated by commas.")] = "0,1,2",
    rates: Annotated[str, typer.Option(help="Learning rates to choose among.")] = ",".join(
        f"{rate:g}" for rate in RATES
    ),
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
            recipe, chosen, out, ratio=ratio, epochs=epochs,
            seeds=[int(seed) for seed in seeds.split(",")],
            rates=[float(rate) for rate in rates.split(",")],
            progress=console.print,
        )  # fmt: skip
    except (ValueError, FxoptError) as error:
        raise typer.BadParameter(str(error)) from error
    Console().print(table(figures))


if __name__ == "__main__":
    app()
