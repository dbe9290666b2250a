"""Which half precision a pass is to use: its `dtype`, `device` and `force` options together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import torch

from fxopt.device import Device
from fxopt.passes.mixed_precision.half_values import HALF
from fxopt.program import Program
from fxopt.rewriting.option_types import OptionType

_BY_NAME = {name: dtype for dtype in HALF for name in (str(dtype), str(dtype)[len("torch.") :])}


@dataclass(frozen=True)
class HalfDtypes(OptionType):
    """One of the two dtypes, which may be given by name, or "auto"."""

    @property
    def expected(self) -> str:
        return '"auto", torch.bfloat16 or torch.float16'

    @property
    def spelling(self) -> str:
        return "auto | bfloat16 | float16"

    @property
    def choices(self) -> tuple[Any, ...]:
        return ("auto", *HALF)

    def take(self, given: Any) -> HalfDtype:
        if isinstance(given, str) and given == "auto":
            return "auto"
        dtype = _BY_NAME.get(str(given))
        if dtype is None:
            raise self.unfit()
        return dtype

    def read(self, text: str) -> HalfDtype:
        return self.take(text)


HalfDtype: TypeAlias = Annotated[torch.dtype | Literal["auto"], HalfDtypes()]


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
