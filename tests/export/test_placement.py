"""A scale placed the way ONNX reads it scales the same numbers as broadcasting it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.export.placement import Placement, place

sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@st.composite
def scaled(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Sizes of a tensor and of a scale that broadcasts against it."""
    whole = draw(sizes)
    kept = draw(st.lists(st.booleans(), min_size=len(whole), max_size=len(whole)))
    scale = [size if keep else 1 for size, keep in zip(whole, kept, strict=True)]
    drop = draw(st.integers(0, len(whole)))
    return whole, scale[drop if all(size == 1 for size in scale[:drop]) else 0 :]


def as_onnx_reads(placed: Placement, q: Tensor, scale: Tensor) -> Tensor:
    """DequantizeLinear's definition."""
    if placed.kind == "tensor":
        return q * scale.reshape(())
    if placed.kind == "axis":
        return (q.movedim(placed.axis, -1) * scale.reshape(-1)).movedim(-1, placed.axis)
    return q * scale.repeat_interleave(placed.block, placed.axis)


@given(scaled())
def test_same_numbers_as_broadcasting(drawn: tuple[list[int], list[int]]) -> None:
    whole, shape = drawn
    q = torch.randint(-127, 128, whole).double()
    scale = torch.rand(shape, dtype=torch.float64) + 0.1
    placed = place(whole, shape)
    if placed is not None:
        assert torch.equal(as_onnx_reads(placed, q, scale), q * scale)
    elif len(shape) == len(whole):
        assert sum(size != 1 for size in shape) > 1


def test_the_forms_of_weights_and_activations() -> None:
    assert place([None, None, 32], []) == Placement("tensor")
    assert place([96, 32], [96, 1]) == Placement("axis", 0)
    assert place([6, 3, 8], [6, 3, 1]) == Placement("blocks", 2, 8)
    assert place([None, None, 32], [None, None, 1]) is None
    assert place([4, 4, 4], [4, 1, 4, 1]) is None
