"""A model that changes its own Python attributes: harmless, or state that a graph can't keep."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from fxopt.capture import attributes_kept
from fxopt.errors import CaptureError
from fxopt.interpreter import same_draws
from fxopt.program import Program
from fxopt.verify.oracle import call_model, state_kept

_NAMED = 4


def note_on_attributes(model: nn.Module, program: Program, changed: Collection[str]) -> str:
    """A note on the attributes that a call of `model` has `changed` and put back.

    Raises `CaptureError` where a second call, made upon them, answers otherwise than the first: the
    model keeps state there.
    """
    names = ", ".join(sorted(changed)[:_NAMED])
    more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
    call = call_model(model, program)
    answers: list[list[Tensor]] = []
    with attributes_kept(model):
        for _ in range(2):
            inputs = [tensor.clone() for tensor in program.example]
            with state_kept(program), same_draws():
                answers.append([output.detach().clone() for output in call(inputs)])
    if len(answers[0]) != len(answers[1]) or not all(map(_equal, *answers)):
        raise CaptureError(
            f"{program.name} keeps state in Python attributes ({names}{more}): a second call with "
            "the same inputs answers otherwise than the first, and a graph can't keep such state. "
            "Register it with self.register_buffer and write it in place (self.count.add_(1)), or "
            "take it as an input and return it."
        )
    return f"forward sets {names}{more} on the model; calls of the result don't"


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, equal_nan=True)
