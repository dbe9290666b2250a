"""Memory of a listing: what is in use at a time lies apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.executor import instructions
from fxopt.executor.arrays import Array, Buffer
from fxopt.executor.instructions import Kind, Listing, own


@st.composite
def listings(draw: st.DrawFn) -> Listing:
    """Instructions that make own memory or results of operators, and read what was made before."""
    listing, made = Listing(), []
    for _ in range(draw(st.integers(1, 25))):
        read = [draw(st.sampled_from(made)) for _ in range(draw(st.integers(0, 3))) if made]
        if draw(st.booleans()):
            array = own((draw(st.integers(1, 40)),))
            listing.add(Kind.MAP, 1, array, *read)
        else:
            array = Array(Buffer("result"), (1,), (1,), torch.float32)
            listing.add(Kind.OPERATOR_CALL, array.buffer, *read)
        made.append(array)
    return listing


def overlaps(listing: Listing) -> list[tuple[int, int]]:
    """Pairs of instructions whose memory is the same while both are still read."""
    size, results = instructions._placed(listing.instructions)
    named = [
        [b for word in one if (b := instructions._buffer(word)) is not None]
        for one in listing.instructions
    ]
    spans = {}
    for index, buffers in enumerate(named):
        for buffer in buffers:
            first, _ = spans.get(buffer, (index, index))
            spans[buffer] = (first, index)
    found = []
    for a, (a_first, a_last) in spans.items():
        assert a.offset + a.size <= size
        assert a.place == "own" or a.index < results
        for b, (b_first, b_last) in spans.items():
            if a is b or a.place != b.place or a_last < b_first or b_last < a_first:
                continue
            if a.place == "result":
                apart = a.index != b.index
            else:
                apart = a.offset + a.size <= b.offset or b.offset + b.size <= a.offset
            if not apart:
                found.append((a_first, b_first))
    return found


@given(listings())
def test_what_is_in_use_lies_apart(listing: Listing) -> None:
    assert not overlaps(listing)


def test_memory_is_used_again() -> None:
    listing = Listing()
    before = own((1000,))
    for _ in range(10):
        after = own((1000,))
        listing.add(Kind.MAP, 1, after, before)
        before = after
    size, _ = instructions._placed(listing.instructions)
    assert size < 4 * 4096


def test_a_gap_that_is_too_small_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    gap = instructions._gap
    monkeypatch.setattr(instructions, "_gap", lambda taken, size: gap(taken, size // 2))
    listing = Listing()
    kept = [own((size,)) for size in (64, 16, 64)]
    listing.add(Kind.MAP, 1, *kept)
    listing.add(Kind.MAP, 1, kept[0], kept[2], own((32,)))
    assert overlaps(listing)


def test_words_are_numbers_and_places() -> None:
    listing = Listing(constants=[2, 0.5])
    result = own((3,))
    given = Array(Buffer("input", 1), (3,), (1,), torch.float32, offset=2)
    listing.add(Kind.MAP, 7, 0.25, result, given, None)
    listing.outputs.append(Array(Buffer("output"), (3,), (1,), torch.float32))
    words = listing.encoded(inputs=2, held=4).tolist()
    assert words[:6] == [12, 0, 1, 1, 3, 1]
    assert words[6:8] == [0, 7]
    assert words[9:] == [0, 0, 3, 8, -1, 0]
    assert torch.tensor([words[8]]).view(torch.float64).item() == 0.25
    constants = listing.constants_encoded()
    assert constants[0] == 2
    assert constants[1:].view(torch.float32)[0] == 0.5
