"""Whether the arguments of a call fit the schema of its operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.graph_text import type_text

Check = Callable[[Any], bool]

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
Parameter = tuple[str, bool, bool, Check]


@lru_cache(maxsize=4096)
def facts(
    target: torch._ops.OpOverload,
) -> tuple[bool, tuple[Parameter, ...]]:
    """(writes, (name, required, keyword only, type check))."""
    schema = target._schema
    return (
        bool(schema.is_mutable),
        tuple(
            (a.name, not a.has_default_value(), bool(a.kwarg_only), _type_check(a.type))
            for a in schema.arguments
        ),
    )


def argument_fault(node: fx.Node, parameters: tuple[Parameter, ...]) -> str | None:
    """What is wrong with a call's arguments by the operator's schema; None where nothing is."""
    args, kwargs = node.args, node.kwargs
    positional = sum(not keyword_only for _, _, keyword_only, _ in parameters)
    if len(args) > positional:
        return f"{len(args)} positional arguments where the operator takes {positional}"
    matched = 0
    for index, (name, required, _, fits) in enumerate(parameters):
        if index < len(args):
            value = args[index]
            if name in kwargs:
                return f"argument {name!r} is given twice"
        elif name in kwargs:
            value = kwargs[name]
            matched += 1
        elif required:
            return f"argument {name!r} is missing"
        else:
            continue
        if not fits(value):
            return f"argument {name!r} doesn't take {_shown(value)}"
    if matched != len(kwargs):
        known = {name for name, *_ in parameters}
        return f"no argument is named {', '.join(sorted(set(kwargs) - known))}"
    return None


def _shown(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name} ({type_text(value.meta.get('val'))})"
    return f"{value!r} ({type(value).__name__})"


def _type_check(kind: Any) -> Check:
    """Whether a graph argument (a constant or a node) fits a schema type."""
    name = kind.kind()
    if name == "OptionalType":
        inner = _type_check(kind.getElementType())
        return lambda value: value is None or inner(value)
    if name == "ListType":
        return _list_check(kind)
    if name == "TensorType":
        # A number where a tensor is asked for is wrapped by the dispatcher, as in x + 1.
        return lambda value: _is_a(value, (Tensor, int, float, complex, *_SYMBOLS))
    constants: dict[str, tuple[type, ...]] = {
        "IntType": (int, torch.SymInt, torch.dtype, torch.layout, torch.memory_format),
        "SymIntType": (int, torch.SymInt),
        "FloatType": (int, float, torch.SymFloat, torch.SymInt),
        "BoolType": (bool, torch.SymBool),
        "NumberType": (int, float, complex, *_SYMBOLS),
        "StringType": (str,),
        "DeviceObjType": (torch.device,),
        "GeneratorType": (torch.Generator,),
    }
    wanted = constants.get(name, (object,))
    return lambda value: _is_a(value, wanted)


def _list_check(kind: Any) -> Check:
    element = kind.getElementType()
    inner = _type_check(element)
    # `int[2] stride` takes one number for all axes.
    broadcasts = element.kind() in ("IntType", "SymIntType", "FloatType")

    def fits(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return all(inner(item) for item in value)
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), (list, tuple)):
            return True
        return broadcasts and inner(value)

    return fits


def _is_a(value: Any, wanted: tuple[type, ...]) -> bool:
    if isinstance(value, fx.Node):
        return isinstance(value.meta.get("val"), wanted)
    # A bare symbolic size is tied to no input: sizes enter a graph through nodes only.
    return isinstance(value, wanted) and not isinstance(value, _SYMBOLS)
