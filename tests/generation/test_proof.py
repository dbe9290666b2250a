"""Faults of one slot, planted in the places where a cache can go wrong: each is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fxopt.generation.cache as caches
import fxopt.generation.proof as proof
import fxopt.optimized.generating as generating
from fxopt.claim import Close
from fxopt.errors import EquivalenceError, ModelError
from fxopt.generation import generation_plan, teacher_forced
from tests.generation.language_models import language_model, shared


def _late_positions(original: Callable[..., Any]) -> Callable[..., Any]:
    # Rotary positions are relative: what is off by one everywhere is right.
    return lambda self, given, seen, held: original(self, given, seen, held) + (held > 0)


def _blind(original: Callable[..., Any]) -> Callable[..., Any]:
    def seen(*args: Any) -> Any:
        found = original(*args)
        found[:, 0] = False
        return found

    return seen


def _short(original: Callable[..., Any]) -> Callable[..., Any]:
    def slots(cache: Any) -> Any:
        found = [[one.clone() for one in side] for side in original(cache)]
        for side in found:
            for one in side:
                one[-1] = 0.0
        return tuple(map(tuple, found))

    return slots


def _lost(original: Callable[..., Any]) -> Callable[..., Any]:
    def append(cache: Any, keys: Any, values: Any) -> None:
        original(cache, [key.flip(0) for key in keys], values)

    return append


FAULTS = {
    "position": (generating.Generating, "_positions", _late_positions),
    "mask": (generating, "seen_slots", _blind),
    "prefix": (caches.PrefixCache, "slots", _short),
    "append": (generating, "append", _lost),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_slot_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt = shared("Llama")
    plan = generation_plan(model)
    assert teacher_forced(plan, opt, Close()).agreed == 72
    where, what, broken = FAULTS[name]
    monkeypatch.setattr(where, what, broken(getattr(where, what)))
    with pytest.raises(EquivalenceError, match="read token by token, the result broke its claim"):
        teacher_forced(plan, opt, Close())


def test_growth_that_loses_a_slot_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt = shared("Llama")
    plan = generation_plan(model)
    monkeypatch.setattr(caches, "_LEAST", 1)
    monkeypatch.setattr(proof, "_STEPS", 30)  # the memory is that of twice the first 24
    original = caches.GrowingLayer._appended

    def shifted(self: Any, side: int, filled: Any, new: Any) -> Any:
        whole = original(self, side, filled, new)
        if filled.shape[2] and whole.data_ptr() != filled.data_ptr():
            whole[:, :, 0] = 0
        return whole

    assert teacher_forced(plan, opt, Close()).agreed == 108
    monkeypatch.setattr(caches.GrowingLayer, "_appended", shifted)
    with pytest.raises(EquivalenceError, match="errors in keys and values have added up"):
        teacher_forced(plan, opt, Close())


def test_a_model_that_reads_ahead_is_no_step() -> None:
    model = language_model("Llama")
    inner = model.model.layers[0].mlp.forward

    def ahead(x: torch.Tensor) -> torch.Tensor:
        return inner(x) + x.mean(1, keepdim=True)

    model.model.layers[0].mlp.forward = ahead
    with pytest.raises(ModelError, match="computes something else step by step"):
        generation_plan(model)
