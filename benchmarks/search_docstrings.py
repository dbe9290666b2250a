"""A search over pass lists for a classifier of docstrings, beside the lists written by hand.

    python -m benchmarks.search_docstrings --out runs/search

all-MiniLM-L6-v2 is fine-tuned to tell which module a docstring is from (`benchmarks.finetune`'s
recipe; the trained model is kept in the folder and used again). `fxopt.search` may lose 0.5 points
of accuracy on what was held out. Its best list is then timed in the same rounds as the original and
every list of `benchmarks.systems.ours` that keeps the accuracy. The search's own trials are in
`search.db` of the folder: the same command goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

import fxopt
from benchmarks.finetune_recipe import Data, Recipe, load_data, pretrained_folder
from benchmarks.pruning_task import trained
from benchmarks.sidebyside import in_turns, spread, timing
from benchmarks.systems.ours import LISTS
from fxopt.errors import FxoptError
from fxopt.search import Found, TrialRecord, search
from fxopt.timing import fingerprint, ratio

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Batch = dict[str, Tensor]
Progress = Callable[[str], None]

_CALIBRATION = 8
_ORIGINAL, _FOUND = "original", "found by search"


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Batches of one size, the last filled up with the first examples, and the labels `[n]`."""

    batches: tuple[Batch, ...]
    labels: Tensor


def accuracy_points(model: Any, held_out: HeldOut) -> float:
    """Per cent of the held-out examples whose label is predicted."""
    with torch.no_grad():
        found = torch.cat([model(**batch).logits.argmax(dim=-1) for batch in held_out.batches])
    right = found[: len(held_out.labels)] == held_out.labels
    return 100 * right.double().mean().item()


def compare_with_hand_written(
    recipe: Recipe,
    out: Path,
    *,
    tolerance: float = 0.5,
    trials: int = 30,
    workers: int = 1,
    seed: int = 0,
    lists: Mapping[str, Any] = LISTS,
    space: Iterable[Iterable[str]] | None = None,
    progress: Progress = lambda line: None,
) -> dict[str, Any]:
    """Train or load the classifier, search, and time what was found beside `lists`.

    Returns the figures, which are in `results.json` of `out` too. None of `lists` is told to the
    search.
    """
    data = load_data(recipe)
    folder = trained(recipe, data, out, seed, progress)
    model = AutoModelForSequenceClassification.from_pretrained(folder).to(recipe.device).eval()
    held_out, calibration = _held_out(data, recipe.batch), _calibration(data, recipe.batch)
    found = search(
        model,
        held_out,
        metric=accuracy_points,
        tolerance=tolerance,
        inputs=held_out.batches[0],
        calibration=calibration,
        trials=trials,
        workers=workers,
        seed=seed,
        space=space,
        storage=out / "search.db",
        log_dir=out / "events",
        progress=progress,
    )
    progress(str(found))
    rows = side_by_side(model, held_out, calibration, found, lists, progress)
    figures = {
        "machine": {**fingerprint(), "fxopt": fxopt.__version__},
        "recipe": {**dataclasses.asdict(recipe), "model": "/".join(recipe.model.parts[-2:])},
        "tolerance_points": tolerance,
        "threshold_points": round(found.threshold, 2),
        "lists": rows,
        "trials": {str(trial.number): _trial(trial) for trial in found.trials},
    }
    (out / "results.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def side_by_side(
    model: nn.Module,
    held_out: HeldOut,
    calibration: list[Batch],
    found: Found,
    lists: Mapping[str, Any],
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Accuracy of each list, and times, in the same rounds, of those that keep what is allowed."""
    inputs = held_out.batches[0]
    best = {} if found.best is None else {_FOUND: found.best.passes}
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {_ORIGINAL: partial(model, **inputs)}
    rows[_ORIGINAL] = {"passes": "", "points": round(accuracy_points(model, held_out), 2)}
    for name, passes in {**lists, **best}.items():
        progress(f"making {name}")
        made = fxopt.transform(
            model, passes, example_inputs=inputs, calibration=calibration, measure_cost=False
        )
        points = accuracy_points(made, held_out)
        rows[name] = {"passes": str(passes), "points": round(points, 2)}
        if points >= found.threshold:
            runs[name] = partial(made, **inputs)
    with torch.no_grad():
        times = in_turns(runs, repeats=30, seconds=5.0)
    for name, time in times.items():
        rows[name] |= timing(time)
        rows[name]["ratio_to_original"] = spread(ratio(time, times[_ORIGINAL]))
        if _FOUND in times:
            rows[name]["found_over_this"] = spread(ratio(times[_FOUND], time))
    return rows


def table(figures: Mapping[str, Any]) -> Table:
    """The lists by time, those that lose too much last."""
    allowed = figures["threshold_points"]
    shown = Table(
        title=f"accuracy in %, at least {allowed:.1f} allowed",
        caption="found / this: below 1 the search's list is faster, in the same rounds",
    )
    shown.add_column("list", no_wrap=True)
    for column in ("accuracy", "ms", "x original", "found / this"):
        shown.add_column(column, justify="right", no_wrap=True)
    rows = sorted(figures["lists"].items(), key=lambda item: item[1].get("median_ms", float("inf")))
    for name, row in rows:
        timed = "median_ms" in row
        shown.add_row(
            name,
            f"{row['points']:.1f}",
            f"{row['median_ms']:.2f}" if timed else "not timed",
            f"{row['ratio_to_original']['median']:.3f}" if timed else "-",
            f"{row['found_over_this']['median']:.3f}" if "found_over_this" in row else "-",
        )
    return shown


def _trial(trial: TrialRecord) -> dict[str, Any]:
    return {
        "state": trial.state,
        "points": None if trial.metric is None else round(trial.metric, 2),
        "time / original": trial.ratios.get("latency"),
        "seconds": trial.seconds,
        "passes": trial.passes,
        "reason": trial.reason,
    }


def _held_out(data: Data, batch: int) -> HeldOut:
    ids, mask, labels = data.test.tensors
    rows = torch.arange(-(-len(labels) // batch) * batch).remainder(len(labels))
    batches = tuple(
        {"input_ids": ids[chosen], "attention_mask": mask[chosen]} for chosen in rows.split(batch)
    )
    return HeldOut(batches, labels)


def _calibration(data: Data, batch: int) -> list[Batch]:
    """Batches of what was trained on, in an order drawn once."""
    ids, mask, _ = data.train.tensors
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    chosen = [rows for rows in order.split(batch) if len(rows) == batch][:_CALIBRATION]
    return [{"input_ids": ids[rows], "attention_mask": mask[rows]} for rows in chosen]


@app.command()
def main(
    tolerance: Annotated[float, typer.Option(min=0.0, help="Points that may be lost.")] = 0.5,
    trials: Annotated[int, typer.Option(min=1)] = 30,
    workers: Annotated[int, typer.Option(min=1)] = 1,
    epochs: Annotated[int, typer.Option(min=1)] = Recipe.epochs,
    classes: Annotated[int, typer.Option(min=2, help="Modules to choose from.")] = Recipe.classes,
    per_class: Annotated[int, typer.Option(min=2)] = Recipe.per_class,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a text.")] = Recipe.length,
    layers: Annotated[int | None, typer.Option(min=1, help="Keep only the first ones.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    quick: Annotated[bool, typer.Option(help="Nothing is compiled: does everything run?")] = False,
    out: Annotated[Path, typer.Option(help="Folder for model, study, results.")] = Path(
        "runs/search"
    ),
) -> None:
    """Search for the fastest list of passes of a docstring classifier, beside those by hand."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(stderr=True)
    uncompiled: dict[str, Any] = {}
    if quick:
        uncompiled = {
            "space": [["canonicalize"], ["", "fuse-linears"], ["", "int8-linear{where=always}"]],
            "lists": {"by hand": "canonicalize, fuse-linears"},
        }
    try:
        recipe = Recipe(
            pretrained_folder(), epochs=epochs, classes=classes, per_class=per_class,
            length=length, layers=layers,
        )  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        figures = compare_with_hand_written(
            recipe, out, tolerance=tolerance, trials=trials, workers=workers, seed=seed,
            progress=console.print, **uncompiled,
        )  # fmt: skip
    except (ValueError, FxoptError) as error:
        raise typer.BadParameter(str(error)) from error
    Console().print(table(figures))


if __name__ == "__main__":
    app()
