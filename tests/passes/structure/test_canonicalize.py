"""Canonicalize: every rule fires where it may, refuses where it must, and stays exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxopt import Canonicalize
from fxopt.capture import capture
from tests.check import check


class Casts(nn.Module):
    """Views, casts and slices that change nothing, and one of each kind that does."""

    def forward(self, x: Tensor) -> Tensor:
        same = x.to(torch.float32).reshape(x.shape)[:].expand(-1, -1).contiguous()
        return same.to(torch.float64)[:, 1:].reshape(-1)


class Duplicates(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + 1) * torch.tanh(x + 1)


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(6.0).reshape(2, 3))
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.table.sum(0).exp()


class WrittenConstant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x + self.count


class Transposes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).transpose(1, 0).transpose(-1, -2) + 1


class CopyAsOutput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.rand_like(x) - torch.rand_like(x) + x


def test_identities_are_dropped_and_real_casts_stay() -> None:
    result = check(Canonicalize(), Casts(), (torch.randn(3, 4),), {"DropIdentity": 5})
    kept = [str(node.target) for node in result.graph.nodes if node.op == "call_function"]
    assert "aten.to.dtype" in kept
    assert "aten.slice.Tensor" in kept


def test_duplicates_are_merged() -> None:
    check(Canonicalize(), Duplicates(), (torch.randn(3, 4),), {"MergeDuplicate": 2})


def test_random_operators_are_never_merged() -> None:
    program = capture(Random(), (torch.randn(3, 4),))
    result = Canonicalize().apply(program, Canonicalize().plan(program))
    targets = [str(node.target) for node in result.graph.nodes]
    assert targets.count("aten.rand_like.default") == 2


def test_constants_are_folded_but_a_view_of_a_weight_stays_shared() -> None:
    model = Constants()
    result = check(Canonicalize(), model, (torch.randn(2, 3),), {"FoldConstant": 2})
    assert result.state["weight"] is model.weight
    assert "table" not in result.state


def test_a_constant_that_the_model_writes_is_refused() -> None:
    program = capture(WrittenConstant(), (torch.randn(2, 3),))
    result = Canonicalize().apply(program, Canonicalize().plan(program))
    reasons = [str(refusal) for refusal in result.changes.refused]
    assert any("count is written by the model" in reason for reason in reasons)


def test_constants_that_hang_on_parameters_are_not_folded_in_train_mode() -> None:
    program = capture(Constants(), (torch.randn(2, 3),), mode="train")
    result = Canonicalize().apply(program, Canonicalize().plan(program))
    assert "FoldConstant" not in result.changes.fired


def test_double_transposes_cancel_and_single_ones_stay() -> None:
    result = check(Canonicalize(), Transposes(), (torch.randn(3, 4),), {"DropDoubleTranspose": 1})
    assert sum("transpose" in str(node.target) for node in result.graph.nodes) == 1


def test_a_copy_that_is_an_output_stays_a_copy() -> None:
    x = torch.randn(3, 4)
    result = check(Canonicalize(), CopyAsOutput(), (x,), 0)
    assert ["the copy is an output" in str(one) for one in result.changes.refused] == [True]


class Positions(nn.Module):
    """A mask over [batch, queries, keys], put together as models do it."""

    def __init__(self, first: int, least: int, as_output: bool = False) -> None:
        super().__init__()
        self.first, self.least, self.as_output = first, least, as_output

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        queries = torch.arange(x.shape[1]).unsqueeze(0).unsqueeze(-1) + self.first
        mask = (queries >= self.least) & visible.unsqueeze(1)
        return mask if self.as_output else x.unsqueeze(-1).masked_fill(mask, 1.5)


VISIBLE = (torch.randn(3, 4), torch.rand(3, 4) < 0.5)


@pytest.mark.parametrize(("first", "least"), [(0, 0), (2, 1), (0, -3)])
def test_what_a_mask_holds_that_is_true_everywhere_leaves_it(first: int, least: int) -> None:
    result = check(
        Canonicalize(), Positions(first, least), VISIBLE, {"FoldArangeCompare": 1, "DropTrue": 1}
    )
    left = {str(node.target) for node in result.graph.nodes}
    assert not left & {"aten.ge.Scalar", "aten.__and__.Tensor"}


@pytest.mark.parametrize(("first", "least"), [(0, 1), (-1, 0)])
def test_what_may_be_false_somewhere_stays(first: int, least: int) -> None:
    check(Canonicalize(), Positions(first, least), VISIBLE, 0)


def test_a_mask_that_is_an_output_is_computed() -> None:
    model = Positions(0, 0, as_output=True)
    result = check(Canonicalize(), model, VISIBLE, {"FoldArangeCompare": 1})
    reasons = [refusal.reason for refusal in result.changes.refused]
    assert reasons == ["it is an output, which must not share memory with another value"]


def test_integers_that_are_one_are_not_dropped() -> None:
    class Bits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones_like(x) & x

    check(Canonicalize(), Bits(), (torch.arange(12).reshape(3, 4),), 0)


@pytest.mark.parametrize("size", [1 << 15, 1 << 17])
def test_large_constants_are_left_to_run_time(size: int) -> None:
    class Big(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(size, dtype=torch.float32).exp()

    program = capture(Big(), (torch.randn(2, 1),))
    result = Canonicalize().apply(program, Canonicalize().plan(program))
    folded = any("_folded" in name for name in result.state)
    assert folded == (size <= 1 << 16)
