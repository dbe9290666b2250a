"""Fake values: what a call gives, computed by running it on fake tensors, which also checks it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.errors import RewriteError
from fxopt.graph_text.types import constant_text, type_text
from fxopt.kernels import SHAPE_RULES
from fxopt.program import Recipe, fake, label, source_line


class FakeTypes:
    """The fake values of new calls and constants in `mode`; equal calls are run once."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._known: dict[Hashable, Any] = {}

    def of_call(
        self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], origin: fx.Node
    ) -> Any:
        """The fake value of `target(*args, **kwargs)`, whose operands are nodes with theirs.

        Raises `RewriteError`, which names the `origin` of the call, if it can't be run.
        """
        values = fx.map_arg((tuple(args), dict(kwargs)), fake)
        key = (target, type_key(values))
        if key not in self._known:
            self._known[key] = self._run(target, *values, origin)
        return self._known[key]

    def of_tensor(self, tensor: Tensor | Recipe) -> Tensor:
        """The fake value of a state tensor."""
        with self._mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def _run(self, target: Any, args: Any, kwargs: Any, origin: fx.Node) -> Any:
        try:
            # Without the dispatcher some operators (pad) fix the sizes that they see.
            with self._mode, torch.no_grad(), enable_python_dispatcher():
                return SHAPE_RULES.get(target, target)(*args, **kwargs)
        except Exception as error:
            operands = [_operand_text(arg) for arg in args]
            operands += [f"{name}={_operand_text(arg)}" for name, arg in kwargs.items()]
            line = source_line(origin)
            raise RewriteError(
                f"a rewrite at {label(origin)} built a call that can't be typed: "
                f"{target}({', '.join(operands)}): {type(error).__name__}: {error}"
                + (f"\n  from {line}" if line else "")
            ) from error


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
        return f"[{', '.join(map(_operand_text, value))}]"
    return type_text(value) if isinstance(value, Tensor) else constant_text(value)
