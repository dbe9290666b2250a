"""Compile the C++ sources for this CPU and register what they define."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxopt.cpp_library import build
from fxopt.device import Answer, Device
from fxopt.kernels.native.benchmark import trial
from fxopt.kernels.native.registration import register_libraries, unregister_libraries
from fxopt.kernels.packed_weights import PACKED_WEIGHTS

# Compiled as one text, in this order.
_SOURCES = (
    "includes.h",
    "vectors.h",
    "product.h",
    "panels.h",
    "linear.h",
    "quantize.h",
    "attention.h",
    "operators.h",
)
_NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16")

_library = torch.library.Library("fxopt", "FRAGMENT")
_library.define("packed_panels(Tensor weight) -> Tensor")


def _packed_panels(weight: Tensor) -> Tensor:
    return PACKED_WEIGHTS.get(weight, torch.ops.fxopt.pack_panels)


_library.impl("packed_panels", _packed_panels, "CompositeExplicitAutograd")


_switched_off: ContextVar[bool] = ContextVar("switched_off", default=False)


def load() -> Answer:
    """Whether the compiled kernels run on this machine from now on, and why.

    The first call on a machine compiles them, some ten seconds, and times them beside libraries;
    the first in a process loads them.
    """
    if _switched_off.get():
        return Answer(False, "the kernels for this CPU are switched off")
    kernels, answer = _kernels(Device.describe("cpu"))
    if kernels is None:
        return answer
    unregister_libraries()
    kernels.register_kernels()
    slower = _slower()
    if slower is None:
        return answer
    kernels.unregister_kernels()
    register_libraries()
    return Answer(False, slower)


def loaded() -> bool:
    """Whether `load` need not compile or load anything in this process."""
    return _kernels.cache_info().currsize > 0


@contextmanager
def without() -> Iterator[None]:
    """Libraries run every operator, as on a CPU that the kernels are not for."""
    token = _switched_off.set(True)
    kernels, _ = _kernels(Device.describe("cpu")) if loaded() else (None, None)
    if kernels is not None:
        kernels.unregister_kernels()
        register_libraries()
    try:
        yield
    finally:
        _switched_off.reset(token)
        if kernels is not None:
            load()


@functools.cache
def _slower() -> str | None:
    """By how much the kernels, while registered, are slower than libraries, if they are."""
    timing = trial(hashlib.sha256(_source().encode()).hexdigest()[:16])
    ratio = timing.ratios.get("compiled")
    if ratio is not None and ratio.low <= 1.0:
        return None
    return f"libraries are faster here than the kernels compiled for this CPU: {timing}"


@functools.cache
def _kernels(cpu: Device) -> tuple[Any | None, Answer]:
    """The compiled library, where there can be one, and why there is or isn't."""
    answer = _supported(cpu)
    if not answer:
        return None, answer
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        kernels = _build()
    except InvalidCxxCompiler:
        return None, Answer(False, "no C++ compiler was found to build the kernels for this CPU")
    except (CppCompileError, OSError) as error:
        return None, Answer(False, f"the kernels for this CPU could not be built: {error}")
    return kernels, Answer(True, f"kernels compiled for {cpu.name} (AVX-512)")


def _supported(cpu: Device) -> Answer:
    matrices = sorted(name for name in cpu.instructions if name.startswith("amx_"))
    if matrices:
        return Answer(False, f"{cpu.name} has {', '.join(matrices)}, which oneDNN multiplies by")
    missing = [name for name in _NEEDED if name not in cpu.instructions]
    if missing:
        return Answer(False, f"{cpu.name} lacks {', '.join(missing)}, which the kernels need")
    return Answer(True, f"{cpu.name} has what the kernels need")


def _build() -> Any:
    return build(_source())


def _source() -> str:
    folder = Path(__file__).parent
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in _SOURCES)
