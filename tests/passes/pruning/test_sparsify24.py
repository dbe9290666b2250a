"""Sparsify24: what it masks, what it refuses and why, and the kernel that it becomes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt import Close, EquivalenceError, HalfLinear, PassError, SelectKernels, Sparsify24, Sqnr
from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.claim import sqnr
from fxopt.device import Device, pretending
from fxopt.interpreter import evaluate
from fxopt.kernels.sparse24 import is_sparse24
from fxopt.passes.kernel_selection.select_sparse24 import SelectSparse24Linear
from fxopt.program import Changes, Program
from fxopt.rewriting import SingleRule
from fxopt.saving import load, save
from tests.check import check
from tests.models import IntegerLinear, LinearsOnTwoInputs, SharedLinear, TiedHead, TiedLinears
from tests.sweeps import in_parts

ops = torch.ops.fxopt
FORCED = Sparsify24(force=True)
ANYTHING = Close(1e6)
IMPORTANCES = ["magnitude", "wanda", "sparsegpt"]


def mixed(rows: int, channels: int = 64, seed: int = 0) -> Tensor:
    """Inputs that are correlated and of unequal size, as activations are."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(channels, channels, generator=generator)
    mixing *= torch.logspace(-1, 0.5, channels)
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed)) @ mixing / 8


def calibrated(model: nn.Module, batches: list[Tensor]) -> Program:
    program = capture(model.eval(), (batches[0],))
    return replace(program, calibration=Calibration(batches, program.signature))


def applied(pass_: fxopt.Pass, program: Program) -> Program:
    return replace(pass_.apply(program, pass_.plan(program)), changes=Changes())


@contextmanager
def on(monkeypatch: pytest.MonkeyPatch, *capability: int) -> Iterator[None]:
    """Inside, the CPU passes for a GPU of this capability, with cuSPARSELt."""
    device = Device("cuda", "GPU", capability=capability)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    with pretending(device):
        yield


@st.composite
def stacks(draw: st.DrawFn) -> tuple[nn.Module, Tensor, Sparsify24, int]:
    """Linears of drawn widths, a pass, and how many of them it takes."""
    widths = draw(st.lists(st.sampled_from([1, 4, 6, 12, 64, 100]), min_size=2, max_size=4))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layers = [nn.Linear(*pair, bias=draw(st.booleans())) for pair in itertools.pairwise(widths)]
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    with torch.no_grad():
        for layer in layers:
            kind = draw(st.sampled_from(["plain", "equal", "outlier", "denormal"]))
            if kind == "equal":
                layer.weight.fill_(0.1)
            elif kind == "outlier":
                layer.weight[0, 0] = 30.0
            elif kind == "denormal" and dtype != torch.bfloat16:
                layer.weight[1:] *= 1e-40
    pass_ = Sparsify24(draw(st.sampled_from(IMPORTANCES)), force=True, claim=ANYTHING)
    fits = sum(width % 4 == 0 for width in widths[:-1])
    return nn.Sequential(*layers).to(dtype), torch.randn(5, widths[0]).to(dtype), pass_, fits


@in_parts(25)
@given(stacks())
def test_every_masked_weight_is_2_to_4(drawn: tuple[nn.Module, Tensor, Sparsify24, int]) -> None:
    model, x, pass_, fits = drawn
    result = check(pass_, model, (x,), fits)
    masked = {name: result.tensor(name) for name in result.state if name.endswith("_sparse24")}
    assert len(masked) == fits
    for name, weight in masked.items():
        assert is_sparse24(weight)
        original = model.get_parameter(name.removesuffix("_sparse24"))
        assert weight.dtype == original.dtype
        if pass_.importance != "sparsegpt":
            assert ((weight == original) | (weight == 0)).all()
            # Of distinct weights exactly half stay.
            if len(original.unique()) == original.numel():
                assert int((weight != 0).sum()) == original.numel() // 2
    reasons = {refusal.reason for refusal in result.changes.refused}
    assert all("is no multiple of 4" in reason for reason in reasons)


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_spelling_and_shared_weights(dtype: torch.dtype, importance: Any) -> None:
    torch.manual_seed(0)
    model, x = LinearsOnTwoInputs().to(dtype), torch.randn(30, 8, dtype=dtype)
    pass_ = Sparsify24(importance, force=True)
    result = check(pass_, model, (x,), {"MaskLinear": 3}, calibration=[(x,)])
    assert {name for name in result.state if "sparse24" in name} == {
        "a.weight_sparse24",
        "b_sparse24",
    }
    assert is_sparse24(result.tensor("b_sparse24"))
    for tied in (SharedLinear(8), TiedLinears(8)):
        result = check(replace(pass_, claim=ANYTHING), tied.to(dtype), (x,), 2)
        assert sum("sparse24" in name for name in result.state) == 1


def test_a_device_without_sparse_tensor_cores_is_refused_with_its_reason() -> None:
    result = check(Sparsify24(), nn.Linear(8, 8), (torch.randn(3, 8),), 0)
    (refusal,) = result.changes.refused
    reason = Device.describe("cpu").sparse24().reason
    assert reason.endswith("has no sparse tensor cores")
    assert refusal.reason == (f"{reason}: zeros save nothing there; force=True masks all the same")


def test_forced_says_that_nothing_runs_faster() -> None:
    program = capture(nn.Linear(8, 8), (torch.randn(3, 8),))
    assert "has no sparse tensor cores: force=True masks the weights, and nothing runs" in str(
        FORCED.plan(program)
    )
    opt = fxopt.transform(nn.Linear(8, 8), [FORCED], example_inputs=(torch.randn(3, 8),))
    assert "nothing runs" in str(opt.report)
    assert "refused" not in str(opt.report)


def test_a_device_with_the_units_needs_no_force() -> None:
    program = capture(nn.Linear(8, 8), (torch.randn(3, 8),))
    plan = Sparsify24(device="cuda:8.0").plan(program)
    assert len(plan.sites) == 1
    assert plan.warnings == (
        "1 of 1 masked weights are torch.float32, which torch multiplies densely: put "
        "HalfLinear() after Sparsify24()",
    )
    half = capture(nn.Linear(8, 8).half(), (torch.randn(3, 8).half(),))
    assert not Sparsify24(device="cuda:9.0").plan(half).warnings
    (refusal,) = Sparsify24(device="cuda:7.5").plan(program).refusals
    assert "no sparse tensor cores: capability 7.5, needs 8.0" in refusal.reason


def test_a_weight_that_is_2_to_4_already_is_left_alone() -> None:
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight[:, 1::2] = 0.0
    result = check(FORCED, layer, (torch.randn(3, 8),), 0)
    assert result.changes.refused[0].reason == "its weight is 2:4 sparse already"
    with torch.no_grad():
        layer.weight[3, 1] = 1.0
    check(FORCED, layer, (torch.randn(3, 8),), 1)


def test_what_cannot_be_masked_is_refused() -> None:
    result = check(FORCED, nn.Linear(6, 8), (torch.randn(3, 6),), 0)
    assert result.changes.refused[0].reason == "its K = 6 is no multiple of 4"
    result = check(FORCED, IntegerLinear(), (torch.randint(0, 5, (3, 8)),), 0)
    assert "torch.int64, not floating point" in result.changes.refused[0].reason
    program = capture(layer := nn.Linear(8, 8), (torch.randn(3, 8),))
    with torch.no_grad():
        layer.weight[2, 3] = float("nan")
    assert FORCED.plan(program).refusals[0].reason == "its weight holds NaN or infinity"


def test_a_tied_head_is_left_out_unless_asked_for() -> None:
    torch.manual_seed(0)
    model, ids = TiedHead(), torch.randint(0, 20, (3, 5))
    result = check(FORCED, model, (ids,), 1)
    assert "embedding.weight is tied: embedding reads it too" in result.changes.refused[0].reason
    check(replace(FORCED, tied=True), model, (ids,), 2)


def test_include_and_exclude_choose_by_module_path() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = (torch.randn(3, 8),)
    result = check(replace(FORCED, exclude="1"), model, x, 1)
    assert "0.weight_sparse24" in result.state
    result = check(replace(FORCED, include=(lambda path: path == "1",)), model, x, 1)
    assert "0.weight" in result.state


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"importance": "loud"},
            "give one of 'magnitude', 'wanda', 'sparsegpt'",
        ),
        ({"force": 1}, "Sparsify24(force=1): give True or False"),
        ({"device": "tpu"}, "Sparsify24(device='tpu'): no device is called 'tpu'"),
        ({"include": (3,)}, "Sparsify24(include=(3,)): give globs over module paths, or"),
    ],
)
def test_a_wrong_option_is_an_error(options: dict[str, Any], text: str) -> None:
    with pytest.raises(PassError) as caught:
        Sparsify24(**options)
    assert text in str(caught.value)


def test_the_truer_the_importance_the_truer_the_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    program = calibrated(model, [mixed(256, seed=seed) for seed in range(4)])
    x = mixed(200, seed=9)
    truth = model(x).detach()
    found = [
        sqnr(truth, evaluate(applied(Sparsify24(one, force=True), program), (x,))[0])  # type: ignore[arg-type]
        for one in IMPORTANCES
    ]
    magnitude, wanda, sparsegpt = found
    assert 5.0 < magnitude < wanda
    assert wanda < sparsegpt - 1.0


def test_calibration_is_asked_for_and_its_absence_told() -> None:
    program = capture(nn.Linear(64, 8), (mixed(3),))
    wanda = str(Sparsify24("wanda", force=True).plan(program))
    assert "calibrated on the example alone (3 x 64), since calibration= was left out" in wanda
    fitted = str(Sparsify24("sparsegpt", force=True).plan(program))
    assert "was fitted to 3 rows of 64 channels, and can be worse than masked" in fitted
    assert "calibrat" not in str(FORCED.plan(program))


def test_a_layer_that_calibration_never_reached_goes_by_magnitude() -> None:
    torch.manual_seed(0)
    program = capture(nn.Linear(8, 8), (torch.randn(3, 8),))
    nothing = Calibration([torch.zeros(0, 8)], program.signature)
    program = replace(program, calibration=nothing)
    by_magnitude = applied(FORCED, program).tensor("weight_sparse24")
    for one in ("wanda", "sparsegpt"):
        result = applied(Sparsify24(one, force=True), program)  # type: ignore[arg-type]
        assert torch.equal(result.tensor("weight_sparse24"), by_magnitude)


def test_spared_sites_stay_as_they_are() -> None:
    program = calibrated(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), [mixed(100)])
    pass_ = Sparsify24("sparsegpt", force=True)
    plan = pass_.plan(program)
    result = pass_.apply(program, plan.without([plan.sites[0].node]))
    assert {"0.weight", "1.weight_sparse24"} <= set(result.state)


def test_the_claim_catches_what_is_no_longer_the_model() -> None:
    """Inputs whose size hides in the columns that magnitude drops."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight[:, ::2] *= 0.01
    x = torch.randn(64, 8) * torch.tensor([1e4, 1.0]).repeat(4)
    with pytest.raises(EquivalenceError, match=r"Sparsify24\(force=True\) broke its claim"):
        fxopt.transform(layer, [FORCED], example_inputs=(x,))
    opt = fxopt.transform(layer, [Sparsify24("wanda", force=True)], example_inputs=(x,))
    assert opt.steps[0].record.holds
    assert Sparsify24().claim == Sqnr(1.0)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_trained_weights_stay_sparse(importance: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 16)
    pass_ = Sparsify24(importance, force=True)
    # Gradients of a model that was never trained don't survive; the training is to bring it back.
    opt = fxopt.transform(
        model, [pass_], example_inputs=(x,), mode="train", calibration=[x], verify=False
    )
    opt.train()
    optimizer = torch.optim.SGD(opt.parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        (opt(x) - x[:, :4]).square().mean().backward()
        optimizer.step()
    masks = {n: t for n, t in opt.state_dict().items() if n.endswith("_mask24")}
    assert len(masks) == 2
    kept = masks["0.weight_mask24"]
    assert torch.equal(model[0].weight[~kept], before[~kept])
    assert not torch.equal(model[0].weight[kept], before[kept])
    assert is_sparse24(model[0].weight * kept)


def test_transposed_and_shared_weights_are_masked_in_training_too() -> None:
    torch.manual_seed(0)
    model, x = LinearsOnTwoInputs(), torch.randn(16, 8)
    opt = fxopt.transform(model, [FORCED], example_inputs=(x,), mode="train", verify=False)
    constant = fxopt.transform(model, [FORCED], example_inputs=(x,))
    torch.testing.assert_close(opt(x), constant(x))
    torch.testing.assert_close(opt.eval()(x), constant(x))
    masks = [name for name in opt.state_dict() if name.endswith("_mask24")]
    assert sorted(masks) == ["a.weight_mask24", "b_mask24"]


def test_it_is_saved_loaded_and_its_state_goes_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(7, 64)
    opt = fxopt.transform(model, [FORCED], example_inputs=(x,))
    opt.save(tmp_path / "saved")
    again = fxopt.load(tmp_path / "saved")
    assert torch.equal(again(x), opt(x))
    state = {name: tensor.clone() for name, tensor in opt.state_dict().items()}
    assert is_sparse24(state["0.weight_sparse24"])
    assert "0.weight_sparse24" in dict(opt.named_parameters())
    with torch.no_grad():
        for parameter in opt.parameters():
            parameter.zero_()
    assert not torch.equal(again(x), opt(x))
    opt.load_state_dict(state)
    assert torch.equal(again(x), opt(x))


@pytest.mark.parametrize("bias", [True, False])
def test_on_sparse_tensor_cores_it_becomes_one_operator(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bias: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 64)
    program = capture(nn.Linear(64, 32, bias=bias), (x,))
    with on(monkeypatch, 9, 0):
        sparse = applied(HalfLinear(dtype=torch.float16), applied(Sparsify24(), program))
        result = SelectKernels().apply(sparse, SelectKernels().plan(sparse))
        assert {name: n for name, n in result.changes.fired.items() if n} == {
            "SelectSparse24Linear": 1
        }
        targets = [node.target for node in result.graph.nodes]
        assert ops.linear_sparse24.default in targets
        state = result.materialized().state.values()
        dtypes = {str(t.dtype): tuple(t.shape) for t in state if len(t.shape) == 2}
        assert dtypes == {"torch.float16": (32, 32), "torch.uint8": (32, 8)}
        (before,), (after,) = evaluate(sparse, (x,)), evaluate(result, (x,))
        assert torch.equal(before, after)
        save(result.materialized(), tmp_path / "saved")
        loaded = load(tmp_path / "saved").program
        assert torch.equal(evaluate(loaded, (x,))[0], after)


def test_a_linear_that_cannot_run_there_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 64)
    program = applied(FORCED, capture(nn.Linear(64, 32), (x,)))
    select = SingleRule(SelectSparse24Linear(program))
    (refusal,) = select.plan(program).refusals
    assert refusal.reason.endswith("has no sparse tensor cores")
    with on(monkeypatch, 8, 0):
        (refusal,) = select.plan(program).refusals
        assert "torch multiplies 2:4 in float16 and bfloat16, so put HalfLinear()" in refusal.reason
        dense = capture(nn.Linear(64, 32).half(), (x.half(),))
        plan = SingleRule(SelectSparse24Linear(dense)).plan(dense)
        assert not plan.sites
        assert not plan.refusals


@pytest.mark.cuda
@pytest.mark.skipif(
    not Device.describe("cuda").sparse24(), reason=Device.describe("cuda").sparse24().reason
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_lowered_model_runs_on_sparse_tensor_cores(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64)).cuda().to(dtype)
    x = torch.randn(40, 128, device="cuda", dtype=dtype)
    passes = [Sparsify24("sparsegpt"), fxopt.Lower()]
    opt = fxopt.transform(
        model.eval(), passes, example_inputs=(x,), calibration=[x], measure_cost=False
    )
    assert opt.steps[0].record.fired == {"MaskLinear": 2}
    assert any("linear_sparse24" in str(node.target) for node in opt.program.graph.nodes)
    for batch in (1, 40, 70):
        y = torch.randn(batch, 128, device="cuda", dtype=dtype)
        assert Sqnr(3.0).measure(model(y).detach(), opt(y)).holds
