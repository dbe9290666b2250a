"""How an encoder-decoder is transformed: its decoder as a step, told of a source that it reads.

The source is text, ids with a mask, or what is heard, features. What the decoder writes about it is
the text on which steps are tried.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from fxopt.capture import decoder_start, derive_inputs
from fxopt.errors import InputError, ModelError
from fxopt.generation.examples import OWN_LENGTH, ROWS, Reader, own_text
from fxopt.generation.plan import GenerationPlan, again, check_length, stumbling_refused
from fxopt.generation.prefix import LayerShape, device_of
from fxopt.generation.seam import step_of
from fxopt.generation.seq2seq_step import Seq2SeqStep

TEXT, SOUND = "input_ids", "input_features"
_MASK, _WRITTEN = "attention_mask", "decoder_input_ids"


@dataclass(frozen=True)
class Seq2SeqPlan(GenerationPlan):
    """An encoder-decoder that is read step by step; `source` are the arguments of its encoder."""

    source: Mapping[str, Tensor] = field(default_factory=dict)

    def with_int8_cache(self) -> GenerationPlan:
        """Nothing: raises `ModelError`."""
        raise ModelError(
            f"{type(self.model()).__name__} has an encoder and a decoder, and a cache in int8 is "
            "of decoders alone: leave QuantizeCache out"
        )

    def resized(self) -> tuple[dict[str, Any], ...]:
        """None of the plan's own: other sizes of all inputs are drawn as for any program."""
        return ()

    def reader(self) -> Reader:
        """What reads the plan's text from its beginning as the original does."""
        return self._example(None)[0]

    def step(self) -> nn.Module | None:
        """The model as the step of an encoder-decoder, while it is there."""
        model = self.model()
        return None if model is None else step_of(model, Seq2SeqStep)

    def others(self, prompts: Any = None) -> tuple[dict[str, Any], ...]:
        """What the encoder is given, and what makes keys and values of what it gives."""
        source = self.source if prompts is None else self._source_and_text(prompts)[0]
        given = encoder_arguments(source)
        with torch.no_grad():
            return given, {"hidden": self.present()(**given)}

    def batches(self, calibration: Iterable[Any] | None) -> Iterable[Any] | None:
        """Calibration sources, each as what every program is given."""
        return None if calibration is None else _Seq2SeqBatches(self, again(calibration))

    def alike(self, inputs: Mapping[str, Any], given: Iterable[Any]) -> Iterable[Any]:
        """Those of the `given` inputs that are arguments of the same names."""
        return _Alike(frozenset(inputs), given)

    def call(
        self, text: Tensor, seen: Tensor, start: int = 0, rows: slice = slice(None)
    ) -> dict[str, Tensor]:
        """How a model is asked for the logits of `text` [B, T], about `rows` of the source."""
        return {
            **{name: tensor[rows] for name, tensor in self.source.items()},
            "decoder_input_ids": text[:, start:],
            "decoder_attention_mask": seen.long(),
        }

    def room(self) -> int | None:
        """How many positions the decoder has."""
        return _positions(self.model())

    def _example(self, prompts: Any) -> tuple[Reader, Tensor, Tensor]:
        source, text = self.source, self.text
        if prompts is not None:
            source, text = self._source_and_text(prompts)
        told = crossed(self.present(), encoder_arguments(source))
        return (
            Reader(self.present(), self.shapes, told),
            text,
            torch.ones_like(text, dtype=torch.bool),
        )

    def _source_and_text(self, prompts: Any) -> tuple[Mapping[str, Tensor], Tensor]:
        model = self.model()
        assert model is not None
        source, text = source_of(model, prompts)
        if text is None:
            text = _own_text(model, self.present(), self.shapes, source)
        return source, text


@dataclass(frozen=True)
class _Seq2SeqBatches:
    """Calibration sources as what the programs of a plan are given, one after the other."""

    plan: Seq2SeqPlan
    batches: Iterable[Any]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.batches:
            source, text = self.plan._source_and_text(batch)
            whole = {**source, _WRITTEN: text}
            yield self.plan.many(whole)
            yield from self.plan.others(whole)


@dataclass(frozen=True)
class _Alike:
    """Those of the `given` inputs that have these names."""

    names: frozenset[str]
    given: Iterable[Any]

    def __iter__(self) -> Iterator[Any]:
        return (one for one in self.given if frozenset(one) == self.names)


def seq2seq_plan(model: nn.Module, prompts: Any = None) -> Seq2SeqPlan:
    """How an encoder-decoder is stepped; tried on `prompts`, or on sources that are drawn.

    Raises `ModelError` where no step computes what it computes.
    """
    _check_kind(model)
    with torch.no_grad():
        if prompts is None:
            derived: dict[str, Any] = derive_inputs(model)
            prompts = {name: one for name, one in derived.items() if name != _WRITTEN}
        source, text = source_of(model, prompts)
        if len(source[main_input(model)]) == 1:  # a size of 1 would be one of its own
            source = {name: one.repeat_interleave(ROWS, 0) for name, one in source.items()}
            text = None if text is None else text.repeat(ROWS, 1)
        shapes = _layer_shapes(model, source)
        with stumbling_refused(model):
            if text is None:
                text = _own_text(model, step_of(model, Seq2SeqStep), shapes, source)
            check_length(text)
            seen = torch.ones_like(text, dtype=torch.bool)
            plan = Seq2SeqPlan(weakref.ref(model), shapes, text, seen, "slots", source=source)
            plan.check()
    return plan


def main_input(model: Any) -> str:
    """What the encoder of `model` reads: `input_ids` or `input_features`."""
    name: str = model.main_input_name
    return name


def hears(model: object) -> bool:
    """Whether `model` is Whisper, whose `generate` is its own."""
    return isinstance(model, WhisperGenerationMixin)


def source_of(model: nn.Module, given: Any) -> tuple[dict[str, Tensor], Tensor | None]:
    """The arguments of the encoder of `model` in what a user gives, and what was written about it.

    Raises `InputError` for anything else.
    """
    main = main_input(model)
    named = dict(given) if isinstance(given, Mapping) else {main: given}
    if isinstance(named.get(main), (tuple, list)) and len(named[main]) == 1:
        named[main] = named[main][0]
    wanted = (main, _MASK, _WRITTEN)
    others = [name for name in named if name not in wanted]
    main_given, text = named.get(main), named.get(_WRITTEN)
    ranks = {TEXT: 2, SOUND: 3}
    if not isinstance(main_given, Tensor) or main_given.dim() != ranks[main] or others:
        raise InputError(
            f"{type(model).__name__} generates from {main} and, where rows are padded, "
            f"attention_mask, with or without decoder_input_ids; not from "
            f"{', '.join(map(str, named)) or 'nothing'}"
            + (f" ({', '.join(others)} has no place)" if others else "")
            + ". With generation=False the graph answers single calls, with any arguments."
        )
    source = {main: main_given}
    if main == TEXT:  # what is heard has no padding: silence is heard as well
        mask = named.get(_MASK)
        source[_MASK] = torch.ones_like(main_given) if mask is None else mask.long()
    return source, text


def encoder_arguments(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arguments of a step that encodes, in place of the model's."""
    if SOUND in source:
        return {"source": source[SOUND]}
    return {"source": source[TEXT], "source_seen": source[_MASK].bool()}


def crossed(step: Any, given: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a decoder's steps are told of a source, of which the step that encodes is `given`."""
    with torch.no_grad():
        hidden = step(**given)
        keys, values = step(hidden=hidden)
    seen = given.get("source_seen")
    if seen is None:
        seen = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    return {"cross_seen": seen, "cross_keys": keys, "cross_values": values}


def _check_kind(model: Any) -> None:
    """Raise `ModelError` for a model whose `generate` does more than `GenerationMixin`'s."""
    kind = type(model).__name__
    if hears(model):
        return
    if getattr(model, "main_input_name", None) != TEXT:
        raise ModelError(
            f"{kind} reads {getattr(model, 'main_input_name', 'nothing known')}: of the models "
            "with an encoder and a decoder those that read text, and Whisper, are taken"
        )
    for name in ("generate", "prepare_inputs_for_generation"):
        if getattr(type(model), name, None) is not getattr(GenerationMixin, name):
            raise ModelError(f"{kind} has an encoder, a decoder and a {name} of its own")


def _layer_shapes(model: Any, source: Mapping[str, Tensor]) -> tuple[LayerShape, ...]:
    """What each layer of the decoder keeps of a slot, found by a call with one token."""
    if hasattr(model, "as_step"):
        return tuple(model.kept_shapes())
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    ids = torch.full((ROWS, 1), decoder_start(model), device=device_of(model))
    rows = {name: one[:ROWS] for name, one in source.items()}
    kind = type(model).__name__
    try:
        model(**rows, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
    except Exception as error:  # a model's own code raises whatever it stumbles over
        raise ModelError(f"{kind} doesn't take a cache of keys and values: {error}") from error
    held: list[Any] = [
        (getattr(one, "keys", None), getattr(one, "values", None))
        for one in cache.self_attention_cache.layers
    ]
    if not held or any(k is None or v is None or k.dim() != 4 for k, v in held):
        raise ModelError(f"{kind} keeps other state than keys and values of its layers")
    return tuple(LayerShape(k.shape[1], k.shape[3], v.shape[3], k.dtype) for k, v in held)


def _own_text(
    model: nn.Module,
    step: nn.Module,
    shapes: tuple[LayerShape, ...],
    source: Mapping[str, Tensor],
) -> Tensor:
    """What the model writes about `source`, in two thirds of its positions where these are few."""
    given = encoder_arguments(source)
    first = torch.full((len(given["source"]), 1), decoder_start(model), device=device_of(model))
    room = _positions(model)
    length = OWN_LENGTH if room is None else min(OWN_LENGTH, 2 * room // 3)
    return own_text(Reader(step, shapes, crossed(step, given)), first, length)


def _positions(model: Any) -> int | None:
    names = ("max_target_positions", "max_position_embeddings")
    found = [getattr(model.config, name, None) for name in names]
    return next((one for one in found if isinstance(one, int) and one > 0), None)
