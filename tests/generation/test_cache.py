"""Memory that grows, against transformers' cache that is copied at each token."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from fxopt.generation.cache import GrowingLayer


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
