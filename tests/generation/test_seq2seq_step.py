"""An encoder-decoder as a step: the same modules, and what it can't hold is said."""

from __future__ import annotations

import contextvars
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxopt.errors import ModelError
from fxopt.generation import generation_plan
from fxopt.generation.seam import active, step_of
from fxopt.generation.seq2seq_step import (
    ATTENTION,
    Seq2SeqCache,
    Seq2SeqStep,
    has_distances,
    seq2seq_attention,
)
from tests.generation.seq2seq_models import seq2seq_model


def test_a_step_shares_everything_and_leaves_the_model() -> None:
    model = seq2seq_model("T5")
    parts = (model, model.encoder, model.decoder)
    before = [part.config._attn_implementation for part in parts]
    step = step_of(model, Seq2SeqStep)
    assert step is step_of(model, Seq2SeqStep)
    assert dict(step.named_parameters()) == dict(model.named_parameters())
    generation_plan(model)
    assert [part.config._attn_implementation for part in parts] == before
    assert ATTENTION not in before


def test_distances_are_found_by_their_weights() -> None:
    assert has_distances(seq2seq_model("T5"))
    assert not has_distances(seq2seq_model("BART"))


class _Attention(nn.Module):
    layer_idx = 0
    is_causal = True


def _cache(distances: bool = False) -> Seq2SeqCache:
    """Of one row, one head of 4, a prefix of one slot that isn't seen, and a source of three."""
    empty, source = torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 3, 4)
    seen = torch.ones(1, 2).bool()
    cache = Seq2SeqCache(
        ~seen[:, :1],
        seen,
        ((empty,), (empty,)),
        torch.tensor([[True, False, True]]),
        ((source,), (source * torch.tensor([1.0, 5.0, 3.0]).view(3, 1),)),
    )
    cache.distances = distances
    return cache


def _attend(
    cache: Seq2SeqCache, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any
) -> Tensor:
    module, query = _Attention(), torch.ones(1, 1, 2, 4)
    context = contextvars.copy_context()
    context.run(active.set, cache)
    return context.run(seq2seq_attention, module, query, key, value, mask, **options)[0]


def test_what_is_seen_of_a_source_is_attended_to() -> None:
    cache = _cache()
    (layer,) = cache.cross.layers
    attended = _attend(cache, layer.keys, layer.values)
    torch.testing.assert_close(attended, torch.full((1, 2, 1, 4), 2.0))


def test_a_bias_of_distances_counts_prefix_and_new_slots() -> None:
    cache = _cache(distances=True)
    new = torch.zeros(1, 1, 2, 4)
    keys, values = cache.update(new, torch.tensor([1.0, 3.0]).view(2, 1).expand(1, 1, 2, 4), 0)
    bias = torch.zeros(1, 1, 2, 3)
    bias[..., 0] = 100.0  # of the slot that isn't seen
    attended = _attend(cache, keys, values, position_bias=bias)
    torch.testing.assert_close(attended[0, :, 0, 0], torch.tensor([1.0, 2.0]))


def test_the_bias_of_later_layers_is_masked_once() -> None:
    cache, bias = _cache(distances=True), torch.zeros(1, 1, 2, 3)
    assert cache.mask(bias) is cache.mask(bias)
    assert cache.mask(bias.clone()) is not cache.mask(bias)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": torch.zeros(1, 1, 2, 3)}, "makes an attention mask of its own"),
        ({"position_bias": torch.zeros(1)}, "gives its attention position_bias"),
        ({"is_causal": False}, "attends to later tokens too"),
    ],
)
def test_attention_to_text_that_no_step_computes(options: dict[str, Any], message: str) -> None:
    cache = _cache()
    key, _ = cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    with pytest.raises(ModelError, match=message):
        _attend(cache, key, key, **options)


def test_attention_to_other_keys_and_biased_attention_to_the_source() -> None:
    key = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ModelError, match="attends to other keys than"):
        _attend(_cache(), key, key)
    with pytest.raises(ModelError, match="attends to other keys than"):
        _attend(_cache(distances=True), key, key, position_bias=torch.zeros(1))
    cache = _cache()
    (layer,) = cache.cross.layers
    with pytest.raises(ModelError, match="biases its attention to the source"):
        _attend(cache, layer.keys, layer.values, position_bias=torch.zeros(1))
