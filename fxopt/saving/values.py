"""Constants and call arguments as JSON, and back.

None, booleans, integers, finite floats, strings and lists are themselves; everything else is an
object with one key that names its kind: `{"node": "add"}`, `{"dtype": "float32"}`,
`{"float": "inf"}`, `{"slice": [0, null, 1]}`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import fx

from fxopt.errors import SaveError

_DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d{1,3})?")
_LIMIT = 2**64
_T = TypeVar("_T")


def encode(value: Any, where: str) -> Any:
    """`value` as JSON; raises `SaveError`, naming `where`, for what has no JSON form."""
    if value is None or isinstance(value, (bool, int, str)):
        return _encode_scalar(value, where)
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, complex):
        return {"complex": [encode(value.real, where), encode(value.imag, where)]}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    for kind, name in _TORCH_KINDS.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    if isinstance(value, list):
        return [encode(item, where) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item, where) for item in value]}
    if isinstance(value, slice):
        return {"slice": [encode(v, where) for v in (value.start, value.stop, value.step)]}
    raise SaveError(
        f"{where} is {value!r:.80} ({type(value).__name__}), which can't be saved: only numbers, "
        "strings, lists, tuples and torch's own constants can. Capture the model without it."
    )


def decode(data: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The value that `encode` wrote; `nodes` are those defined so far, by name."""
    if data is None or isinstance(data, (bool, int, float, str)):
        if isinstance(data, int) and not -_LIMIT < data < _LIMIT:
            raise SaveError(f"the saved graph holds an integer of {data.bit_length()} bits")
        return data
    if isinstance(data, list):
        return [decode(item, nodes) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise SaveError(f"the saved graph holds a value that can't be read: {data!r:.80}")
    ((kind, content),) = data.items()
    if kind == "node":
        return _node(content, nodes)
    if kind == "tuple" and isinstance(content, list):
        return tuple(decode(item, nodes) for item in content)
    if kind == "slice" and isinstance(content, list) and len(content) == 3:
        return slice(*(decode(item, nodes) for item in content))
    if kind == "complex" and isinstance(content, list) and len(content) == 2:
        return complex(*(decode(item, nodes) for item in content))
    if isinstance(content, str) and kind in _READERS:
        return _READERS[kind](content)
    raise SaveError(f"the saved graph holds a value of unknown kind {kind!r:.40}")


def field(data: Any, key: str, kind: type[_T] | tuple[type, ...]) -> _T:
    """`data[key]`, which must be there and of type `kind`; else `SaveError`."""
    if not isinstance(data, dict) or key not in data:
        raise SaveError(f"the saved graph lacks {key!r}; the file is damaged")
    value = data[key]
    if not isinstance(value, kind):
        raise SaveError(f"{key!r} of the saved graph is {value!r:.40}; the file is damaged")
    return value  # type: ignore[return-value]


def strings(data: Any, key: str) -> dict[str, str]:
    """`data[key]` as {string: string}; else `SaveError`."""
    found: dict[str, str] = field(data, key, dict)
    if not all(isinstance(value, str) for value in found.values()):
        raise SaveError(f"{key!r} of the saved graph holds something other than text")
    return found


def counts(data: Any, key: str) -> dict[str, int]:
    """`data[key]` as {string: whole number}; else `SaveError`."""
    found: dict[str, int] = field(data, key, dict)
    if not all(type(value) is int for value in found.values()):
        raise SaveError(f"{key!r} of the saved graph holds something other than whole numbers")
    return found


def texts(data: Any, key: str) -> list[str]:
    """`data[key]` as a list of strings; else `SaveError`."""
    found: list[str] = field(data, key, list)
    if not all(isinstance(value, str) for value in found):
        raise SaveError(f"{key!r} of the saved graph holds something other than text")
    return found


def read_dtype(name: str) -> torch.dtype:
    """torch.float32 of `float32`; `SaveError` for anything that is no dtype."""
    return _torch_constant(name, torch.dtype)


def read_device(name: str) -> torch.device:
    """torch.device of `cpu` or `cuda:0`; `SaveError` where this machine has no such device."""
    if not _DEVICE.fullmatch(name):
        raise SaveError(f"the saved graph names the unknown device {name!r:.40}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SaveError(
            f"the program was saved on {name}, and this machine has no such device. Load it on a "
            "machine that has one, or save it after opt.to('cpu')."
        )
    return device


def _encode_scalar(value: Any, where: str) -> Any:
    if isinstance(value, int) and not -_LIMIT < value < _LIMIT:
        raise SaveError(f"{where} holds an integer of {value.bit_length()} bits; 64 can be saved")
    # Subclasses (an IntEnum, a str enum) would come back as something else.
    if type(value) not in (type(None), bool, int, str):
        raise SaveError(
            f"{where} is {value!r:.80}, a {type(value).__name__}; pass the plain value instead"
        )
    return value


def _node(name: Any, nodes: Mapping[str, fx.Node]) -> fx.Node:
    if not isinstance(name, str) or name not in nodes:
        raise SaveError(f"the saved graph uses the node {name!r:.40} before it is defined")
    return nodes[name]


def _torch_constant(name: str, kind: type[_T]) -> _T:
    value = getattr(torch, name, None) if re.fullmatch(r"[a-z]\w*", name) else None
    if not isinstance(value, kind):
        raise SaveError(f"the saved graph names {name!r:.40}, which is no torch {kind.__name__}")
    return value


def _read_float(text: str) -> float:
    if text not in ("inf", "-inf", "nan"):
        raise SaveError(f"the saved graph holds the float {text!r:.40}")
    return float(text)


_TORCH_KINDS: dict[type, str] = {
    torch.dtype: "dtype",
    torch.device: "device",
    torch.layout: "layout",
    torch.memory_format: "memory_format",
}
_READERS: dict[str, Callable[[str], Any]] = {
    "dtype": read_dtype,
    "device": read_device,
    "layout": lambda name: _torch_constant(name, torch.layout),
    "memory_format": lambda name: _torch_constant(name, torch.memory_format),
    "float": _read_float,
}
