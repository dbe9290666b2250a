"""How types, sizes, constants and operators are written, in graph texts and in messages."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx

from fxopt.recipe import Recipe

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
DTYPE_NAMES = tuple(_DTYPES.values())
_END = 2**63 - 1


def describe(node: fx.Node) -> str:
    """One node by its own name, for messages: `%add: f32[s0, 8] = aten.add.Tensor(%x, %y)`.

    Needs no program and no well-formed node, so that an error can show the node that is broken.
    """
    value = node.meta.get("val")
    kind = "" if value is None else f": {type_text(value)}"
    args = [constant_text(arg) for arg in node.args]
    args += [f"{key}={constant_text(arg)}" for key, arg in node.kwargs.items()]
    if node.op in ("placeholder", "get_attr"):
        return f"%{node.name}{kind} = {node.op} {node.target}"
    target = node.target if isinstance(node.target, str) else operator_name(node.target)
    return f"%{node.name}{kind} = {target}({', '.join(args)})"


def type_text(value: Any, symbols: Symbols | None = None) -> str:
    """The type of a fake value: `f32[s0, 8]`, `(f32[8], i64[8])`, `int`."""
    if isinstance(value, (torch.Tensor, Recipe)):
        sizes = ", ".join(size_text(size, symbols) for size in value.shape)
        return f"{dtype_text(value.dtype)}[{sizes}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(type_text(item, symbols) for item in value)})"
    for kinds, name in (
        ((bool, torch.SymBool), "bool"),
        ((int, torch.SymInt), "int"),
        ((float, torch.SymFloat), "float"),
    ):
        if isinstance(value, kinds):
            return name
    return "none" if value is None else type(value).__name__


def dtype_text(dtype: torch.dtype) -> str:
    """`f32` for torch.float32, and so on; torch's own name for the rarer ones."""
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def operator_name(target: Any) -> str:
    """The full name of a call's target: `aten.add.Tensor`, `operator.mul`, `torch.sym_max`."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        return str(target)
    module = str(getattr(target, "__module__", "") or "").lstrip("_")
    name = getattr(target, "__name__", repr(target))
    return f"{module}.{name}" if module else str(name)


class Symbols:
    """Renames size symbols to s0, s1, ... (data-dependent ones u0, u1, ...) as they appear."""

    def __init__(self) -> None:
        self._renamed: dict[Any, Any] = {}
        self._texts: dict[Any, str] = {}
        self._counts: Counter[str] = Counter()

    def text(self, expression: Any) -> str:
        """The sympy expression in the new names."""
        if expression not in self._texts:
            for symbol in sorted(expression.free_symbols, key=lambda s: (len(s.name), s.name)):
                self._rename(symbol)
            self._texts[expression] = str(expression.xreplace(self._renamed)).replace(" ", "")
        return self._texts[expression]

    def _rename(self, symbol: Any) -> None:
        if symbol in self._renamed:
            return
        kind = "u" if symbol.name.startswith("u") else "s"
        name = f"{kind}{self._counts[kind]}"
        self._counts[kind] += 1
        self._renamed[symbol] = type(symbol)(name, **symbol._assumptions_orig)


def size_text(size: Any, symbols: Symbols | None) -> str:
    expression = getattr(getattr(size, "node", None), "expr", None)
    if expression is None:
        return str(size)
    return str(expression) if symbols is None else symbols.text(expression)


def constant_text(arg: Any, symbols: Symbols | None = None) -> str:
    """A constant argument, or a node by its own name."""
    if isinstance(arg, fx.Node):
        return f"%{arg.name}"
    if isinstance(arg, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return size_text(arg, symbols)
    if isinstance(arg, torch.dtype):
        return dtype_text(arg)
    if isinstance(arg, (torch.layout, torch.memory_format, torch.device)):
        return str(arg).removeprefix("torch.")
    if isinstance(arg, (tuple, list)):
        return f"[{', '.join(constant_text(item, symbols) for item in arg)}]"
    return "end" if arg == _END and isinstance(arg, int) else repr(arg)
