"""Views of memory by numbers are what torch makes of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.executor.arrays import Array, Buffer, contiguous, merged


def tensor_of(array: Array) -> torch.Tensor:
    """The entries of an array over memory that counts up."""
    return torch.arange(10_000).as_strided(array.sizes, array.strides, array.offset)


SIZES = st.lists(st.sampled_from([1, 1, 2, 3, 4, 6]), min_size=1, max_size=4)


@st.composite
def views(draw: st.DrawFn) -> Array:
    """An array that was permuted, cut and broadcast."""
    sizes = tuple(draw(SIZES))
    array = Array(Buffer("own"), sizes, contiguous(sizes), torch.float32)
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["permuted", "cut", "expanded"]))
        if kind == "permuted":
            array = array.permuted(draw(st.permutations(range(len(array.sizes)))))
        elif kind == "cut":
            axis = draw(st.integers(0, len(array.sizes) - 1))
            start = draw(st.integers(0, array.sizes[axis] - 1))
            step = draw(st.integers(1, 2))
            most = (array.sizes[axis] - start + step - 1) // step
            array = array.cut(axis, start, draw(st.integers(1, most)), step)
        else:
            array = array.expanded(
                (2, *(draw(st.integers(1, 3)) if size == 1 else size for size in array.sizes))
            )
    return array


@given(views(), st.data())
def test_a_view_in_other_sizes_is_torchs(array: Array, data: st.DataObject) -> None:
    tensor = tensor_of(array)
    count = tensor.numel()
    sizes = []
    while count > 1 and len(sizes) < 4:
        size = data.draw(st.sampled_from([n for n in range(1, count + 1) if count % n == 0]))
        sizes.append(size)
        count //= size
    wanted = (*sizes, *([count] if count > 1 or not sizes else []))
    found = array.viewed(wanted)
    try:
        expected = tensor.view(wanted)
    except RuntimeError:
        expected = None
    if found is None:
        assert expected is None
    else:
        assert torch.equal(tensor_of(found), tensor.reshape(wanted))


@given(views())
def test_axes_that_lie_together_are_one(array: Array) -> None:
    runs = merged(array.sizes, [array.strides])
    together = Array(
        array.buffer,
        tuple(size for size, _ in runs),
        tuple(steps[0] for _, steps in runs),
        array.dtype,
        array.offset,
    )
    assert torch.equal(tensor_of(together).flatten(), tensor_of(array).flatten())
    assert array.is_dense == tensor_of(array).is_contiguous()


@pytest.mark.parametrize(
    ("sizes", "strides", "count"),
    [
        ((2, 3, 4), (12, 4, 1), 1),
        ((2, 3, 4), (24, 4, 1), 2),
        ((2, 3), (0, 0), 1),
        ((1, 1), (5, 7), 0),
    ],
)
def test_how_many_runs_there_are(sizes, strides, count) -> None:  # type: ignore[no-untyped-def]
    assert len(merged(sizes, [strides])) == count
