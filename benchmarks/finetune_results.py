"""What a run of the fine-tuning leaves behind: events, reports, figures, and a table to read."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import fxopt
from fxopt.timing import fingerprint, ratio, summarize


@dataclass
class RunFigures:
    """What is measured of one run: by epoch, except for the losses, which are by epoch and step."""

    mode: str
    seed: int
    passes: str
    preparation_seconds: float
    losses: list[list[float]] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    macro_f1: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    step_bytes: int | None = None
    predicted: Tensor = field(default_factory=lambda: torch.empty(0))
    expected: Tensor = field(default_factory=lambda: torch.empty(0))

    def judge(self, predicted: Tensor, expected: Tensor) -> None:
        """Keep the labels that were predicted after an epoch, `[n]`, and how good they are."""
        from sklearn.metrics import f1_score

        self.predicted, self.expected = predicted, expected
        self.accuracy.append((predicted == expected).double().mean().item())
        self.macro_f1.append(float(f1_score(expected, predicted, average="macro")))

    def to_json(self) -> dict[str, Any]:
        """The figures as plain values; the loss as its mean over each epoch."""
        return {
            "accuracy": [round(value, 4) for value in self.accuracy],
            "macro_f1": [round(value, 4) for value in self.macro_f1],
            "mean_loss": [round(statistics.fmean(losses), 4) for losses in self.losses],
            "seconds": [round(value, 2) for value in self.seconds],
            "joules": [round(value, 1) for value in self.joules] or None,
            "preparation_seconds": round(self.preparation_seconds, 1),
        }


def write_run(folder: Path, run: RunFigures, labels: Sequence[str]) -> None:
    """TensorBoard events (loss by step; accuracy, seconds, joules by epoch) and the report."""
    from sklearn.metrics import classification_report
    from torch.utils.tensorboard import SummaryWriter

    # A folder used before: what stands in it from step 0 on is no longer shown.
    with SummaryWriter(folder, purge_step=0) as writer:
        writer.add_text("passes", run.passes or "none")
        losses = [loss for epoch in run.losses for loss in epoch]
        for step, loss in enumerate(losses, start=1):
            writer.add_scalar("loss/train", loss, step)
        by_epoch = {
            "accuracy/test": run.accuracy,
            "macro_f1/test": run.macro_f1,
            "cost/seconds": run.seconds,
            "cost/joules": run.joules,
        }
        for name, values in by_epoch.items():
            for epoch, value in enumerate(values, start=1):
                writer.add_scalar(name, value, epoch)
    report = classification_report(
        run.expected,
        run.predicted,
        labels=range(len(labels)),
        target_names=labels,
        digits=3,
        zero_division=0,
    )
    (folder / "report.txt").write_text(report, encoding="utf-8")


def document(
    recipe: Mapping[str, Any],
    counts: Mapping[str, Mapping[str, int]],
    runs: Sequence[RunFigures],
    no_joules: str | None,
) -> dict[str, Any]:
    """Everything as plain values; `no_joules` is why energy wasn't measured, None where it was.

    `ratios` of time and `comparisons` of accuracy set each mode beside the first one, and mixed
    beside torch.autocast.
    """
    modes = {run.mode: [r for r in runs if r.mode == run.mode] for run in runs}
    first = next(iter(modes))
    pairs = [(mode, first) for mode in modes if mode != first]
    if first != "torch-autocast" and {"mixed", "torch-autocast"} <= modes.keys():
        pairs.append(("mixed", "torch-autocast"))
    return {
        "machine": {**fingerprint(), "fxopt": fxopt.__version__},
        "recipe": dict(recipe),
        "examples": {
            split: sum(count[split] for count in counts.values()) for split in ("train", "test")
        },
        "classes": dict(counts),
        "energy": "joules of the whole device, at rest included"
        if no_joules is None
        else no_joules,
        "systems": {mode: _summary(of_mode) for mode, of_mode in modes.items()},
        "ratios": {f"{a} / {b}": _time_ratio(modes[a], modes[b]) for a, b in pairs},
        "comparisons": {f"{a} / {b}": _comparison(modes[a], modes[b]) for a, b in pairs},
        "runs": {f"{run.mode}, seed {run.seed}": run.to_json() for run in runs},
    }


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """The document as two tables: what each mode costs and reaches, and modes side by side."""
    examples, has_joules = figures["examples"], figures["energy"].startswith("joules")
    modes = Table(
        title=f"{examples['train']} examples of {len(figures['classes'])} classes, judged on "
        f"{examples['test']} others",
        caption="MB / step: peak memory of a step beyond what is held between two\n"
        f"energy: {figures['energy']}",
    )
    modes.add_column("mode", no_wrap=True)
    for column in ("accuracy % (by seed)", "macro F1", "s / epoch", "MB / step"):
        modes.add_column(column, justify="right", no_wrap=True)
    if has_joules:
        modes.add_column("J / epoch", justify="right", no_wrap=True)
    for mode, row in figures["systems"].items():
        memory = "-" if row["step_bytes"] is None else f"{row['step_bytes'] / 1e6:.0f}"
        modes.add_row(
            mode,
            f"{100 * row['accuracy_mean']:.1f} ({_listed(row['accuracy'], '.1f', 100)})",
            f"{row['macro_f1_mean']:.3f}",
            _spread(row["seconds_per_epoch"], 1),
            memory,
            *([_spread(row["joules_per_epoch"], 0)] if has_joules else []),
        )
    pairs = Table(title="side by side: epochs of the same seed, in turns")
    pairs.add_column("modes", no_wrap=True)
    for column in ("time", "accuracy, points (by seed)"):
        pairs.add_column(column, justify="right", no_wrap=True)
    for name, row in figures["comparisons"].items():
        points = _listed(row["accuracy_points"], "+.1f")
        pairs.add_row(
            name,
            _spread(figures["ratios"][name], 2),
            f"{row['accuracy_points_mean']:+.2f} ({points})",
        )
    return [modes, pairs]


def _summary(runs: Sequence[RunFigures]) -> dict[str, Any]:
    final = [run.accuracy[-1] for run in runs]
    joules = [value for run in runs for value in run.joules]
    return {
        "passes": runs[0].passes,
        "accuracy_mean": round(statistics.fmean(final), 4),
        "accuracy": [round(value, 4) for value in final],
        "macro_f1_mean": round(statistics.fmean(run.macro_f1[-1] for run in runs), 4),
        "seconds_per_epoch": _quantiles([value for run in runs for value in run.seconds]),
        "joules_per_epoch": _quantiles(joules) if joules else None,
        "step_bytes": runs[0].step_bytes,
    }


def _time_ratio(a: Sequence[RunFigures], b: Sequence[RunFigures]) -> dict[str, float]:
    times = (summarize([value for run in runs for value in run.seconds]) for runs in (a, b))
    paired = ratio(*times)
    return {
        "median": round(paired.median, 3),
        "p5": round(paired.p5, 3),
        "p95": round(paired.p95, 3),
    }


def _comparison(a: Sequence[RunFigures], b: Sequence[RunFigures]) -> dict[str, Any]:
    points = [100 * (x.accuracy[-1] - y.accuracy[-1]) for x, y in zip(a, b, strict=True)]
    return {
        "accuracy_points_mean": round(statistics.fmean(points), 2),
        "accuracy_points": [round(value, 2) for value in points],
    }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    found = summarize(values)
    return {
        "median": round(found.median, 2),
        "p5": round(found.p5, 2),
        "p95": round(found.p95, 2),
    }


def _listed(values: Sequence[float], form: str, factor: float = 1.0) -> str:
    return " ".join(f"{factor * value:{form}}" for value in values)


def _spread(row: Mapping[str, float], digits: int) -> str:
    median, p5, p95 = (f"{row[key]:.{digits}f}" for key in ("median", "p5", "p95"))
    return f"{median} ({p5} to {p95})"
