"""Which half precision a pass is to use: its `dtype`, `device` and `force` options together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch

from fxopt.device import Device
from fxopt.errors import PassError
from fxopt.passes.mixed_precision.half_values import HALF
from fxopt.program import Program

HalfDtype = torch.dtype | Literal["auto"]

_BY_NAME = {name: dtype for dtype in HALF for name in (str(dtype), str(dtype)[len("torch.") :])}


def checked_half_dtype(pass_name: str, given: Any) -> HalfDtype:
    """A pass's `dtype` option: "auto" or one of the two dtypes, which may be given by name.

    Raises `PassError`, naming the pass, for anything else.
    """
    if given == "auto":
        return "auto"
    dtype = _BY_NAME.get(str(given))
    if dtype is not None:
        return dtype
    raise PassError(f'{pass_name}(dtype={given!r}): give "auto", torch.bfloat16 or torch.float16')


def checked_flags(pass_name: str, flags: Iterable[tuple[str, Any]]) -> None:
    """Raise `PassError`, naming the pass, for an option among `flags` that is no bool."""
    for name, given in flags:
        if not isinstance(given, bool):
            raise PassError(f"{pass_name}({name}={given!r}): give True or False")


def half_choice(
    program: Program, dtype: HalfDtype, device: str | None, force: bool
) -> torch.dtype | str:
    """The dtype to compute in, or why none is.

    "auto" is what the device multiplies natively, and with `force` bfloat16 where it multiplies
    neither, since that can't overflow. `device` is a text that `Device.parse` takes, or None for
    the device that the program is on.
    """
    described = Device.describe(_device(program)) if device is None else Device.parse(device)
    if dtype == "auto":
        choice = described.half()
        if choice.dtype is not None:
            return choice.dtype
        return torch.bfloat16 if force else _unless_forced(choice.reason)
    answer = described.accelerates(dtype)
    return dtype if answer or force else _unless_forced(answer.reason)


def _unless_forced(reason: str) -> str:
    return f"{reason}; force=True does it all the same"


def _device(program: Program) -> torch.device:
    tensors = (*program.state.values(), *program.example)
    values = (node.meta.get("val") for node in program.graph.nodes)
    found = (value.device for value in (*tensors, *values) if hasattr(value, "device"))
    return next(found, torch.device("cpu"))
