"""Calls past Dynamo give what calls through it give, and are not made where it has to be asked."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import BaseTorchDispatchMode

import fxopt
from fxopt.lower.compilation import Compiled


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        hidden = self.first(x.sin()).relu()
        return {"sum": self.second(hidden) + y.exp(), "hidden": hidden}


def _lowered(
    model: nn.Module, *example: Any, passes: str = "lower"
) -> tuple[fxopt.Optimized, Compiled]:
    opt = fxopt.transform(model, passes, example_inputs=example, measure_cost=False)
    for _ in range(2):
        opt(*example)
    compiled = opt._execution.compiled["eval", False]
    assert isinstance(compiled, Compiled)
    return opt, compiled


@pytest.fixture
def model() -> nn.Module:
    return _Model().eval()


def _inputs(rows: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 8), torch.randn(rows, 4)


class _AskedError(Exception):
    """Dynamo was asked."""


def _fail(*inputs: Tensor) -> Any:
    raise _AskedError


def _without_dynamo(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_run", _fail)


def _same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "passes", ["lower", pytest.param("lower{mode=reduce-overhead}", marks=pytest.mark.slow)]
)
def test_calls_go_past_dynamo(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, passes: str
) -> None:
    opt, compiled = _lowered(model, *_inputs(), passes=passes)
    _without_dynamo(compiled, monkeypatch)
    x, y = _inputs()
    _same(opt(x, y), model(x, y))


def test_other_shapes_are_led_through_dynamo_at_first(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt, compiled = _lowered(model, *_inputs())
    for rows in (5, 7, 5, 7):
        _same(opt(*_inputs(rows))["hidden"].shape, torch.Size([rows, 16]))
    _without_dynamo(compiled, monkeypatch)
    for rows in (7, 3, 5):
        x, y = _inputs(rows)
        _same(opt(x, y), model(x, y))
    with pytest.raises(_AskedError):
        opt(*_inputs(9))


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.booleans()), max_size=8))
def test_any_calls_give_what_the_model_gives(calls: list[tuple[int, bool, bool]]) -> None:
    model, opt = _shared()
    for rows, transposed, expanded in calls:
        x, y = _inputs(rows)
        if transposed:
            x = x.T.contiguous().T
        if expanded:
            y = y[:1].expand(rows, 4)
        _same(opt(x, y), model(x, y))


@functools.cache
def _shared() -> tuple[nn.Module, fxopt.Optimized]:
    model = _Model().eval()
    return model, _lowered(model, *_inputs())[0]


def test_parameters_are_those_of_now(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    opt, compiled = _lowered(model, *_inputs())
    _without_dynamo(compiled, monkeypatch)
    inputs = _inputs()
    other = _Model().eval()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    opt.load_state_dict(other.state_dict(), assign=True)
    _same(opt(*inputs), other(*inputs))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    opt.load_state_dict(other.state_dict())
    _same(opt(*inputs), other(*inputs))
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    found = torch.func.functional_call(opt, state, inputs)
    _same(found, torch.func.functional_call(model, state, inputs))


def test_many_inputs_are_left_to_dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sum(nn.Module):
        def forward(self, inputs: list[Tensor]) -> Tensor:
            return torch.stack(inputs).sum(0)

    inputs = [torch.randn(3) for _ in range(9)]
    opt, compiled = _lowered(Sum().eval(), inputs)
    for _ in range(3):
        _same(opt(inputs), torch.stack(inputs).sum(0))
    _without_dynamo(compiled, monkeypatch)
    with pytest.raises(_AskedError):
        opt(inputs)


def test_one_tensor_as_two_inputs() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x @ y

    opt, _ = _lowered(Product().eval(), torch.randn(4, 4), torch.randn(4, 4))
    x, y = torch.randn(5, 5), torch.randn(5, 5)
    for a, b in ((x, x), (x, x), (x, y), (y, x), (x, y), (y, y)):
        _same(opt(a, b), a @ b)


def test_a_result_that_is_an_input() -> None:
    class Passing(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x, x + y, y

    opt, _ = _lowered(Passing().eval(), torch.randn(3), torch.randn(3))
    for _ in range(3):
        x, y = torch.randn(3), torch.randn(3)
        _same(opt(x, y), (x, x + y, y))


def test_a_result_given_twice() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x.exp()
            return y, y

    opt, _ = _lowered(Twice().eval(), torch.randn(3))
    for _ in range(3):
        x = torch.randn(3)
        _same(opt(x), (x.exp(), x.exp()))


def test_state_that_a_call_writes() -> None:
    class Counting(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return x + self.calls

    opt, _ = _lowered(Counting().eval(), torch.zeros(2))
    before = opt(torch.zeros(2))[0].item()
    found = [opt(torch.zeros(2))[0].item() for _ in range(4)]
    assert found == [before + count for count in (1, 2, 3, 4)]


@pytest.mark.parametrize("mode", [BaseTorchFunctionMode, BaseTorchDispatchMode])
def test_a_mode_sees_what_it_saw_before(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, mode: Callable[[], Any]
) -> None:
    opt, compiled = _lowered(model, *_inputs())
    _without_dynamo(compiled, monkeypatch)
    with mode(), pytest.raises(_AskedError):
        opt(*_inputs())


def test_other_settings_of_torch_ask_dynamo(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt, compiled = _lowered(model, *_inputs())
    _without_dynamo(compiled, monkeypatch)
    with torch.autocast("cpu"), pytest.raises(_AskedError):
        compiled(*_inputs())  # which a module in evaluation calls outside of autocast
    with torch.compiler.set_stance("force_eager"), pytest.raises(_AskedError):
        opt(*_inputs())
    with pytest.raises(_AskedError):
        torch.vmap(lambda x, y: opt(x, y)["sum"])(torch.randn(2, 3, 8), torch.randn(2, 3, 4))
    inputs = _inputs()
    with torch.inference_mode():
        _same(opt(*inputs), model(*inputs))


def test_in_a_function_that_is_compiled_itself(model: nn.Module) -> None:
    opt, _ = _lowered(model, *_inputs())

    def whole(x: Tensor, y: Tensor) -> Tensor:
        return opt(x, y)["sum"] * 2

    def broken(x: Tensor, y: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return opt(x, y)["sum"] * 2

    x, y = _inputs()
    for function, shifted in ((whole, x), (broken, x + 1)):
        compiled = torch.compile(function, backend="eager")
        for _ in range(2):
            _same(compiled(x, y), model(shifted, y)["sum"] * 2)


def test_from_several_threads(model: nn.Module) -> None:
    opt, _ = _lowered(model, *_inputs())
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for rows in (3, 4, 3, 5, 4) * 3:
            x = torch.randn(rows, 8, generator=generator)
            y = torch.randn(rows, 4, generator=generator)
            if not torch.allclose(opt(x, y)["sum"], model(x, y)["sum"], atol=1e-6):
                wrong.append((seed, rows))

    for rows in (4, 5):
        opt(*_inputs(rows))
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
