"""Whatever modes its caller is in, a transformation gives the same program and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from tests.check import tensors_of
from tests.models import Drawn, sequence_models


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "default dtype": lambda: default_dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
    "deterministic": deterministic,
}
PASSES = ["fold-pruned", "int8-linear{where=always, mode=static}", "prepack"]


class Remembers(nn.Module):
    """Writes attributes and installs hooks in forward, as transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if not self.inner._forward_hooks:
            self.inner.register_forward_hook(lambda module, args, output: None)
            self.hooked = True
        return self.inner(x)


def traces(model: nn.Module) -> Any:
    """All that a transformation could leave behind in a model, but for the values of tensors."""
    found = []
    for path, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, str))}
        tables = {k: list(v) for k, v in vars(module).items() if isinstance(v, dict)}
        found.append((path, plain, tables))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return found, [(name, id(t), t._version, t.requires_grad) for name, t in tensors]


def state_of_torch() -> Any:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().tolist(),
    )


def assert_same(one: fxopt.Optimized, other: fxopt.Optimized, call: Any, modes: Any) -> None:
    assert str(one.graph) == str(other.graph)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
        assert not other.state_dict()[name].is_inference()
    expected = tensors_of(one(**call))
    for outputs in (other(**call), _called_in(modes, other, call)):
        for new, old in zip(tensors_of(outputs), expected, strict=True):
            assert (new.dtype, new.device) == (old.dtype, old.device)
            assert torch.equal(new, old)


def _called_in(modes: Any, optimized: fxopt.Optimized, call: Any) -> Any:
    with modes():
        return optimized(**call)


@settings(max_examples=6)
@given(
    drawn=sequence_models(
        dtypes=st.just(torch.float32), last=lambda width: nn.Sequential(Remembers())
    ),
    name=st.sampled_from(sorted(MODES)),
)
def test_the_callers_modes_change_neither_program_nor_model(drawn: Drawn, name: str) -> None:
    model = drawn.model
    before = traces(model)
    outside = fxopt.transform(model, PASSES, example_inputs=drawn.example, on_violation="revert")
    with MODES[name]():
        modes = state_of_torch()
        inside = fxopt.transform(model, PASSES, example_inputs=drawn.example, on_violation="revert")
        assert state_of_torch() == modes
    assert traces(model) == before
    assert_same(outside, inside, drawn.example, MODES[name])


@pytest.mark.parametrize("name", ["autocast", "inference mode", "no grad"])
def test_the_first_call_captures_outside_of_its_modes(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    x = torch.randn(3, 4)
    optimized = fxopt.transform(model, "prepack")
    with MODES[name]():
        result = optimized(x)
    torch.testing.assert_close(result, model(x), check_stride=False)
    assert result.dtype == torch.float32


def test_a_program_made_in_inference_mode_trains() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with torch.inference_mode():
        x = torch.randn(3, 4)
        optimized = fxopt.transform(model, "canonicalize", example_inputs=(x,), mode="train")
    optimized(torch.randn(3, 4)).sum().backward()
    assert model[0].weight.grad is not None


def test_a_forward_sees_the_callers_default_device_and_dtype() -> None:
    class Makes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.zeros(1)

    with default_dtype(torch.float64):
        program = fxopt.transform(
            Makes(), "canonicalize", example_inputs=(torch.ones(2, dtype=torch.float32),)
        )
        assert program(torch.ones(3, dtype=torch.float32)).dtype == torch.float64
    with torch.device("meta"), pytest.raises(fxopt.InputError, match="itself rejects the example"):
        fxopt.transform(Makes(), "canonicalize", example_inputs=(torch.ones(2, device="cpu"),))
