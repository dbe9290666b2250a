"""Memory that grows, against transformers' cache that is copied at each token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from fxopt.generation.cache import GrowingLayer, PrefixCache, append, by_head


@given(st.data())
def test_a_growing_layer_is_a_dynamic_layer(data: st.DataObject) -> None:
    ours, theirs = GrowingLayer(), DynamicLayer()
    rows = data.draw(st.integers(1, 3))
    for _ in range(data.draw(st.integers(1, 12))):
        kinds = ["append", "append", "append", "crop", "reorder", "repeat", "select", "reset"]
        kind = data.draw(st.sampled_from(kinds))
        if kind == "append" or not theirs.get_seq_length():
            new = torch.randn(2, rows, 2, data.draw(st.integers(1, 90)), 3)
            for layer in (ours, theirs):
                layer.update(new[0], new[1])
        elif kind == "crop":
            count = data.draw(st.integers(0, theirs.get_seq_length() - 1))
            for layer in (ours, theirs):
                layer.crop(-count)
        elif kind == "reset":
            for layer in (ours, theirs):
                layer.reset()
            continue
        elif kind == "repeat" and rows < 4:
            rows *= 2
            for layer in (ours, theirs):
                layer.batch_repeat_interleave(2)
        else:
            order = torch.randint(rows, (rows,))
            for layer in (ours, theirs):
                (layer.reorder_cache if kind == "reorder" else layer.batch_select_indices)(order)
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_tokens_are_written_in_place() -> None:
    layer = GrowingLayer()
    layer.update(torch.randn(1, 2, 5, 3), torch.randn(1, 2, 5, 3))
    first = layer.keys
    for _ in range(50):
        layer.update(torch.randn(1, 2, 1, 3), torch.randn(1, 2, 1, 3))
    assert layer.keys.data_ptr() == first.data_ptr()
    assert layer.keys.shape == (1, 2, 55, 3)


def test_what_was_cropped_stays_for_who_holds_it() -> None:
    """What is appended after a crop is written over what was cropped, and not over copies."""
    layer = GrowingLayer()
    layer.update(torch.zeros(1, 1, 4, 1), torch.zeros(1, 1, 4, 1))
    copied = layer.keys.clone()
    layer.crop(-2)
    layer.update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    assert layer.keys.flatten().tolist() == [0, 0, 1]
    assert copied.flatten().tolist() == [0, 0, 0, 0]


KINDS = ("append", "append", "append", "update", "crop", "reorder", "select", "layer")


@given(st.data())
@pytest.mark.parametrize("int8", [False, True])
def test_all_layers_in_one_call_are_the_layers_one_by_one(int8: bool, data: st.DataObject) -> None:
    """Whatever is done to a cache or to one of its layers between two steps."""
    ours, theirs = PrefixCache(int8), PrefixCache(int8)
    rows = data.draw(st.integers(1, 3))
    for _ in range(data.draw(st.integers(1, 12))):
        kind = data.draw(st.sampled_from(KINDS)) if ours.layers else "append"
        if kind in ("append", "update"):
            new = torch.randn(2, 3, data.draw(st.integers(1, 40)), rows, 2, 4)
            append(ours, tuple(new[0]), tuple(new[1]))
            for index, (key, value) in enumerate(zip(new[0], new[1], strict=True)):
                theirs.update(by_head(key), by_head(value), index)
        elif kind == "crop":
            count = data.draw(st.integers(0, ours.get_seq_length() - 1))
            for cache in (ours, theirs):
                cache.crop(-count)
        elif kind == "layer":
            index = data.draw(st.integers(0, 2))
            for cache in (ours, theirs):
                held = cache.layers[index]
                for name in held.HELD:
                    setattr(held, name, getattr(held, name).clone())
        else:
            order = torch.randint(rows, (rows,))
            for cache in (ours, theirs):
                change = cache.reorder_cache if kind == "reorder" else cache.batch_select_indices
                change(order)
        for one, other in zip(ours.layers, theirs.layers, strict=True):
            for found, wanted in zip(one.held, other.held, strict=True):
                assert torch.equal(found, wanted)
        sides = [[by_head(one) for one in side] for side in ours.slots()]
        wanted = [[layer.held[i] for layer in theirs.layers] for i in range(len(sides))]
        torch.testing.assert_close(sides, wanted, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("int8", [False, True])
def test_a_step_is_written_in_place_in_all_layers(int8: bool) -> None:
    cache = PrefixCache(int8)
    append(cache, tuple(torch.randn(3, 5, 1, 2, 4)), tuple(torch.randn(3, 5, 1, 2, 4)))
    places = [one.data_ptr() for layer in cache.layers for one in layer.held]
    for step in range(1, 40):
        new = torch.randn(2, 3, 1, 1, 2, 4)
        append(cache, tuple(new[0]), tuple(new[1]))
        assert {side[0].shape[0] for side in cache.slots()} == {5 + step}
    assert [one.data_ptr() for layer in cache.layers for one in layer.held] == places
    assert [one.data_ptr() for side in cache.slots() for one in side] == [
        layer.held[i].data_ptr() for i in range(len(cache.slots())) for layer in cache.layers
    ]
