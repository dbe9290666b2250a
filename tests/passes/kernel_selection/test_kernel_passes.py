"""SelectKernels and Prepack: the kernel level computes what the numerics level wrote down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

import fxopt
from fxopt import EquivalenceError, FuseLinears, HalfAttention, Int8Linear, Prepack, SelectKernels
from fxopt.capture import capture
from fxopt.claim import Claim, Sqnr
from fxopt.interpreter import evaluate
from fxopt.kernels import native
from fxopt.program import Changes, Program
from fxopt.rewriting import Edit, Match, Pass, Rule, RulePass, Stage
from fxopt.rewriting.pattern import Target
from tests import models
from tests.check import check

ops = torch.ops.fxopt
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
    with native.without():
        result = SelectKernels().apply(program, SelectKernels().plan(program))
    assert result.changes.fired == {rule: 2}
    assert sum(str(node.target) == target for node in result.graph.nodes) == 2
    assert not any(node.target is torch.ops.aten.linear.default for node in result.graph.nodes)
    (before,), (after,) = evaluate(program, (x,)), evaluate(result, (x,))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@given(
    st.sampled_from([(8, 8), (4, 32), (3, 96)]),
    st.sampled_from([1, 2, 4, 32]),
    st.lists(st.integers(1, 5), max_size=2),
    st.booleans(),
)
@pytest.mark.parametrize(
    ("mode", "rule"),
    [("weight_only", "SelectInt8GroupsWeightOnly"), ("dynamic", "SelectGroupedInt8Linear")],
)
def test_groups_of_int8_become_one_operator(
    mode: Any, rule: str, shape: tuple[int, int], group: int, rows: list[int], bias: bool
) -> None:
    outputs, inner = shape
    fits = inner % group == 0
    torch.manual_seed(0)
    x = torch.randn(*rows, inner)
    model = nn.Linear(inner, outputs, bias=bias)
    program = _after(Int8Linear(mode=mode, group=group, where="always"), model, x)
    result = SelectKernels().apply(program, SelectKernels().plan(program))
    assert result.changes.fired.get(rule, 0) == fits
    (before,), (after,) = evaluate(program, (x,)), evaluate(result, (x,))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_zero_points_of_int8_groups_are_refused() -> None:
    pass_ = Int8Linear(mode="weight_only", group=4)
    program = _after(pass_, nn.Linear(8, 4), torch.randn(3, 8))
    (dense,) = (
        node for node in program.graph.nodes if node.target is torch.ops.fxopt.dequantize.default
    )
    dense.args = (*dense.args, dense.args[1])
    plan = SelectKernels().plan(program)
    assert not plan.sites
    assert "has zero points, which the kernel of int8 groups doesn't take" in str(plan)


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
def test_attention_becomes_one_kernel(options: dict[str, object]) -> None:
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
        (Attention(), torch.float64, "its inputs are torch.float64; aten's attention is as fast"),
        (Attention(heads=4), torch.float32, "heads are of size 8; oneDNN needs a multiple of 16"),
        (Attention(dropout_p=0.1), torch.float32, "it drops out attention weights"),
    ],
    ids=["dtype", "size", "dropout"],
)
def test_attention_that_does_not_fit_is_refused(
    model: nn.Module, dtype: torch.dtype, reason: str
) -> None:
    program = capture(model, (torch.randn(3, 5, 32, dtype=dtype),))
    with native.without():
        plan = Prepack().plan(program)
        assert reason in str(plan)
        assert not Prepack().apply(program, plan).changes.fired.get("PackAttention")


class Grouped(nn.Module):
    """Attention of four heads of queries over two of keys, each of `size`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, self.size)).transpose(1, 2)
        k = x[..., : 2 * self.size].unflatten(-1, (2, self.size)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)


def test_grouped_heads_are_refused_by_onednn() -> None:
    with native.without():
        result = check(Prepack(), Grouped(16), (torch.randn(3, 5, 64),), 0)
    assert "its queries have other heads than its keys" in result.changes.refused[0].reason


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_kernel_takes_grouped_heads_and_bfloat16(dtype: torch.dtype) -> None:
    check(Prepack(), Grouped(16), (torch.randn(3, 5, 64, dtype=dtype),), {"PackAttention": 1})
    program = capture(Grouped(15), (torch.randn(3, 5, 60, dtype=dtype),))
    reason = "its heads are of size 15; bfloat16 is multiplied in pairs"
    assert (reason in str(Prepack().plan(program))) == (dtype == torch.bfloat16)


def test_a_mask_is_taken_before_it_is_expanded() -> None:
    class Masked(nn.Module):
        def forward(self, q: Tensor, visible: Tensor) -> Tensor:
            heads = q.unflatten(-1, (2, 16)).transpose(1, 2)
            mask = visible.expand(q.shape[0], 1, q.shape[1], q.shape[1])
            return nn.functional.scaled_dot_product_attention(heads, heads, heads, mask)

    visible = torch.arange(5) < torch.tensor([[3], [5], [4]])
    inputs = (torch.randn(3, 5, 32), visible[:, None, None, :])
    result = check(Prepack(), Masked(), inputs, {"PackAttention": 1})
    (call,) = [n for n in result.graph.nodes if n.target is torch.ops.fxopt.attention.default]
    assert call.args[3].meta["val"].shape[2] == 1


class Projected(nn.Module):
    """Attention over [batch, length, 32] in `dtype`, and a linear of its rows."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention, self.dense, self.dtype = Attention(), nn.Linear(32, 8), dtype

    def forward(self, x: Tensor) -> Tensor:
        output = self.attention(x.to(self.dtype)).transpose(1, 2)
        return self.dense(output.reshape(*x.shape[:2], -1).to(x.dtype))  # type: ignore[no-any-return]


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_rounds_for_the_product_after_it(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 32)
    passes = "int8-linear{mode=static, where=always}, prepack"
    opt = fxopt.transform(Projected(dtype), passes, example_inputs=(x,))
    assert opt.report.steps[-1].fired == {"PackAttention": 1, "QuantizeAttention": 1}
    before = opt.steps[-2].graph.program
    counts = [n.target for n in before.graph.nodes].count(torch.ops.fxopt.quantize.default)
    assert counts == 1
    assert torch.ops.fxopt.quantize.default not in [n.target for n in opt.program.graph.nodes]


@pytest.mark.usefixtures("compiled_kernels")
def test_attention_that_is_read_twice_stays_in_float() -> None:
    class Twice(Projected):
        def forward(self, x: Tensor) -> Tensor:
            output = self.attention(x).transpose(1, 2).reshape(*x.shape[:2], -1)
            return self.dense(output) + output.sum(-1, keepdim=True)  # type: ignore[no-any-return]

    passes = "int8-linear{mode=static, where=always}, prepack"
    x = torch.randn(3, 5, 32)
    opt = fxopt.transform(Twice(torch.float32), passes, example_inputs=(x,))
    assert opt.report.steps[-1].fired == {"PackAttention": 1}


def test_a_gelu_that_no_product_takes_in_becomes_rational() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.GELU())
    check(Prepack(), model, (torch.randn(3, 8),), {"TwoPassNorm": 1, "RationalGelu": 1})


def test_a_gelu_in_another_dtype_stays() -> None:
    result = check(Prepack(), nn.GELU(), (torch.randn(3, 8, dtype=torch.float64),), 0)
    assert "the rational form is float32 for CPUs" in result.changes.refused[0].reason


CHAIN_FIRES = {"SelectPackedInt8Linear": 2, "ActivationInside": 1, "QuantizeInside": 1}
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(11))


def _chain(activation: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), activation, nn.Linear(16, 8))


def _selected(pass_: Int8Linear, model: nn.Module, x: Tensor) -> tuple[Program, Program]:
    program = _after(pass_, model, x)
    return program, SelectKernels().apply(program, SelectKernels().plan(program))


def _products(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is ops.packed_int8_linear.default]


def _assert_same_codes(program: Program, result: Program, x: Tensor) -> None:
    (before,), (after,) = evaluate(program, (x,)), evaluate(result, (x,))
    assert Sqnr(35.0).measure(before, after).holds, "a code may be the next one, at a tie"


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_a_chain_of_static_products_has_no_float_in_between(activation: nn.Module) -> None:
    program, result = _selected(Int8Linear(mode="static"), _chain(activation), X)
    assert result.changes.fired == CHAIN_FIRES
    first, second = _products(result)
    assert second.args[0] is first
    assert first.meta["val"].dtype == torch.uint8
    assert second.meta["val"].dtype == torch.float32
    _assert_same_codes(program, result, X)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_an_activation_after_a_bfloat16_product_is_done_on_its_sums(activation: nn.Module) -> None:
    model, x = _chain(activation).to(torch.bfloat16), X.to(torch.bfloat16)
    program, result = _selected(Int8Linear(mode="static", where="always"), model, x)
    assert result.changes.fired["ActivationInside"] == 1
    (before,), (after,) = evaluate(program, (x,)), evaluate(result, (x,))
    assert after.dtype == torch.bfloat16
    assert Sqnr(30.0).measure(before, after).holds


def test_signed_static_inputs_become_unsigned_on_a_cpu() -> None:
    signed = Int8Linear(mode="static", activations="symmetric")
    program, result = _selected(signed, _chain(nn.GELU()), X)
    more = {"UnsignedActivations": 2, "UnsignedOutput": 1}
    assert result.changes.fired == {**CHAIN_FIRES, **more}
    for product in _products(result):
        assert product.args[0].meta["val"].dtype == torch.uint8  # type: ignore[union-attr]
        assert int(result.tensor(str(product.args[2].target))) == 128  # type: ignore[union-attr]
    _assert_same_codes(program, result, X)


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x)


def test_a_signed_input_that_two_share_is_shifted_once() -> None:
    signed = Int8Linear(mode="static", activations="symmetric")
    program, result = _selected(signed, Fork(), X)
    shifts = [n for n in result.graph.nodes if n.target is ops.shift_to_unsigned.default]
    assert len(shifts) == 1
    assert len(_products(result)) == 2
    _assert_same_codes(program, result, X)


def test_affine_tokens_are_one_operator_with_the_sums_of_the_weight() -> None:
    with native.without():
        program, result = _selected(Int8Linear(activations="affine"), Residual(), X)
    assert result.changes.fired == {"SelectAffineInt8Linear": 2}
    (sums,) = [name for name in result.state if name == "first.weight_int8_sums"]
    weight = result.tensor("first.weight_int8")
    assert torch.equal(result.tensor(sums).long(), weight.long().sum(-1))
    (before,), (after,) = evaluate(program, (X,)), evaluate(result, (X,))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("activations", ["symmetric", "affine"])
def test_a_linear_of_tokens_is_one_kernel_with_its_activation_and_cast(
    activations: Literal["symmetric", "affine"], activation: nn.Module
) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 8), activation)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x).to(torch.bfloat16)  # type: ignore[no-any-return]

    program, result = _selected(Int8Linear(activations=activations), Cast(), X)
    select = "SelectInt8Linear" if activations == "symmetric" else "SelectAffineInt8Linear"
    once = dict.fromkeys((select, "FuseInt8Linear", "ActivationInside", "CastInside"), 1)
    assert result.changes.fired == once
    (before,), (after,) = evaluate(program, (X,)), evaluate(result, (X,))
    assert after.dtype == torch.bfloat16
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-3)


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("activations", ["symmetric", "affine"])
def test_scale_and_shift_of_channels_are_part_of_quantizing_tokens(
    activations: Literal["symmetric", "affine"],
) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("m", torch.rand(8))
            self.register_buffer("z", torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x * self.m - self.z)  # type: ignore[no-any-return,operator]

    program, result = _selected(Int8Linear(activations=activations), Scaled(), X)
    (call,) = [n for n in result.graph.nodes if n.target is ops.quantize_tokens.default]
    assert [one.op for one in call.args[:3]] == ["placeholder", "get_attr", "get_attr"]
    (before,), (after,) = evaluate(program, (X,)), evaluate(result, (X,))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("activations", ["symmetric", "affine"])
@pytest.mark.parametrize("first", ["static", "dynamic"])
def test_tokens_are_rounded_in_the_product_that_gives_them(
    first: Literal["static", "dynamic"], activations: Literal["symmetric", "affine"]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    by_token = Int8Linear(include="2", activations=activations, where="always")
    before, program = Int8Linear(mode=first, where="always"), _after(by_token, model, X)
    program = replace(before.apply(program, before.plan(program)), changes=Changes())
    result = SelectKernels().apply(program, SelectKernels().plan(program))
    assert result.changes.fired["TokensInside"] == 1
    called = [n.target for n in result.graph.nodes if n.op == "call_function"]
    fused = {
        "static": ops.packed_int8_linear_tokens.default,
        "dynamic": ops.int8_linear_fused_tokens.default,
    }
    assert called.count(fused[first]) == 1
    assert ops.packed_int8_linear.default not in called
    assert called.count(ops.quantize_tokens.default) == (0 if first == "static" else 1)
    _assert_same_codes(program, result, X)


@pytest.mark.usefixtures("compiled_kernels")
def test_tokens_of_bfloat16_are_read_as_they_are() -> None:
    class Widened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.to(torch.float32))  # type: ignore[no-any-return]

    x = X.to(torch.bfloat16)
    program, result = _selected(Int8Linear(), Widened(), x)
    (call,) = [n for n in result.graph.nodes if n.target is ops.quantize_tokens.default]
    assert call.args[0].op == "placeholder"
    (before,), (after,) = evaluate(program, (x,)), evaluate(result, (x,))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("compiled_kernels")
def test_float64_keeps_the_product_apart() -> None:
    model, x = nn.Linear(8, 8).double(), X.double()
    _, result = _selected(Int8Linear(), model, x)
    assert result.changes.fired == {"SelectInt8Linear": 1}
    assert "it computes in torch.float64, which the fused kernel" in str(result.changes.refused)


def test_an_output_that_two_read_stays_float() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(y) + y

    program, result = _selected(Int8Linear(mode="static"), Both(), X)
    assert result.changes.fired == {"SelectPackedInt8Linear": 2}
    assert any("is also used by" in refusal.reason for refusal in result.changes.refused)
    _assert_same_codes(program, result, X)


def test_float64_has_no_packed_product() -> None:
    model, x = _chain(nn.ReLU()).double(), X.double()
    program = _after(Int8Linear(mode="static", where="always"), model, x)
    plan = SelectKernels().plan(program)
    text = "it computes in torch.float64; the kernel gives float32 and bfloat16"
    assert {refusal.reason for refusal in plan.refusals} == {text}
    result = SelectKernels().apply(program, plan)
    assert result.changes.fired == {"SelectInt8WeightOnlyLinear": 2}
    _assert_same_codes(program, result, x)
    timed = Int8Linear(mode="static").plan(capture(model, (x,)))
    assert not timed.sites
    assert "it can't run: packed_int8_linear gives float32" in timed.refusals[0].reason


@pytest.mark.parametrize("fused", [True, False], ids=["one product", "three"])
def test_products_write_bfloat16_for_attention(fused: bool) -> None:
    torch.manual_seed(0)
    model, x = models.Attention(16, 2, False, True), torch.randn(2, 6, 16)
    first = [FuseLinears()] if fused else []
    passes = [*first, Int8Linear(mode="static"), HalfAttention(force=True), SelectKernels()]
    opt = fxopt.transform(model, passes, example_inputs=(x,))
    kinds = [product.meta["val"].dtype for product in _products(opt.program)]
    assert kinds == [torch.bfloat16] * (1 if fused else 3) + [torch.float32]
    casts = [n for n in opt.program.graph.nodes if n.target is torch.ops.aten.to.dtype]
    assert [node.args[1] for node in casts] == [torch.float32]


def test_kernels_are_selected_before_the_first_pass_of_their_level() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    opt = fxopt.transform(model, "int8-linear{mode=static}, prepack", example_inputs=(X,))
    names = [step.name for step in opt.report.steps]
    assert names == ["capture", "int8-linear", "select-kernels", "prepack"]
    plain = fxopt.transform(model, "prepack", example_inputs=(X,))
    assert [step.name for step in plain.report.steps] == ["capture", "prepack"]
    own = fxopt.transform(model, "int8-linear, prepack, select-kernels", example_inputs=(X,))
    assert [step.name for step in own.report.steps].count("select-kernels") == 1


def test_bfloat16_attention_that_does_not_fit_is_refused() -> None:
    x = torch.randn(3, 40, 32, dtype=torch.bfloat16)

    class Flat(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q)

    result = check(Prepack(), Flat(), (x,), 0)
    assert "its inputs are not of rank 4" in [r.reason for r in result.changes.refused]
    program = capture(Attention(), (torch.zeros(2, 1100, 32, dtype=torch.bfloat16),))
    with native.without():
        assert "it is too long to write its scores to memory" in str(Prepack().plan(program))


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_becomes_two_passes(affine: bool) -> None:
    model = nn.LayerNorm(8, elementwise_affine=affine)
    result = check(Prepack(), model, (torch.randn(3, 5, 8),), {"TwoPassNorm": 1})
    assert any(node.target is ops.layer_norm.default for node in result.graph.nodes)


def test_norms_that_do_not_fit_are_refused() -> None:
    result = check(Prepack(), nn.LayerNorm((5, 8)), (torch.randn(3, 5, 8),), 0)
    assert result.changes.refused[0].reason == "it normalises several axes at once"
    result = check(Prepack(), nn.LayerNorm(8).double(), (torch.randn(3, 8).double(),), 0)
    assert result.changes.refused[0].reason == (
        "it is in torch.float64 on cpu; two passes are for float32 on CPUs"
    )


class Layer(nn.Module):
    """Attention and a feed-forward part, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = models.Attention(32, 2, False, True)
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.attention(x))
        return x + self.down(nn.functional.gelu(self.up(x)))


class Faulty(Rule):
    """`inner`, with its result half as large again, or, where it holds codes, reversed."""

    def __init__(self, inner: Rule) -> None:
        self.inner = inner

    @property
    def name(self) -> str:
        return self.inner.name

    def targets(self) -> tuple[Target, ...]:
        return self.inner.targets()

    def match(self, node: fx.Node) -> Match | None:
        return self.inner.match(node)

    def reason_to_refuse(self, match: Match) -> str | None:
        return self.inner.reason_to_refuse(match)

    def rewrite(self, match: Match, edit: Edit) -> fx.Node | Sequence[fx.Node]:
        made = self.inner.rewrite(match, edit)
        results = (made,) if isinstance(made, fx.Node) else tuple(made)
        wrong = [self._spoiled(node, edit) for node in results]
        return wrong[0] if isinstance(made, fx.Node) else wrong

    def _spoiled(self, node: fx.Node, edit: Edit) -> fx.Node:
        if node.meta["val"].dtype.is_floating_point:
            return edit.call(torch.ops.aten.mul.Tensor, node, 1.5)
        return edit.call(torch.ops.aten.flip.default, node, [-1])


@dataclass(frozen=True, repr=False)
class OneFault(RulePass):
    """`inner` with one of its rules faulty."""

    inner: RulePass
    guilty: str
    name: ClassVar[str] = "one-fault"
    stage: ClassVar[Stage] = Stage.ANY

    @property
    def claim(self) -> Claim:  # type: ignore[override]
        return self.inner.claim

    def rules(self, program: Program) -> Sequence[Rule]:
        rules = self.inner.rules(program)
        return [Faulty(rule) if rule.name == self.guilty else rule for rule in rules]


STATIC = [Int8Linear(mode="static")]
SIGNED = [Int8Linear(mode="static", activations="symmetric")]
HALF = [HalfAttention(force=True)]
GUILTY: list[tuple[list[Pass], RulePass, str]] = [
    ([Int8Linear()], SelectKernels(), "SelectInt8Linear"),
    ([Int8Linear(activations="affine")], SelectKernels(), "SelectAffineInt8Linear"),
    ([Int8Linear(mode="weight_only")], SelectKernels(), "SelectInt8WeightOnlyLinear"),
    (STATIC, SelectKernels(), "SelectPackedInt8Linear"),
    (STATIC, SelectKernels(), "ActivationInside"),
    (STATIC, SelectKernels(), "QuantizeInside"),
    (SIGNED, SelectKernels(), "UnsignedActivations"),
    (SIGNED, SelectKernels(), "UnsignedOutput"),
    ([*STATIC, *HALF], SelectKernels(), "CastInside"),
    ([], HALF[0], "RoundAttention"),
    ([], HALF[0], "CastBeforeView"),
    ([FuseLinears()], HALF[0], "CastBeforeSplit"),
    (STATIC, HALF[0], "RoundAttention"),
    ([], Prepack(), "PackAttention"),
    ([], Prepack(), "TwoPassNorm"),
    (STATIC, Prepack(), "TwoPassNorm"),
]


@pytest.mark.parametrize(
    ("before", "inner", "guilty"), GUILTY, ids=[f"{g}-{len(b)}" for b, _, g in GUILTY]
)
def test_a_fault_in_any_rule_is_caught(before: list[Pass], inner: RulePass, guilty: str) -> None:
    assert_fault_is_caught(before, inner, guilty)


@pytest.mark.usefixtures("compiled_kernels")
def test_a_fault_in_attention_in_bfloat16_is_caught() -> None:
    assert_fault_is_caught(HALF, Prepack(), "PackAttention")


def test_attention_in_bfloat16_is_written_out_without_compiled_kernels() -> None:
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(4))
    with native.without():
        step = fxopt.transform(Layer(), [*HALF, Prepack()], example_inputs=(x,)).report.steps[-1]
    assert step.fired["WriteOutAttention"] == 1
    assert "PackAttention" not in step.fired


def assert_fault_is_caught(before: list[Pass], inner: RulePass, guilty: str) -> None:
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(4))
    right = fxopt.transform(Layer(), [*before, inner], example_inputs=(x,))
    assert right.report.steps[-1].fired[guilty] >= 1
    with pytest.raises(EquivalenceError, match="broke its claim") as caught:
        fxopt.transform(Layer(), [*before, OneFault(inner, guilty)], example_inputs=(x,))
    assert "OneFault" in str(caught.value)
