"""A model as a step: the same modules, and what it can't hold is said."""

from __future__ import annotations

import contextvars
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxopt.errors import ModelError
from fxopt.generation import generation_plan
from fxopt.generation.seam import ATTENTION, StepCache, active, attention, step_of
from tests.generation.language_models import language_model


def test_a_step_shares_everything_and_leaves_the_model() -> None:
    model = language_model("Llama")
    before = model.config._attn_implementation
    step = step_of(model)
    assert step is step_of(model)
    assert dict(step.named_parameters()) == dict(model.named_parameters())
    generation_plan(model)
    assert model.config._attn_implementation == before != ATTENTION


def test_a_step_lives_as_long_as_the_model() -> None:
    model = language_model("Llama")
    plan = generation_plan(model)
    held = weakref.ref(step_of(model).lm_head)
    assert plan.step() is step_of(model)
    del model
    gc.collect()
    assert plan.step() is None
    with pytest.raises(ModelError, match="the model of this plan is gone"):
        plan.many()
    assert held() is None


def _cache() -> StepCache:
    empty = torch.zeros(1, 1, 1, 4)  # [P, B, G, D]
    return StepCache(torch.zeros(1, 1).bool(), torch.ones(1, 2).bool(), [empty], [empty])


class _Attention(nn.Module):
    layer_idx = 0
    is_causal = True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.zeros(1, 1, 2, 3)}, "makes an attention mask of its own"),
        ({"is_causal": False}, "attends to later tokens too"),
        ({"position_bias": torch.zeros(1)}, "gives its attention position_bias"),
    ],
)
def test_attention_that_no_step_computes(options: dict[str, Any], message: str) -> None:
    cache = _cache()
    key = torch.zeros(1, 1, 2, 4)
    cache.update(key, key, 0)
    mask = options.pop("attention_mask", None)
    with pytest.raises(ModelError, match=message):
        _attend(cache, key, mask, **options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layer_types": ["chunked_attention"]}, "has chunked_attention, which hides slots"),
        ({"layer_types": ["sliding_attention"]}, "has a window that its attention isn't told of"),
        ({"sliding_window": 4096}, "has a window that its attention isn't told of"),
    ],
)
def test_windows_that_short_text_would_not_show(config: dict[str, Any], message: str) -> None:
    module = _Attention()
    module.config = SimpleNamespace(**config)
    cache, key = _cache(), torch.zeros(1, 1, 2, 4)
    cache.update(key, key, 0)
    with pytest.raises(ModelError, match=message):
        _attend(cache, key, None, module)


def test_attention_to_other_keys_than_the_caches() -> None:
    with pytest.raises(ModelError, match="attends to other keys than those it gives to the cache"):
        _attend(_cache(), torch.zeros(1, 1, 2, 4), None)


def _attend(
    cache: StepCache,
    key: Tensor,
    mask: Tensor | None,
    module: nn.Module | None = None,
    **options: Any,
) -> None:
    context = contextvars.copy_context()
    context.run(active.set, cache)
    context.run(attention, module or _Attention(), key, key, key, mask, **options)
