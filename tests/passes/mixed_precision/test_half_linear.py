"""HalfLinear: what is rounded, what stays and why, and what it keeps on any model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxopt
from fxopt import HalfLinear, PassError, Sqnr, wellformed
from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.device import Device
from fxopt.interpreter import evaluate
from fxopt.pass_list import parse_passes
from fxopt.passes.mixed_precision.half_linear import as_layer
from fxopt.program import Program
from tests.check import assert_close_to_model, assert_unchanged, check
from tests.models import Drawn, LinearsOnTwoInputs, TiedHead, models
from tests.sweeps import in_parts

aten = torch.ops.aten
DTYPES = (torch.bfloat16, torch.float16)
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
AVX512_BF16 = "cpu:avx512_bf16"


def forced(dtype: torch.dtype, **options: Any) -> HalfLinear:
    return HalfLinear(dtype, force=True, **options)


def casts(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is aten.to.dtype]


def layers(program: Program) -> list[Any]:
    return [layer for node in program.graph.nodes if (layer := as_layer(node, True)) is not None]


class Convolutions(nn.Module):
    """Every rank, padded by a word, transposed, and spelled as aten does, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.padded = nn.Conv2d(4, 4, 3, padding="same", groups=2)
        self.upward = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.rank1, self.up1 = nn.Conv1d(4, 4, 3, bias=False), nn.ConvTranspose1d(4, 4, 3)
        self.rank3, self.up3 = nn.Conv3d(4, 4, 1), nn.ConvTranspose3d(4, 2, 1)
        self.kernel = nn.Parameter(torch.randn(2, 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.max_pool2d(torch.relu(self.first(x)), 2)
        y = self.upward(self.padded(y))
        y = self.up1(self.rank1(y.flatten(2))).reshape(y.shape)
        y = self.up3(self.rank3(y[:, :, None])).squeeze(2)
        return torch.convolution(y, self.kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_shared_inputs_are_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    result = check(forced(dtype), LinearsOnTwoInputs(), (torch.randn(3, 8),), {"RoundLayer": 3})
    name = NAMES[dtype]
    assert set(result.state) == {f"a.weight_{name}", f"a.bias_{name}", f"b_{name}"}
    assert all(tensor.dtype == dtype for tensor in result.state.values())
    down = [node for node in casts(result) if node.args[1] == dtype]
    assert [str(node.args[0]) for node in down] == ["x", "sin"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolutions_hand_each_other_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    result = check(forced(dtype), Convolutions(), (torch.randn(2, 3, 14, 14),), {"RoundLayer": 8})
    first, last = casts(result)
    assert str(first.args[0]) == "x"
    assert last.target is aten.to.dtype
    assert last.args[1] == torch.float32
    assert {tensor.dtype for tensor in result.state.values()} == {dtype}


def test_a_transposed_weight_is_rounded_ahead() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight.t())

    result = check(forced(torch.bfloat16), Turned(), (torch.randn(3, 8),), 1)
    assert len(casts(result)) == 2
    assert set(result.state) == {"weight_bfloat16", "bias_bfloat16"}


def test_casts_that_other_passes_left_cancel() -> None:
    torch.manual_seed(0)
    attention = fxopt.HalfAttention(force=True)
    x = torch.randn(2, 6, 16)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind()
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).flatten(2))

    opt = fxopt.transform(Block(), [attention, forced(torch.bfloat16)], example_inputs=(x,))
    assert [step.fired for step in opt.report.steps[-2:]] == [
        {"RoundAttention": 1, "CastBeforeSplit": 1, "CastBeforeView": 2},
        {"RoundLayer": 2, "CancelCasts": 1},
    ]
    assert len(casts(opt.program)) == 2


def test_a_device_without_the_units_is_refused_with_its_reason() -> None:
    pass_ = HalfLinear(torch.float16, device=AVX512_BF16)
    result = check(pass_, nn.Linear(8, 8), (torch.randn(3, 8),), 0)
    (refusal,) = result.changes.refused
    assert refusal.reason == (
        "a CPU with avx512_bf16 has no instruction that multiplies torch.float16 (none of "
        "amx_fp16, avx512_fp16): it would be emulated, slower than float32; force=True does it "
        "all the same"
    )
    result = check(replace(pass_, force=True), nn.Linear(8, 8), (torch.randn(3, 8),), 1)
    assert set(result.state) == {"weight_float16", "bias_float16"}


def test_this_machine_is_asked_where_no_device_is_given() -> None:
    for dtype in DTYPES:
        answer = Device.describe("cpu").accelerates(dtype)
        check(HalfLinear(dtype), nn.Linear(8, 8), (torch.randn(3, 8),), int(answer.yes))


@pytest.mark.parametrize(
    ("device", "weight"),
    [
        ("cuda:8.0", "weight_bfloat16"),
        ("cuda:7.5", "weight_float16"),
        ("cpu:avx512_bf16+avx512_fp16", "weight_bfloat16"),
    ],
)
def test_auto_is_what_the_device_multiplies(device: str, weight: str) -> None:
    model = nn.Linear(8, 8, bias=False)
    result = check(HalfLinear(device=device), model, (torch.randn(3, 8),), 1)
    assert set(result.state) == {weight}


def test_auto_on_a_device_with_neither_says_why_not() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False)), (torch.randn(3, 8),)
    result = check(HalfLinear(device="cpu:none"), model, x, 0)
    assert len(result.changes.refused) == 2
    for refusal in result.changes.refused:
        assert "multiplies torch.bfloat16" in refusal.reason
        assert "multiplies torch.float16" in refusal.reason
    result = check(HalfLinear(device="cpu:none", force=True), model, x, 2)
    assert {tensor.dtype for tensor in result.state.values()} == {torch.bfloat16}


def test_a_tied_head_is_left_out_unless_asked_for() -> None:
    model, ids = TiedHead(), torch.randint(0, 20, (3, 5))
    result = check(forced(torch.bfloat16), model, (ids,), 1)
    assert "embedding.weight is tied: embedding reads it too" in result.changes.refused[0].reason
    result = check(forced(torch.bfloat16, tied=True), model, (ids,), 2)
    assert {"embedding.weight", "embedding.weight_bfloat16"} <= set(result.state)


def test_include_and_exclude_are_globs_over_module_paths() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.ReLU(), nn.Conv1d(8, 8, 1), nn.Flatten())
    x = (torch.randn(3, 8, 2),)
    result = check(forced(torch.bfloat16, exclude="2"), model, x, 1)
    assert result.changes.refused[0].reason == "in exclude=('2',)"
    result = check(forced(torch.bfloat16, include=("2",)), model, x, 1)
    assert result.changes.refused[0].reason == "not in include=('2',)"


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv1d(x, self.weight.softmax(0))


class Integers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-3, 3, (4, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (
            nn.Linear(8, 8).double(),
            torch.randn(3, 8).double(),
            "its weight is torch.float64; only float32 is rounded to half precision",
        ),
        (
            Integers(),
            torch.randint(-5, 5, (3, 8)),
            "its weight is torch.int64; only float32 is rounded to half precision",
        ),
        (nn.Linear(8, 0), torch.randn(3, 8), "its weight is empty"),
        (Computed(), torch.randn(2, 4, 3), "its weight softmax is computed, not constant"),
    ],
    ids=["float64", "integers", "empty", "computed"],
)
def test_what_does_not_fit_is_refused(model: nn.Module, x: Tensor, reason: str) -> None:
    result = check(forced(torch.bfloat16), model, (x,), 0)
    assert [refusal.reason for refusal in result.changes.refused] == [reason]


def test_a_model_in_half_precision_already_is_left_as_it_is() -> None:
    model = nn.Linear(8, 8).bfloat16()
    plan = forced(torch.bfloat16).plan(capture(model, (torch.randn(3, 8).bfloat16(),)))
    assert not plan.sites
    assert not plan.refusals


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "x",
    [torch.randn(3, 1), torch.randn(4, 2, 1), torch.randn(1)],
    ids=["matrix", "batch", "vector"],
)
def test_one_input_feature_and_any_rank_work(dtype: torch.dtype, x: Tensor) -> None:
    torch.manual_seed(0)
    check(forced(dtype), nn.Linear(1, 5, bias=False), (x,), 1)


def test_empty_inputs_work() -> None:
    program = capture(nn.Linear(4, 5), (torch.randn(3, 4),))
    result = (pass_ := forced(torch.bfloat16)).apply(program, pass_.plan(program)).materialized()
    (output,) = evaluate(result, (torch.randn(0, 4),))
    assert output.shape == (0, 5)
    assert output.dtype == torch.float32


class Large(nn.Module):
    """Three layers of which one has an output, one a weight that float16 can't hold."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.next, self.heavy = (nn.Linear(4, 4, bias=False) for _ in range(3))
        with torch.no_grad():
            self.wide.weight.copy_(torch.eye(4) * 1000)
            self.heavy.weight.fill_(1e5)

    def forward(self, x: Tensor) -> Tensor:
        return self.next(torch.tanh(self.wide(x))) + torch.tanh(self.heavy(x))


def test_what_leaves_the_range_of_float16_is_caught_by_the_plan() -> None:
    small, large = torch.full((40, 4), 0.5), torch.full((40, 4), 71.0)
    pass_ = forced(torch.float16)
    program = capture(Large(), (small,))
    plan = pass_.plan(program)
    assert [str(refusal) for refusal in plan.refusals] == [
        "heavy (linear_2): its weight heavy_weight: its values reach 1e+05, past float16's "
        "largest, 65504; its values reach 2e+05, past float16's largest, 65504"
    ]
    calibrated = replace(program, calibration=Calibration([small, large], program.signature))
    plan = pass_.plan(calibrated)
    assert "wide (linear): its values reach 7.1e+04, past float16's largest, 65504" in [
        str(refusal) for refusal in plan.refusals
    ]
    result = pass_.apply(calibrated, plan)
    assert result.changes.fired == {"RoundLayer": 1}
    assert evaluate(result.materialized(), (large,))[0].isfinite().all()
    assert not forced(torch.bfloat16).plan(calibrated).refusals


def test_an_input_past_the_range_is_named() -> None:
    plan = forced(torch.float16).plan(capture(nn.Linear(2, 2), (torch.full((3, 2), 1e6),)))
    assert plan.refusals[0].reason.startswith(
        "its input input_1: its values reach 1e+06, past float16's largest, 65504"
    )


def test_ranges_learnt_from_the_example_alone_are_doubted() -> None:
    program = capture(nn.Linear(4, 4), (torch.randn(3, 4),))
    (warning,) = forced(torch.float16).plan(program).warnings
    assert warning.startswith("calibrated on the example alone (3 x 4)")
    assert not forced(torch.bfloat16).plan(program).warnings


def test_sites_can_be_taken_out_of_the_plan() -> None:
    program = capture(LinearsOnTwoInputs(), (torch.randn(3, 8),))
    pass_ = forced(torch.float16)
    plan = pass_.plan(program)
    spared = plan.without([plan.sites[0].node])
    assert pass_.apply(program, spared).changes.fired == {"RoundLayer": 2}
    assert "half is torch.float16" in str(plan)


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_keeps_float32_masters(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(16, 6)
    program = capture(model.train(), (x,), mode="train")
    pass_ = forced(dtype)
    result = pass_.apply(program, pass_.plan(program))
    wellformed.check(result)
    assert_unchanged(pass_, result)
    assert all(result.state[name] is program.state[name] for name in program.state)
    gradients = []
    for one in (program, result):
        model.zero_grad()
        evaluate(one, (x,))[0].square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for wanted, got in zip(*gradients, strict=True):
        assert wanted is not None
        assert got is not None
        assert got.dtype == torch.float32
        assert not torch.equal(wanted, got)
        torch.testing.assert_close(got, wanted, rtol=0.0, atol=0.02 * wanted.abs().max().item())


def test_training_may_share_a_weight_with_an_embedding() -> None:
    program = capture(TiedHead().train(), (torch.randint(0, 20, (3, 5)),), mode="train")
    pass_ = forced(torch.bfloat16)
    assert len(pass_.plan(program).sites) == 2


@in_parts(20)
@given(models(), st.sampled_from(DTYPES))
def test_any_model_is_well_formed_smaller_and_close(drawn: Drawn, dtype: torch.dtype) -> None:
    program = capture(drawn.model, drawn.example)
    pass_ = forced(dtype, tied=True)
    result = pass_.apply(program, pass_.plan(program))
    wellformed.check(result)
    assert_unchanged(pass_, result)
    before = layers(program)
    is_double = any(layer.weight.meta["val"].dtype == torch.float64 for layer in before)
    assert result.changes.fired.get("RoundLayer", 0) == (0 if is_double else len(before))
    for layer in layers(result):
        assert layer.weight.op == "get_attr"
        assert layer.weight.meta["val"].dtype == (torch.float64 if is_double else dtype)
    read = [node for node in casts(result) if node.args[0].op == "get_attr"]  # type: ignore[union-attr]
    assert not read, "a constant is cast at every call"
    for call in (drawn.example, *drawn.others):
        assert_close_to_model(pass_.claim, drawn.model, result.materialized(), call)


def test_options_are_checked() -> None:
    assert HalfLinear().claim == HalfLinear("bfloat16").claim == Sqnr(30.0)  # type: ignore[arg-type]
    assert HalfLinear("float16").claim == Sqnr(45.0)  # type: ignore[arg-type]
    assert repr(HalfLinear()) == "HalfLinear()"
    shown = "HalfLinear(dtype=torch.float16, exclude=('*.head',), device='cuda:7.5')"
    pass_ = HalfLinear("float16", exclude="*.head", device=Device.parse("cuda:7.5"))  # type: ignore[arg-type]
    assert repr(pass_) == shown
    assert eval(shown) == pass_
    assert pass_.spec == "half-linear{dtype=torch.float16, exclude=*.head, device=cuda:7.5}"
    assert parse_passes(pass_.spec) == (pass_,)
    described = "half-linear{force=True, device=cpu:amx_bf16+avx512_bf16}"
    assert parse_passes(described)[0].spec == described


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "int8"},
            "HalfLinear(dtype='int8'): give \"auto\", torch.bfloat16 or torch.float16",
        ),
        (
            {"dtype": torch.float32},
            'HalfLinear(dtype=torch.float32): give "auto", torch.bfloat16 or torch.float16',
        ),
        ({"force": 1}, "HalfLinear(force=1): give True or False"),
        ({"tied": "no"}, "HalfLinear(tied='no'): give True or False"),
        ({"include": (3,)}, "HalfLinear(include=(3,)): give globs over module paths"),
        (
            {"device": "cuda:0"},
            "HalfLinear(device='cuda:0'): 'cuda:0' gives no compute capability: write it as "
            "cuda:8.0 (A100) or cuda:9.0 (H100)",
        ),
    ],
)
def test_wrong_options_say_what_to_give(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError) as caught:
        HalfLinear(**options)
    assert str(caught.value) == message
