"""The trained classifier of docstrings that gets pruned, and what it is pruned and judged with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForSequenceClassification

from benchmarks.finetune import Run
from benchmarks.finetune_recipe import Data, Recipe

Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class PruningTask:
    """The trained model's folder, what it is pruned and distilled with, and the budget of that."""

    folder: Path
    data: Data
    device: str
    batch: int
    ratio: float = 0.5
    epochs: int = 1
    seed: int = 0

    def load(self) -> nn.Module:
        """The trained model, new each time, with no dropout: one epoch is too short for its noise.

        transformers hangs hooks into a model at the first call that gives hidden states, and what
        is captured shares the parameters that no pass rewrites.
        """
        model = AutoModelForSequenceClassification.from_pretrained(
            self.folder, output_hidden_states=True
        )
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model.to(self.device).eval()  # type: ignore[no-any-return]

    def batches(self) -> list[Batch]:
        """The training set once, in an order that follows from the seed, whole batches only."""
        order = torch.Generator().manual_seed(self.seed)
        loader = DataLoader(
            self.data.train, self.batch, shuffle=True, drop_last=True, generator=order
        )
        return [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in loader]

    def accuracy(self, model: nn.Module) -> float:
        """Share of the held-out examples whose label is predicted."""
        right = sum(int((logits.argmax(-1) == y).sum()) for logits, y in self._answers(model))
        return right / len(self.data.test)

    def loss(self, model: nn.Module) -> float:
        """Mean cross entropy of the held-out examples, nats."""
        losses = (cross_entropy(logits, y, reduction="sum") for logits, y in self._answers(model))
        return float(sum(losses)) / len(self.data.test)

    @torch.no_grad()
    def _answers(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        model.eval()
        for ids, mask, labels in DataLoader(self.data.test, self.batch):
            # Labels too: what was captured with them is called with them.
            yield model(input_ids=ids, attention_mask=mask, labels=labels).logits, labels


def for_tuning(recipe: Recipe, data: Data, fold: int) -> tuple[Recipe, Data]:
    """The training set alone, a fifth of it held out in place of the test set.

    The recipe takes about as many steps over the rest as it takes over the whole. After fewer, the
    model has more left to learn, and its student gains by steps that would cost the real one.
    """
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    parts = list(order.tensor_split(5))
    held_out = parts.pop(fold)
    rest = torch.cat(parts)

    def part(rows: Tensor) -> TensorDataset:
        return TensorDataset(*(column[rows] for column in data.train.tensors))

    epochs = round(recipe.epochs * len(order) / len(rest))
    return (
        dataclasses.replace(recipe, epochs=epochs),
        dataclasses.replace(data, train=part(rest), test=part(held_out)),
    )


def trained(
    recipe: Recipe, data: Data, out: Path, seed: int, progress: Callable[[str], None]
) -> Path:
    """The folder that holds the fine-tuned classifier; it is trained where there is none yet."""
    folder = out / f"teacher-{_fingerprint(recipe, seed)}"
    if not (folder / "config.json").exists():
        run = Run("torch-full", seed, recipe, data)
        for epoch in range(recipe.epochs):
            run.epoch()
            done = 100 * run.figures.accuracy[-1]
            progress(f"teacher, epoch {epoch + 1} of {recipe.epochs}: {done:.1f} %")
        run.prepared.model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def _fingerprint(recipe: Recipe, seed: int) -> str:
    """What a trained model depends on, as a name of a folder."""
    text = json.dumps([dataclasses.asdict(recipe), seed], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
