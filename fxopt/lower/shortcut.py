"""Calls of compiled code past Dynamo, with inputs like some that Dynamo has led to it before.

A call through torch.compile checks guards, fetches each parameter by its path and passes several
wrappers: 25 of the 450 microseconds that MiniLM takes in int8 for a text of 16 tokens. What it
comes to is the same for all inputs of the same shapes, strides and types in the same state of
torch: one function of generated code, which takes inputs and parameters in one order and gives the
outputs in another. This is learnt from the second call of a kind (many lengths come but once) and
repeated from then on. Parameters are fetched from the module's tables each time, so that one that
was replaced counts. With many inputs, as of a cache of keys and values, Dynamo is as fast.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._C._dynamo.guards import GlobalStateGuard

_MOST_ROUTES = 256
_MOST_INPUTS = 8
_PLAIN = (Tensor, nn.Parameter)


@dataclass(frozen=True)
class _Route:
    """The generated code for one kind of inputs, and where its arguments and results are.

    An argument is an input, by its index, where there is no table; else what a table holds.
    """

    run: Callable[..., Sequence[Any]]
    arguments: tuple[tuple[Mapping[Any, Any] | None, Any], ...]
    results: tuple[int, ...]
    container: type
    state: Any

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        outputs = self.run(
            *[inputs[key] if table is None else table[key] for table, key in self.arguments]
        )
        return self.container([outputs[index] for index in self.results])


class Shortcut:
    """The routes to the generated code of one module in inference on a CPU."""

    def __init__(self, module: nn.Module) -> None:
        from torch._dynamo import eval_frame

        self._module = module
        self._dynamo = eval_frame
        self._routes: dict[Hashable, _Route | None] = {}  # None where there is no way but Dynamo's
        self._met: set[Hashable] = set()
        self._last = threading.local()

    def watched(self, run: Callable[..., Sequence[Any]]) -> Callable[..., Sequence[Any]]:
        """`run`, generated code as Dynamo will call it; each call is noted for `learn`."""

        def call(*arguments: Any) -> Sequence[Any]:
            outputs = run(*arguments)
            self._last.call = (run, arguments, outputs)
            return outputs

        return call

    def find(self, inputs: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Any] | None:
        """How to call the generated code with `inputs`; None where Dynamo has to be asked."""
        if not self._routes or self.is_called_otherwise():
            return None
        route = self._routes.get(_kind(inputs))
        return route if route is not None and route.state.check() else None

    def learn(self, inputs: Sequence[Tensor], result: Any) -> None:
        """Keep the way that the call of the module with `inputs` went, if it can be repeated."""
        call, self._last.call = getattr(self._last, "call", None), None
        kind = _kind(inputs)
        if call is None or kind is None or self.is_called_otherwise():
            return
        if kind not in self._met:
            if len(self._met) >= _MOST_ROUTES:
                self.forget()
            self._met.add(kind)
        elif self._routes.get(kind, ...) is not None:
            self._routes[kind] = self._route(inputs, result, *call)

    def forget(self) -> None:
        """Lead every call through Dynamo again, until it is learnt anew."""
        self._routes.clear()
        self._met.clear()

    def _route(
        self,
        inputs: Sequence[Tensor],
        result: Any,
        run: Callable[..., Sequence[Any]],
        given: Sequence[Any],
        outputs: Sequence[Any],
    ) -> _Route | None:
        places = self._places(inputs)
        arguments = [_place(argument, places) for argument in given]
        if type(result) not in (tuple, list):
            return None
        results = [_index_of(value, outputs) for value in result]
        if None in arguments or None in results:
            return None
        known = tuple(place for place in arguments if place is not None)
        wanted = tuple(index for index in results if index is not None)
        return _Route(run, known, wanted, type(result), GlobalStateGuard())

    def is_called_otherwise(self) -> bool:
        """Whether someone wants to see each operation (a mode, a tracer, a transform, an outer
        torch.compile), or asked torch.compile for something else (`torch.compiler.set_stance`)."""
        return bool(
            torch._C._len_torch_dispatch_stack()
            or torch._C._len_torch_function_stack()
            or torch._C._get_tracing_state() is not None
            or torch._C._functorch.peek_interpreter_stack() is not None
            or get_eval_frame_callback() is not None
            or self._dynamo._stance.stance != "default"
        )

    def _places(self, inputs: Sequence[Tensor]) -> dict[int, tuple[Any, Any]]:
        """Where each tensor that the module can reach is, by its identity."""
        places: dict[int, tuple[Any, Any]] = {}
        for part in self._module.modules():
            for table in (part._parameters, part._buffers):
                places.update((id(held), (table, name)) for name, held in table.items())
        if any(id(value) in places for value in inputs):
            return {}  # a parameter that is an input as well: Dynamo takes the two for one
        places.update((id(value), (None, index)) for index, value in enumerate(inputs))
        return places


def _kind(inputs: Sequence[Tensor]) -> Hashable:
    """What the generated code depends on; None for inputs that Dynamo treats in a way of its own:
    subclasses, and one tensor that is two inputs."""
    if len(inputs) > _MOST_INPUTS or len({id(value) for value in inputs}) < len(inputs):
        return None
    if any(type(value) not in _PLAIN for value in inputs):
        return None
    return tuple(
        (
            value.shape,
            value.stride(),
            value.dtype,
            value.requires_grad,
            torch._C._dispatch_keys(value).raw_repr(),
        )
        for value in inputs
    )


def _place(argument: Any, places: Mapping[int, tuple[Any, Any]]) -> tuple[Any, Any] | None:
    if isinstance(argument, int):  # a dynamic size, which the kind fixes
        return {"size": argument}, "size"
    return places.get(id(argument))


def _index_of(value: Any, outputs: Sequence[Any]) -> int | None:
    """Which output `value` is; None where that can't be told, as of numbers, equal by chance."""
    if not isinstance(value, Tensor):
        return None
    return next((index for index, output in enumerate(outputs) if output is value), None)
