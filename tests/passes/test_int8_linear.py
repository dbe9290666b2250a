"""Int8Linear: every spelling of a linear, both modes, and everything it must leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fxopt import Close, Int8Linear, PassError, Sqnr
from fxopt.capture import capture
from tests.check import check


class Spellings(nn.Module):
    """linear, addmm (Conv1D), mm, matmul and x @ W.t(), one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.conv1d = Conv1D(8, 8)
        nn.init.normal_(self.conv1d.weight, std=0.3)
        nn.init.normal_(self.conv1d.bias)
        self.right = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1d(self.linear(x))
        x = x @ self.right
        return x.reshape(-1, 8).mm(self.right.t())


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.a(x.relu())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(ids)))


class Integers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-3, 3, (4, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_spelling_of_a_linear(mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Spellings().to(dtype)
    x = torch.randn(3, 4, 8, dtype=dtype)
    result = check(Int8Linear(mode=mode), model, (x,), {"QuantizeLinear": 4})  # type: ignore[arg-type]
    kinds = {tensor.dtype for name, tensor in result.state.items() if name.endswith("_int8")}
    assert kinds == {torch.int8}


def test_shared_inputs_are_rounded_once_and_shared_weights_kept_once() -> None:
    result = check(Int8Linear(), Shared(), (torch.randn(3, 8),), 3)
    rounded = [n for n in result.graph.nodes if "quantize_per_token" in str(n.target)]
    assert len(rounded) == 2
    assert sorted(name for name in result.state if name.endswith("_int8")) == [
        "a.weight_int8",
        "b.weight_int8",
    ]


def test_a_tied_head_is_left_out_and_said_so() -> None:
    model, ids = Tied(), torch.randint(0, 20, (3, 5))
    result = check(Int8Linear(), model, (ids,), 1)
    (refusal,) = result.changes.refused
    assert refusal.node.startswith("head")
    assert "embedding.weight is tied: embedding reads it too" in refusal.reason
    assert result.state["embedding.weight"] is model.embedding.weight


def test_a_tied_head_can_be_asked_for() -> None:
    check(Int8Linear(tied=True), Tied(), (torch.randint(0, 20, (3, 5)),), 2)


def test_include_and_exclude_are_globs_over_module_paths() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))
    x = (torch.randn(3, 8),)
    result = check(Int8Linear(exclude="3"), model, x, 2)
    assert "in exclude=('3',)" in result.changes.refused[0].reason
    result = check(Int8Linear(include=["0", "2"]), model, x, 2)  # type: ignore[arg-type]
    assert "not in include=('0', '2')" in result.changes.refused[0].reason


def test_integer_weights_are_refused() -> None:
    result = check(Int8Linear(), Integers(), (torch.randint(-5, 5, (3, 8)),), 0)
    assert "torch.int64, not floating point" in result.changes.refused[0].reason


def test_a_computed_weight_is_no_linear_layer() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x @ y

    check(Int8Linear(), Product(), (torch.randn(3, 4), torch.randn(1, 4, 5)), 0)


def test_one_input_feature_works() -> None:
    check(Int8Linear(), nn.Linear(1, 5), (torch.randn(3, 1),), 1)


def test_other_modes_are_errors_that_say_what_there_is() -> None:
    with pytest.raises(PassError, match=r"must be one of \('dynamic', 'weight_only'\)") as raised:
        Int8Linear(mode="int4")  # type: ignore[arg-type]
    assert "calibration" not in str(raised.value)
    with pytest.raises(PassError, match="Static scales need calibration"):
        Int8Linear(mode="static")  # type: ignore[arg-type]
    with pytest.raises(PassError, match="give globs over module paths"):
        Int8Linear(include=(3,))  # type: ignore[arg-type]


def test_the_claim_depends_on_the_mode_and_can_be_replaced() -> None:
    assert Int8Linear().claim == Sqnr(16.0)
    assert Int8Linear(mode="weight_only").claim == Sqnr(26.0)
    assert Int8Linear(claim=Close(0.1)).claim == Close(0.1)
    assert repr(Int8Linear(mode="weight_only")) == "Int8Linear(mode='weight_only')"


def test_quantizing_needs_no_copy_of_the_float_weight() -> None:
    model = nn.Linear(8, 8)
    program = capture(model, (torch.randn(3, 8),))
    result = Int8Linear().apply(program, Int8Linear().plan(program))
    assert set(result.state) == {"weight_int8", "weight_scale", "bias"}
    assert result.state["bias"] is model.bias
