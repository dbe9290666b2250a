"""Bags of ids: their number is a product of sizes, which a compiler must take at every shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt import wellformed
from fxopt.capture import capture
from fxopt.interpreter import evaluate
from tests.rewriting.functions import calls

IDS = 20


class Bags(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(IDS, 8, mode=mode)

    def forward(self, ids: Tensor) -> Tensor:
        bags: Tensor = self.bags(ids)
        return bags


@cache
def lowered(mode: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = Bags(mode).eval()
    example = torch.zeros(3, 5, dtype=torch.int64)
    return model, fxopt.transform(model, [fxopt.Lower()], example_inputs=example)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["mean", "sum", "max"]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.randoms(use_true_random=False),
)
def test_bags_of_any_shape(mode: str, rows: int, length: int, random: object) -> None:
    model, compiled = lowered(mode)
    generator = torch.Generator().manual_seed(random.randrange(1 << 30))  # type: ignore[attr-defined]
    ids = torch.randint(IDS, (rows, length), generator=generator)
    torch.testing.assert_close(compiled(ids), model(ids))


class Count(nn.Module):
    """The number of entries of x beside each of them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1) * x.numel()


@pytest.mark.parametrize("shape", [(), (4,), (3, 1), (2, 1, 5), (1, 1)])
def test_the_number_of_entries_is_the_product_of_the_sizes(shape: tuple[int, ...]) -> None:
    model = Count()
    program = capture(model, (torch.randn(shape),))
    wellformed.check(program)
    assert not [node for node in calls(program) if "numel" in str(node.target)]
    for sizes in (shape, tuple(size + (size > 1) for size in shape)):
        x = torch.randn(sizes)
        assert torch.equal(evaluate(program, (x,))[0], model(x))
