"""Float8Linear: what it rewrites, what it refuses and why, and the kernel that it becomes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxopt import Close, Float8Linear, PassError, Sqnr
from fxopt.capture import capture
from fxopt.device import Device, pretending
from fxopt.interpreter import evaluate
from fxopt.kernels.float8 import FLOAT8
from fxopt.passes.quantization.float8_linear import SelectFloat8Linear
from fxopt.rewriting import SingleRule
from tests.check import check
from tests.models import IntegerLinear, LinearsOnTwoInputs, TiedHead

FORCED = Float8Linear(force=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_and_shared_inputs_are_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = LinearsOnTwoInputs().to(dtype)
    result = check(FORCED, model, (torch.randn(3, 8, dtype=dtype),), {"QuantizeFloat8Linear": 3})
    eights = {name for name, tensor in result.state.items() if tensor.dtype == FLOAT8}
    assert eights == {"a.weight_float8", "b_float8"}
    rounded = [node for node in result.graph.nodes if "quantize_float8" in str(node.target)]
    assert len(rounded) == 2


def test_a_device_without_the_units_is_refused_with_its_reason() -> None:
    result = check(Float8Linear(), nn.Linear(8, 8), (torch.randn(3, 8),), 0)
    (refusal,) = result.changes.refused
    reason = Device.describe("cpu").accelerates(FLOAT8).reason
    assert refusal.reason == f"{reason}; force=True does it all the same"
    assert "no CPU kernel multiplies torch.float8_e4m3fn natively" in reason


def test_a_device_with_the_units_needs_no_force() -> None:
    h100 = Device("cuda", "H100", capability=(9, 0))
    with pretending(h100):
        check(Float8Linear(), nn.Linear(8, 8), (torch.randn(3, 8),), 1)
    a100 = Device("cuda", "A100", capability=(8, 0))
    with pretending(a100):
        result = check(Float8Linear(), nn.Linear(8, 8), (torch.randn(3, 8),), 0)
    assert "capability 8.0, needs 8.9" in result.changes.refused[0].reason


def test_a_tied_head_is_left_out_unless_asked_for() -> None:
    model, ids = TiedHead(), torch.randint(0, 20, (3, 5))
    result = check(FORCED, model, (ids,), 1)
    assert "embedding.weight is tied: embedding reads it too" in result.changes.refused[0].reason
    check(Float8Linear(tied=True, force=True), model, (ids,), 2)


def test_include_and_exclude_are_globs_over_module_paths() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))
    x = (torch.randn(3, 8),)
    result = check(Float8Linear(exclude="3", force=True), model, x, 2)  # type: ignore[arg-type]
    assert "in exclude=('3',)" in result.changes.refused[0].reason
    result = check(Float8Linear(include=("0", "2"), force=True), model, x, 2)
    assert "not in include=('0', '2')" in result.changes.refused[0].reason
    with pytest.raises(PassError, match=r"Float8Linear\(include=\(3,\)\): give globs over module"):
        Float8Linear(include=(3,))  # type: ignore[arg-type]


def test_integer_and_empty_weights_are_refused() -> None:
    result = check(FORCED, IntegerLinear(), (torch.randint(-5, 5, (3, 8)),), 0)
    assert "torch.int64, not floating point" in result.changes.refused[0].reason
    result = check(FORCED, nn.Linear(8, 0), (torch.randn(3, 8),), 0)
    assert result.changes.refused[0].reason == "its weight is empty"


def test_one_input_feature_works() -> None:
    check(FORCED, nn.Linear(1, 5), (torch.randn(3, 1),), 1)


def test_the_claim_can_be_replaced() -> None:
    assert Float8Linear().claim == Sqnr(10.0)
    assert Float8Linear(claim=Close(0.1)).claim == Close(0.1)
    assert repr(FORCED) == "Float8Linear(force=True)"


@pytest.mark.parametrize("bias", [True, False])
def test_a_region_becomes_one_operator(bias: bool) -> None:
    x = torch.randn(5, 24)
    program = capture(nn.Linear(24, 7, bias=bias), (x,))
    program = FORCED.apply(program, FORCED.plan(program))
    select = SingleRule(SelectFloat8Linear())
    result = select.apply(program, select.plan(program))
    assert result.changes.fired["SelectFloat8Linear"] == 1
    assert any(node.target is torch.ops.fxopt.float8_linear.default for node in result.graph.nodes)
    (before,), (after,) = evaluate(program, (x,)), evaluate(result, (x,))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_int8_regions_are_not_taken() -> None:
    from fxopt import Int8Linear

    program = capture(nn.Linear(8, 8), (torch.randn(3, 8),))
    program = Int8Linear().apply(program, Int8Linear().plan(program))
    assert not SingleRule(SelectFloat8Linear()).plan(program).sites
