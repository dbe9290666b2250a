"""Constructs that can't become a graph: each named with its line and what to try, in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.errors import CaptureError, FxoptError, InputError, ModelError
from fxopt.interpreter import evaluate

X = torch.linspace(-1.0, 1.0, 12).view(3, 4)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # decided by values
            return x
        return -x


class ReadsValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        count = int(x.abs().sum().item())
        return x.repeat(count, 1)[: count + 1] if count > 2 else x


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.linear(x)


class Private:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class ReturnsPrivate(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return Private(x * 2)


def failure(model: nn.Module, *inputs: Any, kind: type[FxoptError] = CaptureError) -> str:
    with pytest.raises(kind) as caught:
        capture(model, inputs)
    return str(caught.value)


def test_control_flow_on_values_names_the_users_line_and_a_way_out() -> None:
    text = failure(Branches(), X)
    lines = text.splitlines()
    assert lines[0] == "Branches can't be captured as a graph."
    assert lines[1].startswith("  construct: ")
    assert "data-dependent" in lines[1]
    assert lines[2].startswith("  at: ")
    assert f"{Path(__file__).name}:" in lines[2]
    assert lines[2].endswith("if x.sum() > 0:  # decided by values")
    assert lines[3] == (
        "  try: the model's control flow or sizes depend on tensor values: express the choice with "
        "torch.where, or bound the value with torch._check"
    )


def test_sizes_from_values_name_the_users_line() -> None:
    text = failure(ReadsValues(), X)
    assert "count" in text.splitlines()[2]
    assert "torch.where, or bound the value" in text


def test_an_error_keeps_its_cause() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Branches(), (X,))
    assert caught.value.__cause__ is not None


def test_an_enabled_autocast_region_is_named_with_its_line() -> None:
    text = failure(Autocast(), X)
    assert text.startswith(
        "Autocast holds an enabled torch.autocast region, which the graph dialect doesn't take, at "
        "test_capture_errors.py:"
    )
    assert "return self.linear(x)" in text
    assert text.endswith(
        "Move it out of forward (precision is placed by a pass), or rewrite the branch with "
        "torch.where."
    )


def test_a_cond_is_named() -> None:
    class Conditional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,))

    text = failure(Conditional(), X)
    assert "the higher-order operator cond" in text
    assert "test_capture_errors.py:" in text


def test_an_output_type_that_is_no_pytree_says_how_to_register_it() -> None:
    text = failure(ReturnsPrivate(), X)
    assert text.startswith("ReturnsPrivate can't be captured as a graph.")
    assert "Private" in text.splitlines()[1]
    assert "torch.utils._pytree.register_pytree_node" in text


def test_a_size_that_is_returned_says_how_to_return_it() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x * 2, x.shape[0]

    class CountsInATensor(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, torch.scalar_tensor(x.shape[0])

    text = failure(Counts(), X)
    assert text.startswith("Counts returns a number that depends on its inputs (sym_size_int")
    assert text.endswith(
        "a program returns tensors. Return it as one, with torch.scalar_tensor, or leave it out."
    )
    other = torch.randn(7, *X.shape[1:])
    assert evaluate(capture(CountsInATensor(), (X,)), (other,))[1] == 7


def test_inputs_that_the_model_itself_rejects_are_no_fault_of_the_capture() -> None:
    text = failure(nn.Linear(4, 2), torch.randn(3, 5), kind=InputError)
    assert text.startswith("Linear itself rejects the example inputs: RuntimeError: ")
    assert text.endswith("Give inputs that the model accepts.")


def test_the_line_of_the_model_that_rejects_its_inputs_is_named() -> None:
    class Strict(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] != 7:
                raise ValueError("seven, please")
            return x

    text = failure(Strict(), X, kind=InputError)
    assert "ValueError: seven, please" in text
    assert 'raise ValueError("seven, please")' in text


def test_inputs_on_another_device_than_the_model() -> None:
    text = failure(nn.Linear(4, 2), X.to("meta"), kind=InputError)
    assert text == (
        "an example input is on meta, but the model is on cpu. Move the inputs with .to('cpu') or "
        "the model with .to('meta')."
    )


@pytest.mark.parametrize(
    "model",
    [Branches(), ReadsValues(), ReturnsPrivate(), Autocast()],
    ids=lambda m: type(m).__name__,
)
def test_a_failing_capture_prints_nothing(
    model: nn.Module, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CaptureError):
        capture(model, (X,))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_a_failing_capture_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), Branches()).train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CaptureError):
        capture(model, (X,))
    assert [module.training for module in model.modules()] == [True, True, False]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "forward" not in vars(model)


MODELS: dict[str, tuple[Any, str]] = {
    "function": (
        lambda x: x,
        "transform needs an nn.Module, not function: wrap the function in an nn.Module whose "
        "forward calls it.",
    ),
    "class": (
        nn.Linear,
        "transform needs an nn.Module, not type: you passed the class Linear; create an instance "
        "of it first.",
    ),
    "state_dict": (
        {"weight": X},
        "transform needs an nn.Module, not dict: pass the loaded model itself.",
    ),
    "meta": (
        nn.Linear(2, 2, device="meta"),
        "weight is on the meta device, so the model has no values to optimise. Load its weights "
        "first (model.to_empty(device='cpu') and load_state_dict, or from_pretrained).",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_what_is_no_model_with_values_is_refused(case: str) -> None:
    model, text = MODELS[case]
    assert failure(model, X, kind=ModelError) == text


@pytest.mark.parametrize("where", ["parameter", "buffer"])
def test_nan_weights_are_counted(where: str) -> None:
    model = nn.BatchNorm1d(4)
    tensor = model.weight if where == "parameter" else model.running_var
    assert tensor is not None
    with torch.no_grad():
        tensor[1:3] = float("nan")
    name = "weight" if where == "parameter" else "running_var"
    assert failure(model, X, kind=ModelError) == (
        f"{name} holds 2 NaN of 4 entries; no claim can be judged on such a model. Reload or "
        "repair the weights."
    )


def test_infinite_weights_are_no_nan() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, float("-inf"), 0.0, float("inf")]))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mask

    assert capture(Masked(), (X,)).node_count() == 1


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def test_hooks_are_refused_with_module_and_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    handle = model[0].register_forward_hook(double)
    assert failure(model, X, kind=ModelError) == (
        "module 0 has a hook (double); a captured graph can't call it. Remove it (handle.remove()) "
        "or move its work into forward, then transform again."
    )
    handle.remove()
    model.register_forward_pre_hook(lambda module, args: None)
    assert failure(model, X, kind=ModelError).startswith("module Sequential has a hook (")


@pytest.mark.parametrize("kind", ["pruned", "weight_norm", "parametrized"])
def test_weights_computed_by_torchs_own_hooks_are_captured(kind: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 4)
    if kind == "pruned":
        from torch.nn.utils import prune

        prune.l1_unstructured(linear, "weight", amount=0.5)
    elif kind == "weight_norm":
        with pytest.warns(FutureWarning):
            torch.nn.utils.weight_norm(linear)
    else:
        torch.nn.utils.parametrizations.weight_norm(linear)
    model = nn.Sequential(linear, nn.ReLU())
    program = capture(model, (X,))
    assert program.node_count() > 2
    for size in (3, 5):
        x = torch.randn(size, 4)
        torch.testing.assert_close(evaluate(program, (x,))[0], model(x))
    assert all(program.state[name] is dict(model.named_parameters())[name] for name in ("0.bias",))
