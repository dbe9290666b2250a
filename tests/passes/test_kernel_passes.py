"""SelectKernels and Prepack: the kernel level computes what the numerics level wrote down."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fxopt import Int8Linear, Prepack, SelectKernels
from fxopt.capture import capture
from fxopt.evaluate import evaluate
from fxopt.program import Changes, Program
from tests.check import check

ACTIVATIONS = [nn.ReLU(), nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh")]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return self.second(x) + x


def _after(pass_: Int8Linear, model: nn.Module, x: Tensor) -> Program:
    program = capture(model, (x,))
    return replace(pass_.apply(program, pass_.plan(program)), changes=Changes())


@pytest.mark.parametrize(
    ("mode", "rule", "target"),
    [
        ("dynamic", "SelectInt8Linear", "fxopt.int8_linear.default"),
        ("weight_only", "SelectInt8WeightOnlyLinear", "fxopt.int8_weight_only_linear.default"),
    ],
)
def test_quantized_regions_become_one_operator(mode: str, rule: str, target: str) -> None:
    x = torch.randn(5, 8)
    program = _after(Int8Linear(mode=mode), Residual(), x)  # type: ignore[arg-type]
    result = SelectKernels().apply(program, SelectKernels().plan(program))
    assert result.changes.fired == {rule: 2}
    assert sum(str(node.target) == target for node in result.graph.nodes) == 2
    assert not any(node.target is torch.ops.aten.linear.default for node in result.graph.nodes)
    (before,), (after,) = evaluate(program, (x,)), evaluate(result, (x,))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_nothing_is_selected_where_nothing_is_quantized() -> None:
    check(SelectKernels(), Residual(), (torch.randn(3, 8),), 0)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations_move_into_the_product(activation: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(8, 16), activation, nn.Linear(16, 4))
    fires = {"PackLinear": 2, "PackActivation": 1}
    check(Prepack(), model, (torch.randn(3, 8),), fires)


def test_residual_adds_move_into_the_product_on_either_side() -> None:
    check(Prepack(), Residual(), (torch.randn(3, 8),), {"PackLinear": 2, "PackResidual": 2})


def test_a_broadcast_addend_stays_outside() -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.linear(x) + y

    inputs = (torch.randn(3, 8), torch.randn(1, 8))
    result = check(Prepack(), Broadcast(), inputs, {"PackLinear": 1})
    assert "the addend has another shape or dtype" in result.changes.refused[0].reason


def test_an_addend_that_is_computed_later_stays_outside() -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return y + x.exp()

    result = check(Prepack(), Later(), (torch.randn(3, 8),), {"PackLinear": 1})
    assert "computed after the product" in result.changes.refused[0].reason


def test_a_product_that_two_read_keeps_its_activation_outside() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return y.relu() * y

    result = check(Prepack(), Both(), (torch.randn(3, 8),), {"PackLinear": 1})
    assert "is also used by" in result.changes.refused[0].reason


def test_a_scaled_addend_is_no_residual() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.add(self.linear(x), x, alpha=2)

    check(Prepack(), Scaled(), (torch.randn(3, 8),), {"PackLinear": 1})


def test_transposed_weights_are_laid_out_by_rows() -> None:
    model = Conv1D(6, 8)
    nn.init.normal_(model.weight)
    result = check(Prepack(), model, (torch.randn(3, 8),), {"PackLinear": 1})
    assert tuple(result.state["weight_rows"].shape) == (6, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtypes_that_onednn_does_not_pack_are_refused(dtype: torch.dtype) -> None:
    result = check(Prepack(), nn.Linear(8, 8, dtype=dtype), (torch.randn(3, 8, dtype=dtype),), 0)
    assert "oneDNN packs float32 and bfloat16" in result.changes.refused[0].reason


class Attention(nn.Module):
    """Self-attention over [batch, length, 32]; options go to aten's operator."""

    def __init__(self, heads: int = 2, **options: object) -> None:
        super().__init__()
        self.heads, self.options = heads, options

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q = x.unflatten(-1, (self.heads, 32 // self.heads)).transpose(1, 2)
        attend = nn.functional.scaled_dot_product_attention
        return attend(q, q.sin(), q.cos(), mask, **self.options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_attention_goes_to_onednn(options: dict[str, object]) -> None:
    x = torch.randn(3, 40, 32)
    result = check(Prepack(), Attention(**options), (x,), {"PackAttention": 1})  # type: ignore[arg-type]
    assert any(node.target is torch.ops.fxopt.attention.default for node in result.graph.nodes)


def test_masks_go_along() -> None:
    x, visible = torch.randn(3, 40, 32), torch.rand(3, 1, 40, 40) < 0.5
    for mask in (visible, torch.randn(3, 1, 1, 40)):
        check(Prepack(), Attention(), (x, mask), {"PackAttention": 1})


@pytest.mark.parametrize(
    ("model", "dtype", "reason"),
    [
        (Attention(), torch.float64, "oneDNN beats aten in float32 only"),
        (Attention(heads=4), torch.float32, "heads are of size 8; oneDNN needs a multiple of 16"),
        (Attention(dropout_p=0.1), torch.float32, "it drops out attention weights"),
    ],
    ids=["dtype", "size", "dropout"],
)
def test_attention_that_does_not_fit_is_refused(
    model: nn.Module, dtype: torch.dtype, reason: str
) -> None:
    program = capture(model, (torch.randn(3, 5, 32, dtype=dtype),))
    plan = Prepack().plan(program)
    assert reason in str(plan)
    assert not Prepack().apply(program, plan).changes.fired.get("PackAttention")


def test_grouped_heads_are_refused() -> None:
    class Grouped(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    inputs = (torch.randn(3, 4, 5, 16), torch.randn(3, 2, 5, 16))
    result = check(Prepack(), Grouped(), inputs, 0)
    assert "other batches or heads than its keys" in result.changes.refused[0].reason


def test_a_gelu_that_no_product_takes_in_becomes_rational() -> None:
    check(Prepack(), nn.Sequential(nn.LayerNorm(8), nn.GELU()), (torch.randn(3, 8),), 1)


def test_a_gelu_in_another_dtype_stays() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.GELU()).double()
    result = check(Prepack(), model, (torch.randn(3, 8, dtype=torch.float64),), 0)
    assert "the rational form is float32 for CPUs" in result.changes.refused[0].reason
