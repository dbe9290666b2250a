"""What counts as a linear layer, in each spelling, and what doesn't."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxopt.capture import capture
from fxopt.operators import LINEAR_TARGETS, Linear, as_linear, refuse_shared_weight
from fxopt.program import Program
from fxopt.recipe import Recipe, materialize
from tests.rewriting.functions import calls

X = torch.randn(2, 5, 4)


class Layer(nn.Module):
    """One operator on a constant weight [6, 4] (and its transpose [4, 6]) and bias [6]."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(6, 4))
        self.v = nn.Parameter(torch.randn(4, 6))
        self.b = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w, self.v, self.b)


def linears(program: Program) -> list[Linear]:
    found = [as_linear(node) for node in calls(program) if node.target in LINEAR_TARGETS]
    return [linear for linear in found if linear is not None]


SPELLINGS: dict[str, tuple[Callable[..., Tensor], bool, bool]] = {
    "linear": (lambda x, w, v, b: functional.linear(x, w, b), False, True),
    "linear without bias": (lambda x, w, v, b: functional.linear(x, w), False, False),
    "linear on a transpose": (lambda x, w, v, b: functional.linear(x, v.t(), b), True, True),
    "addmm": (lambda x, w, v, b: torch.addmm(b, x[0], v), True, True),
    "addmm on a transpose": (lambda x, w, v, b: torch.addmm(b, x[0], w.t()), False, True),
    "mm": (lambda x, w, v, b: torch.mm(x[0], v), True, False),
    "matmul": (lambda x, w, v, b: x @ v, True, False),
    "matmul on a transpose": (lambda x, w, v, b: x @ w.transpose(0, 1), False, False),
    "matmul on a negative transpose": (lambda x, w, v, b: x @ w.transpose(-1, -2), False, False),
    "matmul on a permute": (lambda x, w, v, b: x @ w.permute(1, 0), False, False),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_each_spelling_is_one_linear(case: str) -> None:
    function, transposed, biased = SPELLINGS[case]
    model = Layer(function)
    program = capture(model, (X,))
    (linear,) = linears(program)
    assert linear.transposed is transposed
    assert (linear.in_features, linear.out_features) == (4, 6)
    assert linear.dtype == torch.float32
    assert (linear.bias is not None) == biased
    assert linear.weight.op == "get_attr"
    weight = materialize(linear.weight_nk(program.state[str(linear.weight.target)]))
    assert weight.shape == (6, 4)
    bias = model.b if biased else torch.zeros(6)
    x = X[0] if "mm" in case.split()[0] and case.split()[0] != "matmul" else X
    expected = functional.linear(x, weight, bias)
    torch.testing.assert_close(expected, model(X))


NOT_LINEAR: dict[str, Callable[..., Tensor]] = {
    "two activations": lambda x, w, v, b: x @ x.transpose(1, 2),
    "constant on the left": lambda x, w, v, b: w @ x.transpose(1, 2),
    "scaled addmm": lambda x, w, v, b: torch.addmm(b, x[0], v, beta=2),
    "addmm of a computed bias": lambda x, w, v, b: torch.addmm(x[0].sum(-1, True), x[0], v),
    "computed weight": lambda x, w, v, b: functional.linear(x, w * 2, b),
    "weight of rank 3": lambda x, w, v, b: x @ v.expand(2, 4, 6),
    "a vector": lambda x, w, v, b: x @ v[:, 0],
}


@pytest.mark.parametrize("case", NOT_LINEAR)
def test_what_only_looks_like_one_is_none(case: str) -> None:
    assert linears(capture(Layer(NOT_LINEAR[case]), (X,))) == []


def test_an_untransposed_weight_is_handed_on_as_it_is() -> None:
    model = Layer(SPELLINGS["linear"][0])
    (linear,) = linears(capture(model, (X,)))
    assert linear.weight_nk(model.w) is model.w


def test_a_transposed_weight_waits_as_a_recipe() -> None:
    model = Layer(SPELLINGS["matmul"][0])
    (linear,) = linears(capture(model, (X,)))
    recipe = linear.weight_nk(model.v)
    assert isinstance(recipe, Recipe)
    assert recipe.shape == (6, 4)
    assert recipe.requires_grad
    assert torch.equal(materialize(recipe), model.v.t())
    assert materialize(recipe).is_contiguous()


def test_a_weight_that_something_else_reads_is_left_alone() -> None:
    model = Layer(lambda x, w, v, b: functional.linear(x, w, b) + w.sum())
    (linear,) = linears(capture(model, (X,)))
    reason = refuse_shared_weight(linear, lambda user: user is linear.node)
    assert reason == "its weight w is tied: sum reads it too"
    assert refuse_shared_weight(linear, lambda user: True) is None
