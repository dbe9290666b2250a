"""The terms of a distillation loss: frozen options, checked when built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from fxopt.errors import TrainError

Layers: TypeAlias = tuple[tuple[int, int], ...]
"""Pairs (index in the student's tuple, index in the teacher's tuple)."""


@dataclass(frozen=True)
class Task:
    """The student's own loss, which its outputs carry where the batch holds labels."""

    weight: float = 1.0
    name: ClassVar[str] = "task"

    def __post_init__(self) -> None:
        _check_weight(self, self.weight)


@dataclass(frozen=True)
class Logits:
    """T² KL(softmax(t / T) ‖ softmax(s / T)) of the logits t, s on the last axis, mean over rows.

    T² keeps the gradient's size when the temperature T changes. Logits of rank 3 are per token:
    padding (attention_mask 0) and labels of -100 don't count. `next_token` says that the logits of
    a position predict the label of the next one; None finds that out from the model's class.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.
    """

    weight: float = 1.0
    temperature: float = 2.0
    next_token: bool | None = None
    name: ClassVar[str] = "logits"

    def __post_init__(self) -> None:
        _check_weight(self, self.weight)
        if not _is_number(self.temperature) or not self.temperature > 0:
            raise TrainError(f"Logits(temperature={self.temperature!r}): must be a number above 0")
        if self.next_token not in (None, True, False):
            raise TrainError(f"Logits(next_token={self.next_token!r}): must be None, True or False")


@dataclass(frozen=True)
class Hidden:
    """Distance of hidden states, mean over the pairs of layers, the tokens and (mse) the width.

    "mse" is the mean square of P s - t, "cosine" is 1 - cos(P s, t). P is a learned linear
    projection of each pair where the widths differ, the identity where they don't; it is dropped
    after training. `layers` pairs indices of `hidden_states` (0 is the embedding); None pairs the
    student's states with those of the same relative depth. Where neither model returns
    `hidden_states`, the pair is that of `last_hidden_state`.

    Source: TinyBERT, Jiao et al. 2020, arXiv:1909.10351, equations 8 and 9; "cosine" is that of
    DistilBERT, Sanh et al. 2019, arXiv:1910.01108.
    """

    weight: float = 1.0
    distance: Literal["mse", "cosine"] = "mse"
    layers: Layers | None = None
    name: ClassVar[str] = "hidden"

    def __post_init__(self) -> None:
        _check_weight(self, self.weight)
        _check_distance(self, self.distance, ("mse", "cosine"))
        _check_layers(self, self.layers)


@dataclass(frozen=True)
class Attention:
    """Distance of attention probabilities, mean over the pairs of layers, heads and query tokens.

    "kl" is KL(t ‖ s) over the keys, "mse" the mean square of s - t. Heads are compared one by one
    where there are as many; after heads were cut, the averages over the heads are compared.
    `layers` pairs indices of `attentions`; None pairs layers of the same relative depth.

    Source: "kl" MiniLM, Wang et al. 2020, arXiv:2002.10957, section 3.1; "mse" TinyBERT, Jiao et
    al. 2020, equation 7, on probabilities, since models don't return the scores before softmax.
    """

    weight: float = 1.0
    distance: Literal["kl", "mse"] = "kl"
    layers: Layers | None = None
    name: ClassVar[str] = "attention"

    def __post_init__(self) -> None:
        _check_weight(self, self.weight)
        _check_distance(self, self.distance, ("kl", "mse"))
        _check_layers(self, self.layers)


Term: TypeAlias = Task | Logits | Hidden | Attention
KINDS = (Task, Logits, Hidden, Attention)


def checked_terms(terms: Any) -> tuple[Term, ...] | None:
    """`terms` as a tuple, None for None. Raises `TrainError` for what isn't one term of a kind."""
    if terms is None:
        return None
    if isinstance(terms, KINDS):
        return (terms,)
    if isinstance(terms, (str, bytes)) or not isinstance(terms, Sequence):
        raise TrainError(f"terms={terms!r:.60}: give a list such as [Task(), Logits()]")
    for term in terms:
        if not isinstance(term, KINDS):
            instead = f"{term.__name__}()" if isinstance(term, type) else "an instance"
            raise TrainError(
                f"terms= holds {term!r:.60}; give {instead} of Task, Logits, Hidden or Attention"
            )
    names = [term.name for term in terms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TrainError(f"terms= holds {', '.join(twice)} twice; give each kind once")
    if not any(term.weight for term in terms):
        raise TrainError("terms= has no term with a weight above 0: there is nothing to learn")
    return tuple(term for term in terms if term.weight)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _check_weight(term: Any, weight: Any) -> None:
    if not _is_number(weight) or weight < 0:
        raise TrainError(f"{type(term).__name__}(weight={weight!r}): must be a number, 0 or above")


def _check_distance(term: Any, distance: Any, known: tuple[str, ...]) -> None:
    if distance not in known:
        raise TrainError(
            f"{type(term).__name__}(distance={distance!r}): must be {' or '.join(map(repr, known))}"
        )


def _check_layers(term: Any, layers: Any) -> None:
    if layers is None:
        return
    pairs = isinstance(layers, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and all(type(i) is int for i in pair)
        for pair in layers
    )
    if not pairs or not layers:
        raise TrainError(
            f"{type(term).__name__}(layers={layers!r:.60}): must be pairs of indices, student's "
            "first: ((1, 2), (2, 4))"
        )
