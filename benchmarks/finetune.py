"""Fine-tunes a BERT classifier in full, mixed and half precision: which module is a docstring from?

    python -m benchmarks.finetune --out runs
    tensorboard --logdir runs

The loop is the classic recipe: AdamW, a linear schedule with warm-up, clipped gradients, and loss
scaling where the model computes in float16. All that differs between the modes is the list of
passes. The runs of one seed go on in turns, epoch by epoch, so that a busy machine slows all alike.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Subset, TensorDataset
from transformers import get_linear_schedule_with_warmup
from transformers.utils import logging

from benchmarks.energy import energy_counter
from benchmarks.finetune_recipe import (
    MODES,
    Autocast,
    Data,
    Recipe,
    load_data,
    prepare,
    pretrained_folder,
)
from benchmarks.finetune_results import RunFigures, document, tables, write_run
from fxopt.errors import FxoptError
from fxopt.timing import peak_memory

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Counter = Callable[[], float]


def train_epoch(
    model: nn.Module,
    loader: DataLoader[tuple[Tensor, ...]],
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    scaler: torch.amp.GradScaler,
    autocast: Autocast = nullcontext,
) -> list[Tensor]:
    """One pass over the data; the loss of each step."""
    model.train()
    losses = []
    for input_ids, attention_mask, labels in loader:
        with autocast():
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
            loss = cross_entropy(logits, labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


@torch.no_grad()
def predict(
    model: nn.Module, data: TensorDataset, batch: int, autocast: Autocast = nullcontext
) -> Tensor:
    """The likeliest label of each example, `[n]` on the CPU."""
    model.eval()
    count = len(data)
    # The last batch is filled up with the first examples: another size would compile again.
    rows = torch.arange(-(-count // batch) * batch).remainder(count)
    found = []
    for chosen in rows.split(batch):
        input_ids, attention_mask, _ = (column[chosen] for column in data.tensors)
        with autocast():
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        found.append(logits.argmax(dim=-1).cpu())
    return torch.cat(found)[:count]


class Run:
    """One model in one precision, fine-tuned epoch by epoch; `figures` grow with each."""

    def __init__(self, mode: str, seed: int, recipe: Recipe, data: Data) -> None:
        started = time.perf_counter()
        self.seed, self.recipe, self.data = seed, recipe, data
        ids, mask, _ = data.train[: recipe.batch]
        example = {"input_ids": ids, "attention_mask": mask}
        torch.manual_seed(seed)
        self.prepared = prepare(mode, recipe, len(data.texts.labels), example)
        order = torch.Generator().manual_seed(seed)
        self.loader = DataLoader(
            data.train, recipe.batch, shuffle=True, drop_last=True, generator=order
        )
        self.optimizer = torch.optim.AdamW(
            self.prepared.model.parameters(),
            lr=recipe.learning_rate,
            weight_decay=0.01,
            fused=True,
        )
        steps = recipe.epochs * len(self.loader)
        self.schedule = get_linear_schedule_with_warmup(
            self.optimizer, num_warmup_steps=steps // 10, num_training_steps=steps
        )
        self.scaler = torch.amp.GradScaler(
            torch.device(recipe.device).type, enabled=self.prepared.scales_loss
        )
        self._compile_backward(example)
        seconds = time.perf_counter() - started
        self.figures = RunFigures(mode, seed, self.prepared.passes, seconds)

    def epoch(self, counter: Counter | None = None) -> None:
        """Train one epoch and judge it on what was held out; only the training is measured.

        `counter` gives the joules spent so far.
        """
        # Dropout mustn't depend on how many runs take turns.
        torch.manual_seed(1000 * self.seed + len(self.figures.seconds))
        _synchronize(self.recipe.device)
        joules = counter() if counter else 0.0
        started = time.perf_counter()
        losses = self._train(self.loader)
        _synchronize(self.recipe.device)
        self.figures.seconds.append(time.perf_counter() - started)
        if counter:
            self.figures.joules.append(counter() - joules)
        self.figures.losses.append([loss.item() for loss in losses])
        model, autocast = self.prepared.model, self.prepared.autocast
        predicted = predict(model, self.data.test, self.recipe.batch, autocast)
        self.figures.judge(predicted, self.data.test.tensors[2].cpu())

    def measure_step(self) -> None:
        """The peak memory of a step beyond what is held between two; to be called at the very end.

        The learning rate is zero by then, so that the steps change no weight.
        """
        one_batch = DataLoader(Subset(self.data.train, range(self.recipe.batch)), self.recipe.batch)
        memory = peak_memory(lambda: self._train(one_batch), self.recipe.device)
        self.figures.step_bytes = None if memory is None else memory.bytes

    def _train(self, loader: DataLoader[tuple[Tensor, ...]]) -> list[Tensor]:
        prepared = self.prepared
        return train_epoch(
            prepared.model, loader, self.optimizer, self.schedule, self.scaler, prepared.autocast
        )

    def _compile_backward(self, example: dict[str, Tensor]) -> None:
        self.prepared.model.train()
        with self.prepared.autocast():
            logits = self.prepared.model(**example).logits
        logits.sum().backward()
        self.optimizer.zero_grad()


def compare_precisions(
    recipe: Recipe,
    modes: Sequence[str],
    seeds: int,
    out: Path,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Fine-tune in each mode with each seed; events, reports and `results.json` go to `out`.

    Returns what `results.json` holds. Raises `ValueError` for an unknown mode, or too few examples.
    """
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise ValueError(f"modes {unknown} are not known: choose among {', '.join(MODES)}")
    data = load_data(recipe)
    if len(data.train) < recipe.batch:
        raise ValueError(f"{len(data.train)} examples don't fill one batch of {recipe.batch}")
    counter, no_joules = _counter(recipe.device)
    finished: list[RunFigures] = []
    for seed in range(seeds):
        progress(f"seed {seed}: preparing {', '.join(modes)}")
        runs = [Run(mode, seed, recipe, data) for mode in modes]
        for epoch in range(recipe.epochs):
            for run in runs:
                progress(f"seed {seed}, epoch {epoch + 1} of {recipe.epochs}: {run.figures.mode}")
                run.epoch(counter)
        for run in runs:
            if seed == 0:
                run.measure_step()
            write_run(out / run.figures.mode / f"seed-{seed}", run.figures, data.texts.labels)
            finished.append(run.figures)
    settings = {**dataclasses.asdict(recipe), "model": "/".join(recipe.model.parts[-2:])}
    figures = document(settings, data.texts.counts(), finished, no_joules)
    (out / "results.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


@app.command()
def main(
    modes: Annotated[str, typer.Option(help=f"Among {', '.join(MODES)}.")] = "full,mixed,half",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each mode.")] = 3,
    epochs: Annotated[int, typer.Option(min=1)] = Recipe.epochs,
    classes: Annotated[int, typer.Option(min=2, help="Modules to choose from.")] = Recipe.classes,
    per_class: Annotated[
        int, typer.Option(min=2, help="Training examples of a module, at most.")
    ] = Recipe.per_class,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a text.")] = Recipe.length,
    batch: Annotated[int, typer.Option(min=1)] = Recipe.batch,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = Recipe.learning_rate,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float16.")] = Recipe.dtype,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = Recipe.device,
    layers: Annotated[int | None, typer.Option(min=1, help="Keep only the first ones.")] = None,
    model: Annotated[Path | None, typer.Option(help="A local transformers folder.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for events and reports.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
) -> None:
    """Fine-tune all-MiniLM-L6-v2 to tell which module a docstring is from, in each precision."""
    # The fresh head is meant, and the bar of a model that loads in a second is noise.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(stderr=True)
    try:
        recipe = Recipe(
            model or pretrained_folder(),
            *(epochs, classes, per_class, length, batch, learning_rate, dtype, device, layers),
        )
        chosen = [mode.strip() for mode in modes.split(",")]
        figures = compare_precisions(recipe, chosen, seeds, out, console.print)
    except (ValueError, FxoptError) as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
        return
    for table in tables(figures):
        Console().print(table)
    typer.echo(f"tensorboard --logdir {out}")


def _counter(device: str) -> tuple[Counter | None, str | None]:
    try:
        return energy_counter(device), None
    except OSError as error:
        return None, f"not measurable here: {error}"


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    app()
