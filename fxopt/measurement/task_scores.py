"""Scores against the truth: perplexity of the next token, and reports on classes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.calls import generates
from fxopt.errors import MeasureError

IGNORED = -100
"""The label of a position that isn't judged, as in transformers."""

_PIECE_ELEMENTS = 1 << 22


class NextToken:
    """The mean negative log likelihood of each next token, summed batch by batch in float64."""

    def __init__(self) -> None:
        self.tokens = 0
        self._loss = 0.0

    def add(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> None:
        """Logits `[batch, length, vocabulary]`, labels `[batch, length]` (-100: not judged).

        Of a pair of tokens that follow one another both must be in `mask` `[batch, length]`.
        """
        labels = labels.to(logits.device)
        judged = labels[:, 1:] != IGNORED
        if mask is not None:
            judged &= mask[:, 1:] & mask[:, :-1]
        predicted, following = logits[:, :-1][judged], labels[:, 1:][judged]
        size = max(1, _PIECE_ELEMENTS // logits.shape[-1])
        for scores, truth in zip(predicted.split(size), following.split(size), strict=True):
            loss = nn.functional.cross_entropy(scores.double(), truth, reduction="sum")
            self._loss += float(loss)
        self.tokens += len(following)

    @property
    def perplexity(self) -> float | None:
        """exp of the mean; inf where that is beyond float64, None where no token was judged."""
        if not self.tokens:
            return None
        try:
            return math.exp(self._loss / self.tokens)
        except OverflowError:
            return math.inf


class Classes:
    """How often each class was taken for each; scikit-learn makes the report of it."""

    def __init__(self) -> None:
        self._pairs: Counter[tuple[int, int]] = Counter()

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Logits `[..., classes]` and their labels `[...]` (-100: not judged)."""
        labels = labels.to(logits.device)
        judged = labels != IGNORED
        truth, chosen = labels[judged].tolist(), logits.argmax(-1)[judged].tolist()
        self._pairs.update(zip(truth, chosen, strict=True))

    @property
    def accuracy(self) -> float | None:
        """The share that was taken for its own class; None where nothing was judged."""
        total = sum(self._pairs.values())
        return sum(n for (a, b), n in self._pairs.items() if a == b) / total if total else None

    def report(self) -> Mapping[str, Mapping[str, float]]:
        """Precision, recall, F1 score and support by class, and their means.

        Source: `sklearn.metrics.classification_report`.
        """
        pairs = sorted(self._pairs)
        found: dict[str, Any] = _classification_report()(
            [truth for truth, _ in pairs],
            [chosen for _, chosen in pairs],
            sample_weight=[self._pairs[pair] for pair in pairs],
            output_dict=True,
            zero_division=0.0,
        )
        tables = {name: row for name, row in found.items() if isinstance(row, dict)}
        return {
            str(name): {figure: float(value) for figure, value in row.items()}
            for name, row in tables.items()
        }


def check_reports() -> None:
    """Raise `MeasureError` where scikit-learn isn't installed."""
    _classification_report()


def is_causal(model: Any) -> bool:
    """Whether `model` is, or holds, a language model that predicts the next token of its input."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return any(_writes_on(module) for module in (model, *modules))


def _writes_on(module: Any) -> bool:
    config = getattr(module, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    return generates(module)


def _classification_report() -> Callable[..., dict[str, Any]]:
    try:
        from sklearn.metrics import classification_report
    except ImportError as error:
        raise MeasureError(
            "the report on classes needs scikit-learn, which isn't installed: "
            "pip install 'fxopt[report]', or leave labels= out"
        ) from error
    return classification_report  # type: ignore[no-any-return]


def checked_labels(labels: Any, shape: torch.Size, batch: int) -> Tensor:
    """`labels` as a tensor of `shape`. Raises `MeasureError` that names the batch."""
    tensor = torch.as_tensor(labels)
    if tensor.shape != shape or tensor.is_floating_point():
        raise MeasureError(
            f"the labels of batch {batch} are {tensor.dtype} {list(tensor.shape)}, and the logits "
            f"want a class number for each of {list(shape)}; -100 leaves a position out"
        )
    return tensor
