"""Every matrix product is rewritten, or listed among the refusals with its reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import fxopt
from fxopt import wellformed
from fxopt.capture import capture
from fxopt.constant_expressions import is_computed_constant
from fxopt.interpreter import evaluate
from fxopt.operators import PRODUCT_TARGETS, as_linear
from fxopt.passes import (
    Canonicalize,
    Float8Linear,
    FuseLinears,
    HalfLinear,
    Int4Linear,
    Int8Linear,
    Prepack,
)
from fxopt.program import Changes, Program
from fxopt.rewriting import Pass
from tests.check import assert_close_to_model
from tests.rewriting.functions import calls

K = 64
X = torch.randn(2, 6, K)


class Product(nn.Module):
    """x [B, T, K] times a weight, in one spelling."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.weight = nn.Parameter(torch.randn(K, K) / 8)
        self.wide = nn.Parameter(torch.randn(K + 32, K) / 8)
        self.stack = nn.Parameter(torch.randn(1, K, K) / 8)
        self.bias = nn.Parameter(torch.randn(K))
        self.scale = nn.Parameter(torch.rand(K, 1) + 0.5)
        self.halved = nn.Parameter((torch.randn(K, K) / 8).half(), requires_grad=False)
        self.layers = nn.ModuleDict()
        if spelling in LAYERS:
            self.layers["inner"] = LAYERS[spelling]()

    def forward(self, x: Tensor) -> Tensor:
        return SPELLINGS[self.spelling](self, x)

    def extra_repr(self) -> str:
        return self.spelling


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(K, K)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(K, K)),
    "Conv1D": lambda: Conv1D(K, K),
}


def _through(m: Any, x: Tensor) -> Tensor:
    return m.layers["inner"](x)


FIRES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda m, x: functional.linear(x, m.weight, m.bias),
    "@ T": lambda m, x: x @ m.weight.T,
    "@ mT": lambda m, x: x @ m.weight.mT,
    "matmul t()": lambda m, x: x.matmul(m.weight.t()),
    "mm": lambda m, x: torch.mm(x.flatten(0, 1), m.weight).view(x.shape),
    "addmm": lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.weight.T).view(x.shape),
    "einsum nk": lambda m, x: torch.einsum("btk,nk->btn", x, m.weight),
    "einsum kn": lambda m, x: torch.einsum("...k,kn", x, m.weight),
    "einsum swapped": lambda m, x: torch.einsum("nk,btk->btn", m.weight, x),
    "tensordot": lambda m, x: torch.tensordot(x, m.weight, 1),
    "inner": lambda m, x: torch.inner(x, m.weight),
    "scaled weight": lambda m, x: functional.linear(x, m.weight * m.scale, m.bias),
    "sliced weight": lambda m, x: functional.linear(x, m.wide[:K]),
    "half weight": lambda m, x: functional.linear(x, m.halved.float()),
    "stacked weights": lambda m, x: functional.linear(x, m.stack[0]),
    "computed bias": lambda m, x: functional.linear(x, m.weight, m.bias * 2),
    "bias from inputs": lambda m, x: functional.linear(x, m.weight, x.mean((0, 1))),
    "weight_norm": _through,
    "spectral_norm": _through,
    "Conv1D": _through,
}
REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "scaled product": (
        lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.weight, alpha=2).view(x.shape),
        "it scales its addend or its product (alpha, beta)",
    ),
    "matrix addend": (
        lambda m, x: torch.addmm(x.flatten(0, 1), x.flatten(0, 1), m.weight).view(x.shape),
        "its addend is no vector of one number for each output channel",
    ),
    "batched": (
        lambda m, x: x @ m.stack,
        "is of rank 3, not a matrix",
    ),
    "on the left": (
        lambda m, x: (m.weight @ x.transpose(1, 2)).transpose(1, 2),
        "is the left side",
    ),
    "axes moved": (
        lambda m, x: torch.einsum("btk,nk->bnt", x, m.weight).transpose(1, 2),
        "einsum('btk,nk->bnt') is more than x @ W over the last axis of x",
    ),
    "two activations": (
        lambda m, x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
        "both of its sides are computed from the inputs",
    ),
}
SPELLINGS = {**FIRES, **{name: function for name, (function, _) in REFUSED.items()}}

PASSES: Sequence[Pass] = (
    Int8Linear(where="always"),
    Int8Linear(mode="weight_only", where="always"),
    Int8Linear(mode="static", where="always"),
    Int8Linear(where="always", budget=fxopt.Sqnr(20.0)),
    Int4Linear(group=32),
    Int4Linear(group=32, weights="gptq"),
    HalfLinear(dtype=torch.bfloat16, force=True),
    HalfLinear(dtype=torch.float16, force=True),
    Float8Linear(force=True),
    Prepack(),
)
_PRODUCTS = ("QuantizeLinear", "QuantizeInt4Linear", "RoundLayer", "QuantizeFloat8Linear")
_RULES = (*_PRODUCTS, "PackLinear")


def products(program: Program) -> int:
    """How many products there are, but for those inside of weights."""
    found = [node for node in calls(program) if node.target in PRODUCT_TARGETS]
    return sum(not is_computed_constant(node) for node in found)


def run(pass_: Pass, program: Program) -> tuple[Program, int, list[str]]:
    """The result, how many products were rewritten, and the reasons of the others."""
    result = pass_.apply(replace(program, changes=Changes()), pass_.plan(program))
    wellformed.check(result)
    fired = sum(result.changes.fired.get(rule, 0) for rule in _RULES)
    return result, fired, [str(refusal) for refusal in result.changes.refused]


@pytest.fixture(scope="module")
def fires() -> tuple[nn.Module, Program]:
    """A model with each spelling once, side by side."""
    model = Products(list(FIRES)).eval()
    return model, capture(model, (X,))


class Products(nn.Module):
    """The products of one input with weights in each of `spellings`."""

    def __init__(self, spellings: Sequence[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(map(Product, spellings))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


@pytest.mark.parametrize("pass_", PASSES, ids=repr)
def test_a_pass_takes_each_spelling_of_a_linear(
    pass_: Pass, fires: tuple[nn.Module, Program]
) -> None:
    model, program = fires
    result, fired, refused = run(pass_, program)
    assert fired == len(FIRES), refused
    computed = result.materialized()
    for x in (X, torch.randn(3, 4, K)):
        assert_close_to_model(pass_.claim, model, computed, (x,))
    again, fired, _ = run(pass_, result)
    assert fired == 0
    assert str(again.graph) == str(result.graph)


def test_weights_stay_the_models_own_until_a_pass_takes_them(
    fires: tuple[nn.Module, Program],
) -> None:
    model, program = fires
    parameters = dict(model.named_parameters())
    assert all(
        program.state[name] is parameters[name] for name in program.state if name in parameters
    )
    result, fired, _ = run(Int8Linear(where="always", include="nowhere"), program)
    assert fired == 0
    assert dict(result.state) == dict(program.state)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_linear_is_listed_with_its_reason(name: str) -> None:
    reason = REFUSED[name][1]
    program = capture(Products([name]).eval(), (X,))
    for pass_ in (*PASSES[:1], *PASSES[4:5], *PASSES[6:7], *PASSES[8:]):
        _, fired, refused = run(pass_, program)
        assert fired == 0
        assert len(refused) == products(program)
        assert all(reason in one for one in refused)


@settings(max_examples=6, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(list(SPELLINGS)), min_size=3, max_size=6))
def test_drawn_spellings_fire_or_are_listed(names: list[str]) -> None:
    model = Products(names).eval()
    program = capture(model, (X,))
    for pass_ in (PASSES[0], PASSES[6], PASSES[-1]):
        result, fired, refused = run(pass_, program)
        assert fired == sum(name in FIRES for name in names)
        assert fired + len(refused) == products(program)
        assert_close_to_model(pass_.claim, model, result.materialized(), (X,))


def test_cross_attention_is_rewritten_though_its_weights_are_slices() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(K, 2, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            attended: Tensor = self.attention(x, memory, memory, need_weights=False)[0]
            return attended

    model = Cross().eval()
    program = capture(model, (X, torch.randn(2, 5, K)))
    assert products(program) == 3
    result, fired, refused = run(Int8Linear(where="always"), program)
    assert (fired, refused) == (3, [])
    memory = torch.randn(2, 7, K)
    torch.testing.assert_close(
        evaluate(result, (X, memory))[0], model(X, memory), rtol=0.1, atol=0.02
    )


def test_in_train_mode_a_computed_weight_stays_computed() -> None:
    program = capture(Products(["scaled weight", "@ T"]), (X,), "train")
    _, fired, refused = run(HalfLinear(dtype=torch.bfloat16, force=True), program)
    assert fired == 1
    (reason,) = refused
    assert reason.endswith("its weight is computed from parameters, which train")


def test_a_tied_weight_is_found_behind_what_is_computed_from_it() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(40, K)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids) @ (self.table.weight * 0.5).T

    program = capture(Tied().eval(), (torch.randint(0, 40, (2, 5)),))
    _, fired, (reason,) = run(Int8Linear(where="always"), program)
    assert fired == 0
    assert "its weight table.weight is tied: embedding reads it too" in reason
    assert run(Int8Linear(where="always", tied=True), program)[1] == 1


def test_linears_that_share_an_input_fuse_in_each_spelling() -> None:
    class Siblings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(8 * n, K) / 8 for n in (1, 2, 3, 4))
            self.bias = nn.Parameter(torch.randn(16))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            a, b, c, d = self.weights
            return (
                x @ a.T,
                functional.linear(x, b * 2, self.bias),
                torch.einsum("btk,nk->btn", x, c),
                functional.linear(x, d, x.mean((0, 1))[:32]),
                x @ x.transpose(1, 2),
            )

    model = Siblings().eval()
    program = capture(model, (X,))
    result, _, refused = run(FuseLinears(), program)
    assert result.changes.fired == {"FuseSiblings": 1}
    assert any("its bias is computed from the inputs" in reason for reason in refused)
    assert any("both of its sides are computed" in reason for reason in refused)
    for output, expected in zip(evaluate(result.materialized(), (X,)), model(X), strict=True):
        torch.testing.assert_close(output, expected)


def test_every_linear_of_falcon_is_quantized() -> None:
    config = transformers.FalconConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    model = transformers.FalconForCausalLM(config).eval()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    program = capture(model, {"input_ids": torch.randint(0, 50, (2, 7))})
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    _, fired, refused = run(Int8Linear(where="always"), program)
    assert fired == len(linears) == 9, refused
    assert all("both of its sides are computed" in reason for reason in refused)


def test_a_large_weight_norm_is_computed_once() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(512, 512))).eval()
    x = torch.randn(3, 512)
    program = capture(model, (x,))
    result = Canonicalize().apply(program, Canonicalize().plan(program))
    assert [str(node.target) for node in calls(result)] == ["aten.linear.default"]
    assert as_linear(calls(result)[0]) is not None
    assert sorted(result.state) == ["0.bias", "0.parametrizations.weight.0._weight_norm_folded"]
    torch.testing.assert_close(evaluate(result.materialized(), (x,))[0], model(x))


def test_a_product_inside_of_a_weight_is_part_of_it() -> None:
    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Parameter(torch.randn(K, K) / 8)
            self.up, self.down = (nn.Parameter(torch.randn(*s) / 8) for s in ((K, 4), (4, K)))

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.base + self.up @ self.down)

    model = LowRank().eval()
    program = capture(model, (X,))
    result, fired, refused = run(Int8Linear(where="always"), program)
    assert (fired, refused) == (1, [])
    assert not any(node.target is torch.ops.aten.matmul.default for node in calls(result))
    assert_close_to_model(Int8Linear().claim, model, result, (X,))
