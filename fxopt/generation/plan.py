"""How a model that generates is transformed: as a step, on text, into what `generate` takes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import InputError, ModelError
from fxopt.generation.examples import (
    Reader,
    StepBatches,
    own_text,
    reading_many,
    reading_one,
    reading_resized,
    text_of,
)
from fxopt.generation.prefix import (
    LayerShape,
    Positions,
    device_of,
    is_int8,
    layer_shapes,
    positions_of,
)
from fxopt.generation.seam import step_of

_CLOSE, _CLOSE_INT8 = 1e-3, 1e-1
"""How far a step's logits may be from the model's own, relative to the largest of these, and where
the cache of a transformed one rounds."""


@dataclass(frozen=True)
class GenerationPlan:
    """A model that is read step by step, and the text [B, T] on which it is tried.

    `seen` [B, T] is false where the text is padding; `shapes` says what the layers keep of a slot,
    `positions` what the model makes of padding where a call gives no `position_ids`. With
    `int8_cache` the steps are given their prefix in int8.
    The plan doesn't keep the model: its step is there for as long as somebody holds it.
    """

    model: weakref.ref[nn.Module]
    shapes: tuple[LayerShape, ...]
    text: Tensor
    seen: Tensor
    positions: Positions
    int8_cache: bool = False

    @property
    def kept(self) -> tuple[LayerShape, ...]:
        """What the cache keeps of a slot."""
        if not self.int8_cache:
            return self.shapes
        return tuple(replace(one, dtype=torch.int8) for one in self.shapes)

    def with_int8_cache(self) -> GenerationPlan:
        """This plan with steps that are given their prefix in int8.

        Raises `ModelError` for a model that was transformed without it.
        """
        model = self.model()
        if hasattr(model, "as_step") and not is_int8(self.shapes):
            raise ModelError(
                f"{type(model).__name__} is transformed already, with a cache in floating point; "
                "QuantizeCache goes into the list with which the original is transformed"
            )
        return replace(self, int8_cache=True)

    def step(self) -> nn.Module | None:
        """The model as a step, while it is there: where further programs come from."""
        model = self.model()
        return None if model is None else step_of(model, self.int8_cache)

    def many(self, prompts: Any = None) -> dict[str, Any]:
        """The inputs of a step that reads many tokens of `prompts`, or of the plan's text."""
        return reading_many(self.present(), self.kept, *self._text(prompts))

    def one(self, prompts: Any = None) -> dict[str, Any]:
        """The inputs of a step that reads one token, the last of each row."""
        return reading_one(self.present(), self.kept, *self._text(prompts))

    def steps(self, prompts: Any) -> tuple[dict[str, Any], ...]:
        """The inputs of both kinds of step on `prompts`."""
        return self.many(prompts), self.one(prompts)

    def resized(self) -> tuple[dict[str, Any], ...]:
        """The inputs of both kinds of step at other sizes, out of the plan's text."""
        return reading_resized(self.present(), self.shapes, self.text, self.seen)

    def batches(self, calibration: Iterable[Any] | None) -> Iterable[Any] | None:
        """Calibration texts as what steps are given."""
        return None if calibration is None else StepBatches(self.kept, calibration)

    def present(self) -> nn.Module:
        """The step; `ModelError` where the model is gone."""
        step = self.step()
        if step is None:
            raise ModelError("the model of this plan is gone: keep it while it is transformed")
        return step

    def _text(self, prompts: Any) -> tuple[Tensor, Tensor]:
        return (self.text, self.seen) if prompts is None else text_of(prompts)


def generation_plan(model: nn.Module, prompts: Any = None) -> GenerationPlan:
    """How `model` is stepped; tried on `prompts`, or on text of its own.

    Raises `ModelError` where no step computes what it computes.
    """
    config: Any = getattr(model, "config", None)
    kind = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{kind} has an encoder and a decoder, and steps are of decoders alone")
    with torch.no_grad():
        shapes = layer_shapes(model)
        step = step_of(model)
        _check_call(model, step, shapes)
        if prompts is None:
            text = own_text(model, step, shapes)
            seen = torch.ones_like(text, dtype=torch.bool)
        else:
            text, seen = text_of(prompts)
            if text.shape[1] < 3:
                raise InputError(
                    f"the text has {text.shape[1]} tokens: give one of 3 or more, so that some are "
                    "read behind others"
                )
            if len(text) == 1:  # a size of 1 would be one of its own
                text, seen = text.repeat(2, 1), seen.repeat(2, 1)
        _check_steps(model, step, shapes, text, seen)
        positions = _positions_of(model, text)
    return GenerationPlan(weakref.ref(model), shapes, text, seen, positions)


def _positions_of(model: nn.Module, text: Tensor) -> Positions:
    """What `model` takes for the positions of text whose beginning is padding; tried."""
    seen = torch.ones_like(text, dtype=torch.bool)
    seen[:, 0] = False
    given: Any = {"input_ids": text, "attention_mask": seen.long(), "use_cache": False}
    own = model(**given).logits[seen]
    slots = torch.arange(text.shape[1], device=text.device).expand_as(text)
    candidates: dict[Positions, Tensor] = {"slots": slots, "seen": positions_of(seen)}
    for name, positions in candidates.items():
        found = model(**given, position_ids=positions).logits[seen]
        if torch.allclose(found, own, rtol=1e-5, atol=1e-6):
            return name
    return "unknown"


def _check_call(model: nn.Module, step: nn.Module, shapes: tuple[LayerShape, ...]) -> None:
    """Raise `ModelError` where `model` can't be called as a step at all."""
    try:
        ids = torch.zeros(1, 2, dtype=torch.int64, device=device_of(model))
        Reader(step, shapes).read(ids)
    except ModelError:
        raise
    except Exception as error:  # a model's own code raises whatever it stumbles over
        raise ModelError(
            f"{type(model).__name__} doesn't attend through the attention interface of "
            f"transformers: {type(error).__name__}: {error!s:.200}"
        ) from error


def _check_steps(
    model: nn.Module,
    step: nn.Module,
    shapes: tuple[LayerShape, ...],
    text: Tensor,
    seen: Tensor,
) -> None:
    """Raise `ModelError` where steps, of many tokens and of one, aren't the model itself."""
    own = model(
        input_ids=text,
        attention_mask=seen.long(),
        position_ids=positions_of(seen),
        use_cache=False,
    ).logits
    middle = text.shape[1] // 2
    reader = Reader(step, shapes)
    logits = [reader.read(text[:, :middle], seen[:, :middle])]
    for at in range(middle, text.shape[1]):
        logits.append(reader.read(text[:, at : at + 1], seen[:, at : at + 1]))
    off = (torch.cat(logits, 1) - own)[seen].abs().max()
    close = _CLOSE_INT8 if is_int8(shapes) else _CLOSE
    if not off <= close * own[seen].abs().max():
        raise ModelError(
            f"{type(model).__name__} computes something else step by step ({float(off):.3g} off): "
            "its attention does more than attend to keys and values"
        )
