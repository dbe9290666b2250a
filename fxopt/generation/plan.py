"""How a model that generates is transformed: as a step, on text, into what `generate` takes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import InputError, ModelError
from fxopt.generation.examples import (
    ROWS,
    Reader,
    StepBatches,
    first_tokens,
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
from fxopt.generation.seam import Int8Step, Step, step_of

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
        return None if model is None else step_of(model, Int8Step if self.int8_cache else Step)

    def many(self, prompts: Any = None) -> dict[str, Any]:
        """The inputs of a step that reads many tokens of `prompts`, or of the plan's text."""
        return reading_many(*self._example(prompts))

    def one(self, prompts: Any = None) -> dict[str, Any]:
        """The inputs of a step that reads one token, the last of each row."""
        return reading_one(*self._example(prompts))

    def others(self, prompts: Any = None) -> tuple[dict[str, Any], ...]:
        """The inputs of the programs that take other arguments than a step that reads tokens."""
        return ()

    def steps(self, prompts: Any) -> tuple[dict[str, Any], ...]:
        """The inputs of all programs on `prompts`."""
        return (self.many(prompts), self.one(prompts), *self.others(prompts))

    def resized(self) -> tuple[dict[str, Any], ...]:
        """The inputs of both kinds of step at other sizes, out of the plan's text."""
        return reading_resized(self.present(), self.kept, self.text, self.seen)

    def batches(self, calibration: Iterable[Any] | None) -> Iterable[Any] | None:
        """Calibration texts as what steps are given."""
        return None if calibration is None else StepBatches(self.kept, again(calibration))

    def alike(self, inputs: Mapping[str, Any], given: Iterable[Any]) -> Iterable[Any]:
        """Those of the `given` inputs that the program which takes `inputs` may take."""
        return given

    def present(self) -> nn.Module:
        """The step; `ModelError` where the model is gone."""
        step = self.step()
        if step is None:
            raise ModelError("the model of this plan is gone: keep it while it is transformed")
        return step

    def reader(self) -> Reader:
        """What reads the plan's text from its beginning as the original does."""
        model = self.model()
        assert model is not None
        return Reader(step_of(model), self.shapes)

    def call(
        self, text: Tensor, seen: Tensor, start: int = 0, rows: slice = slice(None)
    ) -> dict[str, Tensor]:
        """How a model is asked for the logits of `text` [B, T] from slot `start` on.

        The text is that of `rows` of the plan's.
        """
        return {
            "input_ids": text[:, start:],
            "attention_mask": seen.long(),
            "position_ids": positions_of(seen)[:, start:],
        }

    def room(self) -> int | None:
        """How many tokens a text may have where that is few; None where it is plenty."""
        return None

    def check(self) -> None:
        """Raise `ModelError` where steps, of many tokens and of one, aren't the model itself."""
        model: Any = self.model()
        text, seen = self.text, self.seen
        own = model(**self.call(text, seen), use_cache=False).logits
        middle = text.shape[1] // 2
        reader = self.reader()
        logits = [reader.read(text[:, :middle], seen[:, :middle])]
        for at in range(middle, text.shape[1]):
            logits.append(reader.read(text[:, at : at + 1], seen[:, at : at + 1]))
        off = (torch.cat(logits, 1) - own)[seen].abs().max()
        close = _CLOSE_INT8 if is_int8(self.shapes) else _CLOSE
        if not off <= close * own[seen].abs().max():
            raise ModelError(
                f"{type(model).__name__} computes something else step by step ({float(off):.3g} "
                "off): its attention does more than attend to keys and values"
            )

    def _example(self, prompts: Any) -> tuple[Reader, Tensor, Tensor]:
        """A new reader and the text that it is to read, and what of that is seen."""
        text, seen = (self.text, self.seen) if prompts is None else text_of(prompts)
        return Reader(self.present(), self.kept), text, seen


def again(batches: Iterable[Any]) -> Iterable[Any]:
    """`batches` as what can be iterated for each program, and for each pass that learns."""
    return list(batches) if iter(batches) is batches else batches


def decoder_plan(model: nn.Module, prompts: Any = None) -> GenerationPlan:
    """How a decoder is stepped; tried on `prompts`, or on text of its own.

    Raises `ModelError` where no step computes what it computes.
    """
    with torch.no_grad():
        shapes = layer_shapes(model)
        step = step_of(model)
        with stumbling_refused(model):
            ids = torch.zeros(1, 2, dtype=torch.int64, device=device_of(model))
            Reader(step, shapes).read(ids)
        if prompts is None:
            text = own_text(Reader(step, shapes), first_tokens(model))
            seen = torch.ones_like(text, dtype=torch.bool)
        else:
            text, seen = text_of(prompts)
            check_length(text)
            if len(text) == 1:  # a size of 1 would be one of its own
                text, seen = text.repeat(ROWS, 1), seen.repeat(ROWS, 1)
        plan = GenerationPlan(weakref.ref(model), shapes, text, seen, "unknown")
        plan.check()
        return replace(plan, positions=_positions_of(model, text))


def check_length(text: Tensor) -> None:
    """Raise `InputError` for text [B, T] of which no token is read behind others."""
    if text.shape[1] < 3:
        raise InputError(
            f"the text has {text.shape[1]} tokens: give one of 3 or more, so that some are "
            "read behind others"
        )


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


@contextmanager
def stumbling_refused(model: nn.Module) -> Iterator[None]:
    """Within, `ModelError` where `model` can't be called as a step at all."""
    try:
        yield
    except (ModelError, InputError):
        raise
    except Exception as error:  # a model's own code raises whatever it stumbles over
        raise ModelError(
            f"{type(model).__name__} doesn't attend through the attention interface of "
            f"transformers: {type(error).__name__}: {error!s:.200}"
        ) from error
