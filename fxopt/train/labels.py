"""Labels that a model has no class for, found before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxopt.errors import InputError
from fxopt.train.outputs import named_outputs

_IGNORED = -100


def check_labels(data: Any, first: Any, outputs: Any) -> None:
    """Raise `InputError` for labels in `data` that the logits among `outputs` have no class for.

    `outputs` are those for the batch `first`. Data that aren't a list or a tuple are read once, as
    they are trained on, so that only `first` can be looked at here.
    """
    logits, labels = named_outputs(outputs).get("logits"), labels_of(first)
    if labels is None or not isinstance(logits, Tensor) or labels.shape != logits.shape[:-1]:
        return
    batches = data if isinstance(data, (list, tuple)) else [first]
    for index, batch in enumerate(batches):
        found = labels_of(batch)
        if found is not None and _is_outside(found, logits.shape[-1]):
            raise InputError(
                f"batch {index} of data= has {range_text(found)}, and the student's logits have "
                f"{logits.shape[-1]} classes: labels must be in 0 to {logits.shape[-1] - 1}, or "
                f"{_IGNORED} where they don't count"
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
