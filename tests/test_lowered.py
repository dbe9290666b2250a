"""Lowered modules through their life: several sizes, saved and loaded, transformed once more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import fxopt
from fxopt.kernels import native
from tests.models import Attention, Drawn, models, pass_lists

X = torch.randn(5, 16)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval()


def test_other_batches_run_and_agree() -> None:
    model = _model()
    opt = fxopt.transform(model, "prepack, lower", example_inputs=(X,))
    for batch in (1, 2, 7, 64):
        x = torch.randn(batch, 16)
        assert fxopt.Close().measure(model(x).detach(), opt(x)).holds
    assert opt.report.latency_before is not None
    assert opt.steps[-1].record.fired == {"fxopt.packed_linear": 2}


def test_a_lowered_int8_module_is_saved_loaded_and_lowered_again(tmp_path: Path) -> None:
    opt = fxopt.transform(_model(), "int8-linear, lower", example_inputs=(X,), measure_cost=False)
    opt.save(tmp_path / "saved")
    loaded = fxopt.load(tmp_path / "saved")
    assert loaded.lowering == fxopt.Lower()
    assert torch.equal(loaded(X), opt(X))
    assert not loaded(X).requires_grad


def test_a_lowered_int8_module_can_be_transformed_once_more() -> None:
    model = _model()
    opt = fxopt.transform(model, "int8-linear, lower", example_inputs=(X,), measure_cost=False)
    again = fxopt.transform(opt, "canonicalize, lower", measure_cost=False)
    assert [step.record.name for step in again.steps] == ["capture", "canonicalize", "lower"]
    assert fxopt.Sqnr(30.0).measure(model(X).detach(), again(X)).holds


class Layer(nn.Module):
    """Attention and a feed-forward part behind a norm, deep enough for rounding to grow."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = Attention(16, 2, False, True), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.attention(x))
        return x + self.down(nn.functional.gelu(self.up(x)))


def _layers(count: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(count))).eval()


@pytest.mark.parametrize(
    "first",
    [
        "int8-linear{where=always}",
        "autocast{dtype=bfloat16, force=true}",
        "autocast{mode=half, dtype=bfloat16, force=true}",
    ],
)
def test_what_rounds_goes_on_from_where_it_was(first: str) -> None:
    x = torch.randn(2, 6, 16)
    opt = fxopt.transform(_layers(6), f"canonicalize, {first}", example_inputs=(x,))
    again = fxopt.transform(opt, "prepack", measure_cost=False)
    assert again.steps[-1].record.fired
    assert again.report.end_to_end is not None
    assert again.report.end_to_end.startswith("sqnr >= ")
    assert fxopt.Sqnr(14.0).measure(_layers(6)(x).detach(), again(x)).holds


@pytest.mark.parametrize(
    "spec",
    [
        "int8-linear{mode=static}, half-attention{force=true}",
        "half-attention{force=true}, int8-linear",
        "half-attention{force=true}, int8-linear{activations=affine}",
    ],
)
def test_int8_and_half_are_lowered_together(spec: str) -> None:
    x = torch.randn(2, 6, 16)
    passes = f"fuse-linears, {spec}, prepack, lower{{strict=true}}"
    opt = fxopt.transform(_layers(3), passes, example_inputs=(x,), measure_cost=False)
    names = [step.name for step in opt.report.steps]
    assert names[-3:] == ["select-kernels", "prepack", "lower"]
    by_token = "int8_linear_fused" if native.load() else "int8_product"
    product = "packed_int8_linear" if "static" in spec else by_token
    fired = opt.report.steps[-1].fired
    assert fired[f"fxopt.{product}"] + fired.get(f"fxopt.{product}_tokens", 0) == 12
    other = torch.randn(3, 9, 16)
    assert fxopt.Sqnr(10.0).measure(_layers(3)(other).detach(), opt(other)).holds


def test_a_lowered_program_is_held_to_all_claims_that_round() -> None:
    x = torch.randn(2, 6, 16)
    passes = "half-attention{force=true}, int8-linear, lower"
    opt = fxopt.transform(_layers(2), passes, example_inputs=(x,), measure_cost=False)
    assert opt.report.steps[-1].claim == "sqnr >= 14.4 dB"


def test_lowering_a_program_without_kernels_counts_its_operations() -> None:
    passes = "canonicalize, lower{prepack=false}"
    opt = fxopt.transform(_model(), passes, example_inputs=(X,), measure_cost=False)
    assert [step.record.name for step in opt.steps] == ["capture", "canonicalize", "lower"]
    assert opt.steps[-1].record.fired == {"operations": 3}


def test_lowering_packs_what_no_pass_has_packed() -> None:
    opt = fxopt.transform(_model(), "lower", example_inputs=(X,), measure_cost=False)
    assert [step.record.name for step in opt.steps] == ["capture", "prepack", "lower"]
    assert opt.steps[-1].record.fired == {"fxopt.packed_linear": 2}
    again = fxopt.transform(opt, "lower", measure_cost=False)
    assert [step.record.name for step in again.steps] == ["capture", "lower"]
    assert torch.equal(again(X), opt(X))


@pytest.mark.parametrize(
    "spec",
    [
        "int8-linear{mode=static}",
        *(
            pytest.param(spec, marks=pytest.mark.slow)
            for spec in ("int8-linear", "autocast", "prepack")
        ),
    ],
)
def test_calls_generated_in_cpp_are_the_same(spec: str) -> None:
    x = torch.randn(2, 6, 16)
    passes = f"{spec}, lower{{mode=reduce-overhead, strict=true}}"
    opt = fxopt.transform(_layers(2), passes, example_inputs=(x,), measure_cost=False)
    plain = fxopt.transform(_layers(2), f"{spec}, lower", example_inputs=(x,), measure_cost=False)
    assert opt.steps[-1].record.fired == plain.steps[-1].record.fired
    for size in ((2, 6), (3, 9), (1, 4)):
        other = torch.randn(*size, 16)
        torch.testing.assert_close(opt(other), plain(other), rtol=1e-4, atol=1e-4)


def test_what_trains_is_called_from_python() -> None:
    passes = [fxopt.Lower(mode="reduce-overhead")]
    opt = fxopt.transform(_model(), passes, example_inputs=(X,), mode="train", measure_cost=False)
    opt(X).sum().backward()
    assert all(parameter.grad is not None for parameter in opt.parameters())


def test_lowering_what_trains_packs_nothing() -> None:
    opt = fxopt.transform(_model(), "lower", example_inputs=(X,), mode="train")
    assert [step.record.name for step in opt.steps] == ["capture", "lower"]


@pytest.mark.usefixtures("compiled_kernels")
def test_a_saved_module_has_this_cpus_kernels_in_a_fresh_process(tmp_path: Path) -> None:
    opt = fxopt.transform(_model(), "int8-linear{mode=static}, prepack", example_inputs=(X,))
    opt.save(tmp_path / "saved")
    code = (
        "import sys, fxopt; from fxopt.kernels import native\n"
        "assert not native.loaded()\n"
        "fxopt.load(sys.argv[1] + '/saved')\n"
        "assert native.loaded()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_the_original_is_let_go() -> None:
    import gc
    import weakref

    model = _model()
    opt = fxopt.transform(model, "int8-linear", example_inputs=(X,))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert opt(X).shape == (5, 8)


@pytest.mark.slow
@settings(max_examples=12)
@given(drawn=models(), passes=pass_lists(lower=True))
def test_drawn_models_keep_their_claims_when_lowered(
    drawn: Drawn, passes: list[fxopt.Pass]
) -> None:
    torch.compiler.reset()
    opt = fxopt.transform(drawn.model, passes, example_inputs=drawn.example, measure_cost=False)
    assert all(step.record.holds for step in opt.steps)
    for call in drawn.others:
        opt(**call)


def test_a_loaded_classifier_has_its_config_and_serves_a_pipeline(tmp_path: Path) -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=2, id2label={0: "no", 1: "yes"},
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    fxopt.transform(model, "fuse-linears").save(tmp_path / "saved")
    loaded = fxopt.load(tmp_path / "saved")
    assert type(loaded.config) is transformers.BertConfig
    assert loaded.config.id2label == {0: "no", 1: "yes"}
    assert loaded.config.to_dict() == config.to_dict()


def test_a_config_that_transformers_does_not_know_is_a_clear_error(tmp_path: Path) -> None:
    from fxopt import saving

    program = fxopt.transform(_model(), "fuse-linears", example_inputs=(X,)).program
    report = fxopt.transform(_model(), "fuse-linears", example_inputs=(X,)).report.to_json()
    config = {"model_type": "os.system"}
    saving.save(program, tmp_path / "saved", report_json=report, config=config)
    with pytest.raises(fxopt.SaveError, match="holds a model config that transformers can't read"):
        fxopt.load(tmp_path / "saved")
