"""How true a candidate's outputs are to a reference's on given data, in the units of the task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any, TypeAlias

from torch import Tensor

from fxopt.calls import check_batches
from fxopt.errors import MeasureError
from fxopt.measurement.agreement import Agreement
from fxopt.measurement.forcing import Decoded, Forcing
from fxopt.measurement.outputs import PLAIN, call, judging, main_output, padding_mask, rows
from fxopt.measurement.pair import Pair
from fxopt.measurement.reading import why_unreadable
from fxopt.measurement.task_scores import (
    Classes,
    NextToken,
    check_reports,
    checked_labels,
    is_causal,
)
from fxopt.measurement.user_metrics import Metric, Metrics, scores, usable_metrics

Model: TypeAlias = Callable[..., Any]
Failed: TypeAlias = Callable[[str, Exception], None]


@dataclass(frozen=True)
class Fidelity:
    """What the candidate's outputs are worth beside the reference's.

    `output` names the tensor that was compared, `rows` counts its rows: tokens where it has a row
    for each token, padding left out; else examples. `sqnr_db` is in decibels, inf for equal
    outputs; `kl` in nats; cosine, `top1_agreement` and `accuracy` are shares of 1. `classification`
    is the candidate's report by class, `decoded` what it is worth where it reads token by token.
    None is what doesn't apply; `notes` say why where it could surprise.
    """

    output: str
    batches: int
    rows: int
    sqnr_db: float
    cosine_mean: float | None = None
    cosine_min: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    perplexity: Pair | None = None
    accuracy: Pair | None = None
    classification: Mapping[str, Mapping[str, float]] | None = None
    metrics: Mapping[str, Pair] = field(default_factory=dict)
    decoded: Decoded | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        figures: list[tuple[str, str | Pair | None]] = [
            ("SQNR", f"{self.sqnr_db:.1f} dB"),
            ("cosine, mean", _figure(self.cosine_mean)),
            ("cosine, least", _figure(self.cosine_min)),
            ("KL", _figure(self.kl, " nats")),
            ("top-1 agreement", _figure(self.top1_agreement)),
            ("perplexity", self.perplexity),
            ("accuracy", self.accuracy),
            *self.metrics.items(),
        ]
        lines = [f"fidelity of {self.output}: {self.rows} rows in {self.batches} batches"]
        lines += [f"  {name:<16}{text}" for name, text in figures if text is not None]
        if self.decoded is not None:
            lines.append(f"  of {self.decoded.tokens} tokens that were read one by one:")
            lines += [f"    {name:<14}{text}" for name, text in self.decoded.figures()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def fidelity(
    reference: Model,
    candidate: Model,
    data: Iterable[Any],
    *,
    metric: Metrics | None = None,
    labels: Iterable[Any] | None = None,
    one_by_one: int | None = None,
) -> Fidelity:
    """Compare `candidate` with `reference` on `data`, one batch at a time, sums in float64.

    Models are modules (put in eval mode for this) or any callables; batches are tensors, tuples of
    positional or dicts of keyword arguments. Compared are the `logits` of what the models return,
    or else the first floating-point tensor. SQNR is over all entries, cosine by row: the last axis
    of an output of two or three axes; both in the worst part where sentinels or the like stand
    apart (`fxopt.parts`). Rows of padding, by the batch's `attention_mask`, are left out. KL of the
    softmax and agreement of the largest entry are taken of logits, and of outputs of two or three
    axes that have no name.

    For a causal language model, perplexity of both: the labels are the batch's `input_ids`, each
    predicted from those before it, within the mask. For a classifier, `labels` gives the classes
    of each batch (-100: not judged), or each batch its own as a dict entry `labels`; with them come
    the accuracy of both and the candidate's report by class, from scikit-learn (extra `report`).

    `metric` is a function of a model and `data`, returning a number or a dict of numbers, or a
    dict of such functions; it is asked for both models, so `data` must bear being iterated again.

    With `one_by_one`, the candidate, a causal language model of transformers or what
    `fxopt.transform` makes of it, also reads the last so many tokens of each text one by one, and
    their logits are compared in `decoded` with those of the reference on the whole text.

    Raises `MeasureError` for data or labels that can't be used, outputs of different shapes, and
    a metric that returns no number.
    """
    return fidelity_all(
        reference,
        {"candidate": candidate},
        data,
        metric=metric,
        labels=labels,
        one_by_one=one_by_one,
    )["candidate"]


def fidelity_all(
    reference: Model,
    candidates: Mapping[str, Model],
    data: Iterable[Any],
    *,
    metric: Metrics | None = None,
    labels: Iterable[Any] | None = None,
    one_by_one: int | None = None,
    failed: Failed | None = None,
) -> dict[str, Fidelity]:
    """`fidelity` of each of `candidates`, for which the reference is run once on each batch, also
    where it is itself among them.

    With `failed`, a candidate that raises is left out and told to it as `failed(name, error)`.
    """
    metrics = usable_metrics(metric)
    _check_data(data, bool(metrics))
    if one_by_one is not None and (type(one_by_one) is not int or one_by_one < 1):
        raise MeasureError(
            f"one_by_one={one_by_one!r}: give how many tokens of each text are read one by one"
        )
    task = _Task(is_causal(reference))
    judges = {
        name: _Judge(name, model, task, model is reference, one_by_one)
        for name, model in candidates.items()
    }
    batches = 0
    with judging([reference, *candidates.values()]):
        for index, (batch, truth) in enumerate(_labelled(data, labels)):
            seen = _Seen(index, batch, truth, *main_output(call(reference, batch), "the reference"))
            task.add(seen, seen.output)
            _step(judges, failed, partial(_Judge.add, seen=seen))
            batches += 1
        if not batches:
            raise MeasureError(
                "data gave no batch at all. Give an iterable of inputs, each a tensor, a tuple or "
                "a dict; a generator that was used up before gives nothing."
            )
        own = scores(metrics, reference, data, "the reference")
        _step(judges, failed, partial(_Judge.score, metrics=metrics, data=data, own=own))
    return {name: judge.fidelity() for name, judge in judges.items()}


@dataclass(frozen=True)
class _Seen:
    """A batch, its labels, and what the reference made of it."""

    index: int
    batch: Any
    truth: Any
    name: str
    output: Tensor

    @property
    def has_logits(self) -> bool:
        return self.name == "logits" or (self.name == PLAIN and self.output.ndim in (2, 3))


class _Task:
    """Where the truth is known: the next token, or the class."""

    def __init__(self, causal: bool) -> None:
        self.causal = causal
        self.tokens, self.classes = NextToken(), Classes()
        self.ignored = False

    def add(self, seen: _Seen, output: Tensor) -> None:
        if not seen.has_logits:
            self.ignored |= seen.truth is not None
            return
        shape, mask = output.shape[:-1], padding_mask(seen.batch, output)
        ids = seen.batch.get("input_ids") if isinstance(seen.batch, Mapping) else seen.batch
        if self.causal and isinstance(ids, Tensor) and ids.shape == shape and output.ndim == 3:
            truth = ids if seen.truth is None else seen.truth
            self.tokens.add(output, checked_labels(truth, shape, seen.index), mask)
        elif seen.truth is not None:
            check_reports()
            self.classes.add(output, checked_labels(seen.truth, shape, seen.index))


class _Judge:
    """One candidate: what its outputs have come to so far."""

    def __init__(
        self,
        name: str,
        model: Model,
        reference: _Task,
        is_reference: bool,
        one_by_one: int | None,
    ) -> None:
        self.name, self.model, self.reference = name, model, reference
        self.is_reference = is_reference
        self.task = _Task(reference.causal)
        self.agreement = Agreement()
        self.output = ""
        self.batches = 0
        self.has_logits = False
        self.metrics: dict[str, Pair] = {}
        self.unread = why_unreadable(model) if one_by_one is not None else None
        forced = one_by_one is not None and self.unread is None
        self.forcing = Forcing(one_by_one) if forced and one_by_one is not None else None

    def add(self, seen: _Seen) -> None:
        output = seen.output
        if not self.is_reference:
            _, output = main_output(call(self.model, seen.batch), self.name)
        if output.shape != seen.output.shape:
            raise MeasureError(
                f"{self.name} returned {list(output.shape)} for batch {seen.index} where the "
                f"reference returned {list(seen.output.shape)} as its {seen.name}; only outputs "
                "of one shape can be compared"
            )
        output = output.to(seen.output.device)
        mask = padding_mask(seen.batch, output)
        self.agreement.add(rows(seen.output, mask), rows(output, mask))
        self.task.add(seen, output)
        if self.forcing is not None:
            self.forcing.add(self.model, seen.batch, seen.index, seen.output, output)
        self.output, self.batches, self.has_logits = seen.name, seen.index + 1, seen.has_logits

    def score(
        self, metrics: Mapping[str, Metric], data: Iterable[Any], own: Mapping[str, float]
    ) -> None:
        found = own if self.is_reference else scores(metrics, self.model, data, self.name)
        self.metrics = {name: Pair(own[name], found[name]) for name in own if name in found}

    def fidelity(self) -> Fidelity:
        seen, task, reference = self.agreement, self.task, self.reference
        accuracy = Pair.of(reference.classes.accuracy, task.classes.accuracy)
        return Fidelity(
            self.output,
            self.batches,
            seen.rows + seen.broken,
            seen.sqnr_db,
            cosine_mean=seen.cosine_mean,
            cosine_min=seen.cosine_min,
            kl=seen.kl if self.has_logits else None,
            top1_agreement=seen.top1 if self.has_logits else None,
            perplexity=Pair.of(reference.tokens.perplexity, task.tokens.perplexity),
            accuracy=accuracy,
            classification=task.classes.report() if accuracy else None,
            metrics=self.metrics,
            decoded=None if self.forcing is None else self.forcing.decoded(),
            notes=_notes(seen, reference.ignored, self.unread),
        )


def _step(judges: dict[str, _Judge], failed: Failed | None, step: Callable[[_Judge], None]) -> None:
    """Take `step` with each judge; drop those that raise, where someone wants to know."""
    for name, judge in list(judges.items()):
        try:
            step(judge)
        except Exception as error:
            if failed is None:
                raise
            del judges[name]
            failed(name, error)


def _labelled(data: Iterable[Any], labels: Iterable[Any] | None) -> Iterator[tuple[Any, Any]]:
    """Batches, each with its labels: those given, or its own."""
    if labels is None:
        for batch in data:
            yield batch, batch.get("labels") if isinstance(batch, Mapping) else None
        return
    missing = object()
    for index, (batch, truth) in enumerate(zip_longest(data, labels, fillvalue=missing)):
        if batch is missing or truth is missing:
            fewer = "data" if batch is missing else "labels"
            raise MeasureError(
                f"{fewer} ended after {index} batches and the other went on: labels= gives one "
                "tensor of class numbers for each batch of data"
            )
        yield batch, truth


def _check_data(data: Any, again: bool) -> None:
    check_batches(data, "data", MeasureError, "a list, a DataLoader")
    if again and iter(data) is data:
        raise MeasureError(
            f"data is read again for the metric, and a {type(data).__name__} can be read once "
            "only. Give a list or a DataLoader."
        )


def _notes(seen: Agreement, labels_ignored: bool, unread: str | None) -> tuple[str, ...]:
    notes = []
    if seen.broken:
        notes.append(f"the candidate holds NaN or infinity in {seen.broken} rows")
    if seen.blind:
        notes.append(
            f"{seen.blind} rows are left out: the reference itself holds NaN or infinity there"
        )
    if len(seen.tallies) > 1:
        figures = ", ".join(f"{one.db:.1f} dB up to {one.high:.3g}" for one in seen.tallies)
        notes.append(
            f"the entries stand apart by magnitude in {len(seen.tallies)} parts ({figures}); SQNR "
            "and cosine are those of the worst"
        )
    if labels_ignored:
        notes.append("the labels were not used: what is compared are no logits")
    if unread is not None:
        notes.append(f"not read token by token: {unread}")
    return tuple(notes)


def _figure(value: float | None, unit: str = "") -> str | None:
    return None if value is None else f"{value:.6g}{unit}"
