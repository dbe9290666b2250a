"""Arithmetic: counts are torch's own, and the cost of a cut is that of the smaller model."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel

from fxopt.analyses.arithmetic import Cost, CutCosts, cut_cost, flops, multiply_adds
from fxopt.analyses.channels import channels
from fxopt.capture import capture
from tests.captured import captured, case
from tests.rewriting.functions import program_of


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "cnn", "sequential", "whisper-encoder"])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    shared, program = case(name), captured(name)
    mode = FlopCounterMode(display=False)
    # Only attention that is written out is counted by torch on every backend.
    with mode, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.no_grad():
        shared.model(**shared.example)
    assert flops(program) == mode.get_total_flops()


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (torch.matmul, [(3, 2, 5), (5, 7)], 3 * 2 * 5 * 7),
        (torch.bmm, [(3, 2, 5), (3, 5, 7)], 3 * 2 * 5 * 7),
        (torch.mv, [(4, 6), (6,)], 24),
        (torch.dot, [(6,), (6,)], 6),
        (torch.baddbmm, [(3, 2, 7), (3, 2, 5), (3, 5, 7)], 3 * 2 * 5 * 7),
        (lambda a, b: torch.einsum("bik,bjk->bij", a, b), [(3, 2, 5), (3, 7, 5)], 3 * 2 * 7 * 5),
        (lambda a, b: torch.einsum("...k,jk->...j", a, b), [(3, 2, 5), (7, 5)], 3 * 2 * 7 * 5),
        (
            lambda x, w: nn.functional.conv1d(x, w, padding="same", groups=2),
            [(3, 4, 9), (6, 2, 3)],
            3 * 6 * 9 * 2 * 3,
        ),
        (
            lambda x, w: nn.functional.conv_transpose2d(x, w, stride=2),
            [(3, 4, 5, 5), (4, 6, 3, 3)],
            3 * 4 * 25 * 6 * 9,
        ),
        (
            nn.functional.scaled_dot_product_attention,
            [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)],
            2 * 3 * 5 * 7 * (4 + 6),
        ),
        (torch.add, [(3, 4), (3, 4)], 0),
    ],
)
def test_each_product(function: Any, shapes: list[tuple[int, ...]], expected: int) -> None:
    program = program_of(function, *(torch.randn(shape) for shape in shapes))
    assert sum(multiply_adds(program).values()) == expected


def test_counts_are_told_by_node() -> None:
    program = captured("mlp")
    counted = multiply_adds(program)
    assert set(counted) <= {node.name for node in program.graph.nodes}
    assert all(name.startswith("linear") for name in counted)


def llama(heads: int, key_heads: int, ffn: int) -> Any:
    config = LlamaConfig(
        hidden_size=72,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=6,
        intermediate_size=ffn,
        vocab_size=31,
        use_cache=False,
    )
    torch.manual_seed(0)
    inputs = {"input_ids": torch.arange(10).view(2, 5)}
    return capture(LlamaModel(config).eval(), inputs)


@functools.cache
def whole_llama() -> Any:
    return llama(12, 4, 20)


@settings(max_examples=8)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 20))
def test_the_cost_of_a_cut_is_that_of_the_smaller_model(keys: int, share: int, ffn: int) -> None:
    """Key heads, the query heads of each, and feed-forward channels, all at once."""
    dense = whole_llama()
    sizes = {4: keys, 3: share, 20: ffn}
    kept = {
        group.name: torch.randperm(group.size)[: sizes[group.size]]
        for group in channels(dense).cuttable
        if group.size in sizes and group.kind != "head_dim"
    }
    assert len(kept) == 3
    assert cut_cost(dense, kept) == CutCosts(llama(keys * share, keys, ffn)).after({})


class Convolutions(nn.Module):
    """A depthwise convolution after a plain one, and a classifier over what is left."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3)
        self.depthwise = nn.Conv2d(width, width, 3, groups=width)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.depthwise(self.first(x)))).mean((2, 3)))


@pytest.mark.parametrize("left", [1, 4, 8])
def test_convolutions_shrink_in_every_tensor(left: int) -> None:
    x = torch.randn(2, 3, 7, 7)
    dense = capture(Convolutions(8).eval(), (x,))
    (group,) = channels(dense).cuttable
    smaller = capture(Convolutions(left).eval(), (x,))
    assert cut_cost(dense, {group.name: torch.arange(left)}) == CutCosts(smaller).after({})


def test_a_cost_prints_and_a_wrong_name_is_told() -> None:
    model, program = case("bert").model, captured("bert")
    cost = cut_cost(program, {})
    assert cost == Cost(sum(p.numel() for p in model.parameters()), flops(program) // 2)
    assert str(Cost(1234, 500)) == "1,234 parameters, 1,000 FLOPs"
    with pytest.raises(KeyError, match="no group of channels is called 'head'"):
        cut_cost(program, {"head": torch.arange(1)})
