"""Perplexity of SmolLM2-135M as its feed-forward nets get narrower, by each measure of importance.

    python -m benchmarks.pruning_perplexity --out runs/perplexity

Every measure cuts the same share of each layer's hidden units, as it is and with the down
projections refitted to calibration text. Judged on other text. Nothing is trained.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fxopt
from benchmarks.fidelity import perplexity
from benchmarks.models import Language, smollm2
from benchmarks.prunable import parameters
from benchmarks.systems import Inputs
from fxopt.analyses.importance import Importance
from fxopt.errors import FxoptError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

IMPORTANCES: tuple[Importance, ...] = (
    "l1",
    "l2",
    "group_l2",
    "taylor",
    "activation",
    "obs",
    "random",
)
RATIOS = (0.1, 0.2, 0.3)
_LENGTH = 512


class Judged(nn.Module):
    """A causal language model that gives, of `[batch, length]` tokens, the loss and all logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """`loss` is the mean over the next tokens, which "taylor" differentiates."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def perplexities(
    language: Language,
    ratios: Sequence[float] = RATIOS,
    importances: Sequence[Importance] = IMPORTANCES,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Perplexity of the dense model and of each importance, refitted or not, at each ratio."""
    model = Judged(language.model).eval()
    dense = _perplexity(model, language)
    progress(f"dense: {dense:.2f}")
    cut: dict[str, dict[str, Any]] = {}
    left: dict[str, float] = {}
    for importance, reconstruct in itertools.product(importances, (False, True)):
        row = cut[f"{importance}, reconstructed" if reconstruct else importance] = {}
        for ratio in ratios:
            student = _pruned(model, language, ratio, importance, reconstruct)
            row[_percent(ratio)] = round(_perplexity(student, language), 3)
            left[_percent(ratio)] = round(parameters(student) / parameters(model), 3)
            name = f"{importance}{', reconstructed' if reconstruct else ''}"
            progress(f"{name}, {_percent(ratio)} cut: {row[_percent(ratio)]:.2f}")
    return {
        "windows": [len(language.evaluation), language.evaluation[0].shape[-1]],
        "calibration windows": len(language.calibration),
        "dense": round(dense, 3),
        "parameters left": left,
        "perplexity": cut,
    }


def table(figures: Mapping[str, Any]) -> Table:
    """The figures to read: a row for each importance, a column for each share that is cut."""
    shown = Table(title=f"perplexity, dense {figures['dense']:.2f}", caption="FFN units cut")
    shown.add_column("importance", no_wrap=True)
    for ratio in figures["parameters left"]:
        shown.add_column(ratio, justify="right")
    for name, row in figures["perplexity"].items():
        shown.add_row(name, *(f"{value:.2f}" for value in row.values()))
    return shown


def plot(figures: Mapping[str, Any], path: Path) -> None:
    """The figures as curves in an SVG file: dashed as cut, solid with reconstruction.

    Twice: all of them on a logarithmic scale, and those that stay within twice the dense model's.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    dense = figures["dense"]
    figure, (whole, near) = pyplot.subplots(1, 2, figsize=(11.0, 4.5), layout="constrained")
    shares = [0.0, *(float(name.rstrip("% ")) for name in figures["parameters left"])]
    names = [name for name in figures["perplexity"] if ", " not in name]
    for index, name in enumerate(names):
        for label, style in ((name, "--"), (f"{name}, reconstructed", "-")):
            values = [dense, *figures["perplexity"].get(label, {}).values()]
            if len(values) == len(shares):
                for axes in (whole, near):
                    axes.plot(shares, values, style, color=f"C{index}", marker=".", label=label)
    whole.set(ylabel="perplexity", yscale="log", title=figures.get("model", ""))
    near.set(ylim=(0.95 * dense, 2.0 * dense), title="within twice the dense model's")
    for axes in (whole, near):
        axes.set_xlabel("FFN units cut, %")
        axes.grid(alpha=0.3)
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize="small", loc="outside right upper", handlelength=3.0)
    # Without the date and random identifiers, the same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "fxopt", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _pruned(
    model: nn.Module, language: Language, ratio: float, importance: Importance, reconstruct: bool
) -> nn.Module:
    pass_ = fxopt.PruneChannels(
        ratio=ratio, importance=importance, scope=("ffn",), reconstruct=reconstruct
    )
    return fxopt.transform(
        model,
        [pass_],
        example_inputs={"input_ids": language.evaluation[0]},
        calibration=[{"input_ids": window} for window in language.calibration],
        verify=False,
        measure_cost=False,
    )


@torch.no_grad()
def _perplexity(model: nn.Module, language: Language) -> float:
    def logits(inputs: Inputs) -> Tensor:
        found: Tensor = model(**inputs)["logits"]
        return found

    try:
        return perplexity(logits, language.evaluation)
    except OverflowError:
        return math.inf


def _percent(ratio: float) -> str:
    return f"{100 * ratio:g} %"


@app.command()
def main(
    importances: Annotated[str, typer.Option(help="Names, separated by commas.")] = ",".join(
        IMPORTANCES
    ),
    ratios: Annotated[str, typer.Option(help="Shares, separated by commas.")] = ",".join(
        map(str, RATIOS)
    ),
    length: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = _LENGTH,
    quick: Annotated[bool, typer.Option(help="A tiny random model: does everything run?")] = False,
    out: Annotated[Path, typer.Option(help="Folder for results.json and the plot.")] = Path(
        "runs/perplexity"
    ),
) -> None:
    """Perplexity over what is cut of SmolLM2's feed-forward nets: table, JSON and plot."""
    language = smollm2(min(length, 64) if quick else length, quick=quick)
    console = Console(stderr=True)
    try:
        shares = [float(ratio) for ratio in ratios.split(",")]
        names = [name.strip() for name in importances.split(",")]
        figures = perplexities(language, shares, names, console.print)  # type: ignore[arg-type]
    except (ValueError, FxoptError) as error:
        raise typer.BadParameter(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    figures = {"model": "a tiny random model" if quick else "SmolLM2-135M-Instruct", **figures}
    (out / "results.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    plot(figures, out / "perplexity.svg")
    Console().print(table(figures))


if __name__ == "__main__":
    app()
