"""FuseLinears: linears that share an input become one, unless a weight has another reader."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxopt import FuseLinears
from fxopt.capture import capture
from tests.check import check


class Qkv(nn.Module):
    """Three projections of one input, of other widths, with and without bias."""

    def __init__(self, second_bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.query = nn.Linear(8, 12, dtype=dtype)
        self.key = nn.Linear(8, 4, bias=second_bias, dtype=dtype)
        self.value = nn.Linear(8, 4, dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.query(x), self.key(x).relu(), self.value(x).view(x.shape[0], -1, 2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.other = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.head(x) + self.other(x)


class OneWeightTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.linear(x)


def test_three_projections_become_one() -> None:
    result = check(FuseLinears(), Qkv(), (torch.randn(3, 8),), {"FuseSiblings": 1})
    assert "query_key_value.weight" in result.state
    assert tuple(result.state["query_key_value.weight"].shape) == (20, 8)
    assert not any(name.startswith(("query.", "key.", "value.")) for name in result.state)


def test_a_missing_bias_is_a_zero_bias() -> None:
    result = check(FuseLinears(), Qkv(second_bias=False), (torch.randn(3, 8),), 1)
    bias = result.tensor("query_key_value.bias")
    assert torch.equal(bias[12:16], torch.zeros(4))


def test_float64_is_fused_to_float64_precision() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    check(FuseLinears(), Qkv(dtype=torch.float64), (x,), 1)


def test_fusing_computes_nothing_before_it_is_needed() -> None:
    program = capture(Qkv(), (torch.randn(3, 8),))
    result = FuseLinears().apply(program, FuseLinears().plan(program))
    recipe = result.state["query_key_value.weight"]
    assert not isinstance(recipe, Tensor)
    assert recipe.sources[0] is program.state["query.weight"]


def test_a_weight_tied_to_an_embedding_is_refused() -> None:
    result = check(FuseLinears(), Tied(), (torch.randint(0, 10, (3, 5)),), 0)
    (refusal,) = result.changes.refused
    assert "embedding.weight is tied: embedding reads it too" in refusal.reason


def test_one_weight_used_twice_is_refused() -> None:
    result = check(FuseLinears(), OneWeightTwice(), (torch.randn(3, 8),), 0)
    assert [refusal.reason for refusal in result.changes.refused] == [
        "two of them share one weight"
    ]


def test_linears_of_other_inputs_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    check(FuseLinears(), model, (torch.randn(3, 8),), 0)


def test_fused_weights_of_a_trained_model_are_parameters_in_train_mode() -> None:
    program = capture(Qkv(), (torch.randn(3, 8),), mode="train")
    result = FuseLinears().apply(program, FuseLinears().plan(program)).materialized()
    assert isinstance(result.state["query_key_value.weight"], nn.Parameter)
