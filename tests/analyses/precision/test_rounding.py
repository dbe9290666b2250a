"""Which programs round values that depend on their inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxopt import HalfAttention, Int8Linear, SmoothQuant
from fxopt.analyses.precision import rounds_activations
from fxopt.capture import capture
from fxopt.rewriting import Pass
from tests.models import Attention
from tests.rewriting.functions import program_of

X = torch.randn(2, 6, 16)


@pytest.mark.parametrize(
    ("pass_", "rounds"),
    [
        (Int8Linear(), True),
        (Int8Linear(activations="affine"), True),
        (Int8Linear(mode="static"), True),
        (Int8Linear(mode="weight_only"), False),
        (HalfAttention(force=True), True),
        (SmoothQuant(), False),
    ],
    ids=repr,
)
def test_passes_that_round_activations(pass_: Pass, rounds: bool) -> None:
    program = capture(Attention(16, 4, False, True).eval(), (X,))
    assert not rounds_activations(program)
    assert rounds_activations(pass_.apply(program, pass_.plan(program))) == rounds


@pytest.mark.parametrize(
    ("function", "rounds"),
    [
        (lambda x: x.to(torch.bfloat16), True),
        (lambda x: x.to(torch.float16), True),
        (lambda x: x.to(torch.float64), False),
        (lambda x: x.to(torch.int64), False),
        (lambda x: (x > 0).to(torch.bfloat16), False),
        (lambda x: (x > 0).to(torch.bfloat16).softmax(-1).to(torch.float32), True),
        (lambda x: x.to(torch.bfloat16).to(torch.float32), True),
    ],
)
def test_casts_to_half_round_and_others_do_not(
    function: Callable[[Tensor], Tensor], rounds: bool
) -> None:
    assert rounds_activations(program_of(function, X)) == rounds


def test_a_model_in_half_rounds_nowhere_anew() -> None:
    model = nn.Linear(16, 4, dtype=torch.bfloat16)
    assert not rounds_activations(capture(model, (X.to(torch.bfloat16),)))
