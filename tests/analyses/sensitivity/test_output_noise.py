"""Noise at a wide head is the noise of its outputs, though they are never made."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxopt.analyses.sensitivity.output_noise import OutputNoise
from fxopt.capture import capture
from fxopt.claim import sqnr
from fxopt.interpreter import evaluate
from fxopt.program import Program


class Vocabulary(nn.Module):
    """Signs of features, and what a head of `width` outputs a feature makes of them."""

    def __init__(self, features: int, width: int, bias: bool, transposed: bool) -> None:
        super().__init__()
        self.body = nn.Linear(features, features)
        self.head = nn.Linear(features, width * features, bias=bias)
        self.transposed = transposed
        if transposed:
            self.turned = nn.Parameter(self.head.weight.detach().t().contiguous())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        return x > 0, x @ self.turned if self.transposed else self.head(x)


def noise_of(model: nn.Module, x: Tensor) -> tuple[Program, OutputNoise]:
    program = capture(model.eval(), (x,))
    return program, OutputNoise(program, ())


@settings(max_examples=25)
@given(
    features=st.integers(1, 9),
    width=st.integers(1, 20),
    rows=st.integers(1, 5),
    bias=st.booleans(),
    transposed=st.booleans(),
    decibels=st.integers(0, 60),
    seed=st.integers(0, 99),
)
def test_equals_the_noise_of_the_outputs(
    features: int, width: int, rows: int, bias: bool, transposed: bool, decibels: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Vocabulary(features, width, bias, transposed).double()
    x = torch.randn(2, rows, features, dtype=torch.float64)
    program, noise = noise_of(model, x)
    body = next(node for node in program.graph.nodes if "body" in str(node.args[1:2]))
    wrong = {body: lambda *args: nn.functional.linear(*args) * (1 + 10.0 ** (-decibels / 20))}
    assert bool(noise.override) == (width >= 8)
    for override in ({}, wrong):
        short = [evaluate(program, (x,), override={**noise.override, **o}) for o in ({}, override)]
        whole = [evaluate(program, (x,), override=o) for o in ({}, override)]
        wanted = sqnr(whole[0][1], whole[1][1])
        assert noise.worst_db(*short) == pytest.approx(wanted, abs=1e-6)


def test_a_rewritten_head_is_computed() -> None:
    program, noise = noise_of(Vocabulary(4, 8, True, False), torch.randn(2, 3, 4))
    (head,) = noise.override
    assert OutputNoise(program, [head]).override == {}


def test_a_head_that_something_else_reads_is_computed() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 32)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.head(x)
            return logits.logsumexp(-1), logits

    assert noise_of(Loss(), torch.randn(5, 2))[1].override == {}


def test_what_is_not_finite_is_infinitely_noisy() -> None:
    _, noise = noise_of(Vocabulary(4, 8, True, False), torch.randn(2, 3, 4))
    signs, x = torch.ones(2, 3, 4) > 0, torch.ones(2, 3, 4)
    for value in (math.nan, math.inf):
        broken = x.clone()
        broken[0, 0, 0] = value
        assert noise.worst_db([signs, x], [signs, broken]) == -math.inf
    assert noise.worst_db([signs, x], [signs, x.clone()]) == math.inf
    assert noise.worst_db([signs, x], [~signs, x]) < 1.0
