"""Labels that a model has no class for, found before they are trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxopt.errors import InputError
from fxopt.train.outputs import named_outputs

_IGNORED = -100


def class_count(batch: Any, outputs: Any) -> int | None:
    """How many classes the logits among `outputs`, those for `batch`, have for its labels; None
    where the labels are of another kind, or there are none."""
    logits, labels = named_outputs(outputs).get("logits"), labels_of(batch)
    if labels is None or not isinstance(logits, Tensor) or labels.shape != logits.shape[:-1]:
        return None
    return logits.shape[-1]


def check_labels(batch: Any, index: int, classes: int) -> None:
    """Raise `InputError` for labels in `batch`, the `index`-th of its data, without a class."""
    found = labels_of(batch)
    if found is not None and _is_outside(found, classes):
        raise InputError(
            f"batch {index} of data= has {range_text(found)}, and the student's logits have "
            f"{classes} classes: labels must be in 0 to {classes - 1}, or {_IGNORED} where they "
            "don't count"
        )


def labels_of(batch: Any) -> Tensor | None:
    """The labels of `batch` if they are classes: whole numbers."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    is_class = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.numel()
    return labels if is_class else None


def range_text(labels: Tensor) -> str:
    """`labels from -1 to 7`, those that don't count left out."""
    counted = labels[labels != _IGNORED]
    if not counted.numel():
        return "no label that counts"
    return f"labels from {counted.min().item()} to {counted.max().item()}"


def _is_outside(labels: Tensor, classes: int) -> bool:
    return bool((((labels < 0) & (labels != _IGNORED)) | (labels >= classes)).any())
