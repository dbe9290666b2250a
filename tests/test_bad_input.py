"""What a user can hand over wrongly, and what fxopt says: what, where, and what to do next."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.errors import (
    CaptureError,
    FxoptError,
    InputError,
    ModelError,
    NotCapturedError,
    PassError,
)
from tests.architectures import ARCHITECTURES, Cnn, Mlp, randomize
from tests.check import tensors_of

_X = torch.randn(3, 8)


def _mlp(change: Callable[[Mlp], Any] = lambda model: None) -> Mlp:
    model = Mlp()
    randomize(model)
    change(model)
    return model


def _transform(model: Any = None, passes: Any = "canonicalize", **options: Any) -> fxopt.Optimized:
    options = {"example_inputs": (_X,), **options}
    return fxopt.transform(_mlp() if model is None else model, passes, **options)


def _set_nan(model: Mlp) -> None:
    with torch.no_grad():
        model.up.weight[3, 2] = float("nan")


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class ManyTypes(nn.Module):
    """Integer arithmetic only."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 3 + 1) % 7


class BatchOfOneDiffers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 3 if x.shape[0] == 1 else x * 2


MODELS: dict[str, tuple[Any, str]] = {
    "not a module": (
        3,
        "transform needs an nn.Module, not int: pass the loaded model itself.",
    ),
    "a path": (
        "bert-base",
        "transform needs an nn.Module, not str: pass the loaded model itself.",
    ),
    "a function": (
        torch.relu,
        "transform needs an nn.Module, not builtin_function_or_method: wrap the function in an "
        "nn.Module whose forward calls it.",
    ),
    "a lambda": (
        lambda x: x,
        "transform needs an nn.Module, not function: wrap the function in an nn.Module whose "
        "forward calls it.",
    ),
    "a class": (
        nn.Linear,
        "transform needs an nn.Module, not type: you passed the class Linear; create an instance "
        "of it first.",
    ),
    "NaN weights": (
        _mlp(_set_nan),
        "up.weight holds 1 NaN of 256 entries; no claim can be judged on such a model. Reload or "
        "repair the weights.",
    ),
    "on the meta device": (
        _mlp().to("meta"),
        "up.weight is on the meta device, so the model has no values to optimise. Load its "
        "weights first (model.to_empty(device='cpu') and load_state_dict, or from_pretrained).",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_transformed_is_refused(case: str) -> None:
    model, text = MODELS[case]
    with pytest.raises(ModelError) as caught:
        _transform(model)
    assert str(caught.value) == text


def double_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_are_refused_by_module_and_name(kind: str) -> None:
    model = _mlp(lambda mlp: getattr(mlp.down, kind)(double_output))
    with pytest.raises(ModelError) as caught:
        _transform(model)
    assert str(caught.value) == (
        "module down has a hook (double_output); a captured graph can't call it. Remove it "
        "(handle.remove()) or move its work into forward, then transform again."
    )


PASSES: dict[str, tuple[Any, str]] = {
    "empty list": ([], "passes is empty, so there is nothing to do. Give at least one"),
    "empty text": ("", "passes is empty, so there is nothing to do. Give at least one"),
    "nothing": (None, "passes must be a list of passes, not NoneType"),
    "unknown name": ("int8-linaer", "unknown pass 'int8-linaer'; did you mean 'int8-linear'?"),
    "unknown name, nothing near": ("zzz", "unknown pass 'zzz'. Known: canonicalize, "),
    "a class": (
        [fxopt.Int8Linear],
        "Int8Linear is a class; pass an instance: Int8Linear()",
    ),
    "no pass": ([3], "3 is no pass: give instances of fxopt.Pass or fxopt.Rule, or a spec"),
    "unknown option": ("int8-linear{bits=4}", "int8-linear has no option 'bits'; it takes mode"),
    "unreadable": ("canonicalize; lower", "passes are separated by commas"),
    "wrong value": ("int8-linear{mode=4bit}", "Int8Linear(mode='4bit'): give one of"),
    "unknown claim": (
        "int8-linear{claim=nice}",
        "Int8Linear(claim='nice'): write exact, close, close(1e-4) or sqnr(30)",
    ),
    "lowering first": (
        [fxopt.Lower(), fxopt.Int8Linear()],
        "Int8Linear() comes after Lower(), but lowering ends a list: move Int8Linear() before it",
    ),
    "int8 before fusing": (
        [fxopt.Int8Linear(), fxopt.FuseLinears()],
        "FuseLinears() (structure) comes after Int8Linear() (numerics), which would keep it from "
        "seeing what it rewrites: move FuseLinears() before Int8Linear()",
    ),
    "packing before int8": (
        "prepack, int8-linear",
        "Int8Linear() (numerics) comes after Prepack()",
    ),
}


@pytest.mark.parametrize("case", PASSES)
def test_a_wrong_pass_list_is_refused(case: str) -> None:
    passes, text = PASSES[case]
    with pytest.raises(PassError) as caught:
        _transform(passes=passes)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"on_violation": "ignore"}, "on_violation='ignore': must be 'raise' or 'revert'"),
        ({"mode": "test"}, "mode='test': must be 'eval' or 'train'"),
    ],
)
def test_a_wrong_option_is_refused(option: dict[str, Any], text: str) -> None:
    with pytest.raises(PassError) as caught:
        _transform(**option)
    assert str(caught.value) == text


EXAMPLES: dict[str, tuple[Any, str]] = {
    "another container": (
        {1, 2},
        "example_inputs must be a tensor, a tuple of positional arguments or a dict of keyword "
        "arguments, not set",
    ),
    "no tensor": ((3,), "example_inputs hold no tensor; give at least one"),
    "too many": ((_X, _X), "too many positional arguments. Give a tuple of positional"),
    "unknown keyword": ({"y": _X}, "missing a required argument: 'x'"),
    "batch of size 0": (
        (torch.randn(0, 8),),
        "example input x has shape (0, 8) and so no entries; capture and judgement need at least "
        "one row.",
    ),
    "a size the model rejects": ((torch.randn(3, 9),), "Mlp itself rejects the example inputs: "),
    "a dtype the model rejects": ((_X.double(),), "Mlp itself rejects the example inputs: "),
}


@pytest.mark.parametrize("case", EXAMPLES)
def test_example_inputs_that_do_not_fit_are_refused(case: str) -> None:
    inputs, text = EXAMPLES[case]
    with pytest.raises(InputError) as caught:
        _transform(example_inputs=inputs)
    assert text in str(caught.value)


CALLS: dict[str, tuple[tuple[Any, ...], str]] = {
    "structure": ((_X, _X), "too many positional arguments"),
    "nothing": ((), "missing a required argument: 'x'"),
    "no tensor": ((3,), "x must be a tensor (x: torch.float32["),
    "dtype": (
        (_X.double(),),
        "x has dtype torch.float64, but the graph was captured with torch.float32. Convert it "
        "with .to(torch.float32).",
    ),
    "rank": ((torch.randn(2, 3, 8),), "x has rank 3 and shape (2, 3, 8), but the graph takes"),
    "fixed size": (
        (torch.randn(3, 9),),
        "x has size 9 on axis 1, but the model fixes it to 8: x: torch.float32[",
    ),
    "device": ((_X.to("meta"),), "x is on meta, but the model is on cpu. Move it with .to('cpu')."),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_does_not_fit_the_capture_is_refused(case: str) -> None:
    args, text = CALLS[case]
    opt = _transform()
    with pytest.raises(InputError) as caught:
        opt(*args)
    assert text in str(caught.value)


def test_the_input_device_must_be_the_models() -> None:
    with pytest.raises(InputError) as caught:
        _transform(example_inputs=(_X.to("meta"),))
    assert str(caught.value) == (
        "an example input is on meta, but the model is on cpu. Move the inputs with .to('cpu') or "
        "the model with .to('meta')."
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_where_there_is_none_is_refused(device: str) -> None:
    with pytest.raises(Exception, match=r"CUDA|NVIDIA"):
        _transform().to(device)


def test_a_construct_that_cannot_be_captured_is_named_with_its_line() -> None:
    with pytest.raises(CaptureError) as caught:
        _transform(DataDependent())
    text = str(caught.value)
    assert text.startswith("DataDependent can't be captured as a graph.\n  construct: ")
    assert "test_bad_input.py" in text
    assert "return x * 2 if x.sum() > 0 else x" in text
    assert "torch.where, or bound the value" in text


def test_a_failed_capture_prints_nothing() -> None:
    # torch prints the partial graph of a data-dependent error; a library must not.
    program = (
        "import torch, fxopt\n"
        "from tests.test_bad_input import DataDependent\n"
        "try:\n"
        "    fxopt.transform(DataDependent(), 'canonicalize', example_inputs=(torch.ones(3, 2),))\n"
        "except fxopt.CaptureError:\n"
        "    pass\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "def forward" not in done.stderr


def test_without_derivable_inputs_the_first_call_captures() -> None:
    model = _mlp()
    opt = fxopt.transform(model, "canonicalize")
    assert not opt.is_captured
    with pytest.raises(NotCapturedError) as caught:
        print(opt.graph)
    assert str(caught.value) == (
        "the graph doesn't exist yet: no example_inputs were given and none could be derived. Call "
        "the module once; the capture uses the inputs of that call."
    )
    assert torch.equal(opt(_X), model(_X))
    assert opt.is_captured
    assert opt(torch.randn(5, 8)).shape == (5, 8)


def test_a_transformed_model_runs_again() -> None:
    once = _transform()
    twice = fxopt.transform(once, "fuse-linears", example_inputs=(_X,))
    assert torch.equal(twice(_X), once(_X))
    assert [step.record.name for step in twice.steps] == ["capture", "fuse-linears"]


def test_batches_of_one_and_none_run() -> None:
    model = randomize(Cnn())
    opt = fxopt.transform(model, "fuse-conv-batch-norm", example_inputs=(torch.randn(2, 3, 8, 8),))
    for batch in (1, 0):
        images = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(opt(images), model(images))


def test_an_example_of_batch_one_stays_dynamic() -> None:
    model = _mlp()
    opt = _transform(model, example_inputs=(_X[:1],))
    assert isinstance(opt.program.signature.tensors[0].sizes[0], str)
    assert torch.equal(opt(_X), model(_X))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_that_treats_a_batch_of_one_otherwise_runs_at_both(batch: int) -> None:
    model = BatchOfOneDiffers()
    opt = _transform(model, example_inputs=(torch.randn(batch, 4),))
    for size in (1, 2, 3):
        x = torch.randn(size, 4)
        torch.testing.assert_close(opt(x), model(x))


def test_float64_models_run_and_say_what_was_refused() -> None:
    model = _mlp().double()
    x = _X.double()
    opt = _transform(model, "fuse-linears, int8-linear{mode=weight_only}", example_inputs=(x,))
    assert fxopt.Sqnr(26.0).measure(model(x), opt(x)).holds
    opt = _transform(model, "prepack", example_inputs=(x,))
    torch.testing.assert_close(opt(x), model(x))
    last = opt.steps[-1].record
    assert not last.firings
    assert any("float64" in refusal.reason for refusal in last.refused)


def test_integer_models_run() -> None:
    x = torch.arange(12).view(3, 4)
    opt = _transform(ManyTypes(), "canonicalize, fuse-linears", example_inputs=(x,))
    assert torch.equal(opt(x + 1), ManyTypes()(x + 1))


def test_a_model_without_tensors_in_it_says_so() -> None:
    with pytest.raises(FxoptError):
        _transform(nn.Identity(), example_inputs=("text",))


def test_none_inputs_and_keywords_in_any_order() -> None:
    case = ARCHITECTURES["bert"]()
    opt = fxopt.transform(case.model, "canonicalize", example_inputs=case.example)
    backwards = dict(reversed([*case.example.items(), ("position_ids", None)]))
    for expected, output in zip(
        tensors_of(case.model(**case.example)), tensors_of(opt(**backwards)), strict=True
    ):
        torch.testing.assert_close(output, expected)


def test_inputs_are_not_changed() -> None:
    given = (_X.clone(),)
    kept = copy.deepcopy(given)
    opt = _transform(example_inputs=given)
    opt(*given)
    assert torch.equal(given[0], kept[0])
