"""The table of operators: what it says exists, and it says what numerics say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxopt.analyses.precision.operators import OPERATORS, UNLISTED, operator_precision
from fxopt.capture import capture

aten = torch.ops.aten


class Calls(nn.Module):
    """One function of a float32 input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def call_in(function: Any, target: Any, x: Tensor | None = None) -> fx.Node:
    x = torch.randn(3, 4) if x is None else x
    program = capture(Calls(function), (x,))
    return next(node for node in program.graph.nodes if node.target is target)


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_operator_of_the_table_exists(name: str) -> None:
    assert hasattr(aten, name) or hasattr(aten, f"{name}_")


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("linear", "low"),
        ("convolution", "low"),
        ("scaled_dot_product_attention", "low"),
        ("softmax", "high"),
        ("layer_norm", "high"),
        ("cross_entropy_loss", "high"),
        ("exp", "high"),
        ("mean", "high"),
        ("add", "either"),
        ("gelu", "either"),
        ("view", "either"),
    ],
)
def test_sides(name: str, side: str) -> None:
    found = OPERATORS[name]

    assert found.side == side
    assert found.reason


def test_what_the_products_low_sum_outside_is_high() -> None:
    low = {name for name, found in OPERATORS.items() if found.side == "low"}

    assert not low & {"sum", "mean", "cumsum", "prod"}


def test_a_small_whole_power_is_a_product() -> None:
    node = call_in(lambda x: x.pow(3), aten.pow.Tensor_Scalar)

    assert operator_precision(node).side == "either"


@pytest.mark.parametrize("exponent", [0.5, -1, 4])
def test_other_powers_are_high(exponent: float) -> None:
    node = call_in(lambda x: (x.abs() + 1).pow(exponent), aten.pow.Tensor_Scalar)

    assert operator_precision(node).side == "high"


def test_an_unlisted_operator_is_left_alone() -> None:
    node = call_in(torch.linalg.inv_ex, aten.linalg_inv_ex.default, torch.eye(4) * 2)

    assert operator_precision(node) is UNLISTED


def test_a_float64_product_is_left_alone() -> None:
    node = call_in(lambda x: x @ x.t(), aten.matmul.default, torch.randn(3, 4).double())
    found = operator_precision(node)

    assert found.side == "high"
    assert "other dtypes than float32" in found.reason


def test_numbers_made_of_integers_are_not_rounded() -> None:
    node = call_in(
        lambda x: x.to(torch.float32) * 2.0, aten.to.dtype, torch.arange(300).reshape(2, 150)
    )
    found = operator_precision(node)

    assert found.side == "high"
    assert "integers" in found.reason


def test_a_comparison_is_high_though_it_makes_no_float() -> None:
    node = call_in(lambda x: torch.where(x > 0.5, x, -x), aten.gt.Scalar)

    assert operator_precision(node).side == "high"
