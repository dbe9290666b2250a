"""Fake values: what a call gives, computed by running it on fake tensors, which also checks it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fxopt.errors import RewriteError
from fxopt.graph_text.types import constant_text, type_text
from fxopt.kernels import SHAPE_RULES
from fxopt.nodes import fake, label, source_line
from fxopt.recipe import Recipe


class KnownCalls:
    """Fake results of calls, kept by what they depend on: `run(target, args, kwargs)` once each."""

    def __init__(self, run: Callable[[Any, Any, Any], Any]) -> None:
        self._run = run
        self._known: dict[Hashable, Any] = {}

    def result(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What `run` gives for the fake values of nodes in `args` and `kwargs`."""
        values = fx.map_arg((tuple(args), dict(kwargs)), fake)
        key = (target, type_key(values))
        if key in self._known:
            return self._known[key]
        value = self._run(target, *values)
        # A size that depends on values is that of one call alone.
        if not free_unbacked_symbols(value):
            self._known[key] = value
        return value


class FakeTypes:
    """The fake values of new calls and constants in `mode`; equal calls are run once."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._calls = KnownCalls(lambda *call: run_on_fakes(mode, *call))

    def of_call(
        self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], origin: fx.Node
    ) -> Any:
        """The fake value of `target(*args, **kwargs)`, whose operands are nodes with theirs.

        Raises `RewriteError`, which names the `origin` of the call, if it can't be run.
        """
        try:
            return self._calls.result(target, args, kwargs)
        except Exception as error:
            operands = [_operand_text(fake(arg)) for arg in args]
            operands += [f"{name}={_operand_text(fake(arg))}" for name, arg in kwargs.items()]
            line = source_line(origin)
            raise RewriteError(
                f"a rewrite at {label(origin)} built a call that can't be typed: "
                f"{target}({', '.join(operands)}): {type(error).__name__}: {error}"
                + (f"\n  from {line}" if line else "")
            ) from error

    def of_tensor(self, tensor: Tensor | Recipe) -> Tensor:
        """The fake value of a state tensor."""
        with self._mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def run_on_fakes(
    mode: FakeTensorMode, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """What `target` gives on fake values of `mode`; raises whatever it raises on them."""
    # Without the dispatcher some operators (pad, upsampling) fix the sizes that they see.
    with mode, torch.no_grad(), enable_python_dispatcher():
        return SHAPE_RULES.get(target, target)(*args, **kwargs)


def type_key(value: Any) -> Hashable:
    """What a fake result depends on; equal layers ask for equal types, a dozen times each."""
    if isinstance(value, Tensor):
        sizes = (value.shape, value.stride(), (value.storage_offset(),))
        return (value.dtype, value.device, *map(type_key, sizes))
    if isinstance(value, (tuple, list)):
        return tuple(map(type_key, value))
    if isinstance(value, dict):
        return tuple((key, type_key(item)) for key, item in value.items())
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return (int, int(expression)) if expression.is_Integer else (torch.SymInt, expression)
    return type(value), value if isinstance(value, Hashable) else id(value)


def _operand_text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_operand_text(fake(item)) for item in value)}]"
    return type_text(value) if isinstance(value, Tensor) else constant_text(value)
