"""Compile the C++ sources for this CPU and register what they define."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fxopt.cpp_library import build
from fxopt.device import Answer, Device
from fxopt.kernels.native.benchmark import trial
from fxopt.kernels.native.kernel_sets import PRODUCTS, KernelSet, decoding
from fxopt.kernels.native.registration import (
    register_libraries,
    serves,
    unregister_libraries,
)
from fxopt.kernels.packed_weights import PACKED_WEIGHTS

_library = torch.library.Library("fxopt", "FRAGMENT")
_library.define("packed_panels(Tensor weight) -> Tensor")


def _packed_panels(weight: Tensor) -> Tensor:
    return PACKED_WEIGHTS.get(weight, torch.ops.fxopt.pack_panels)


_library.impl("packed_panels", _packed_panels, "CompositeExplicitAutograd")

_known: dict[tuple[KernelSet, Device], tuple[Any | None, Answer]] = {}
_running: dict[str, Any] = {}
"""By the name of a set, the library whose kernels are registered."""
_switched_off: ContextVar[bool] = ContextVar("switched_off", default=False)


def load(kernels: KernelSet = PRODUCTS) -> Answer:
    """Whether the compiled kernels run on this machine from now on, and why.

    The first call on a machine compiles them, some ten seconds, and times them beside libraries;
    the first in a process loads them.
    """
    if _switched_off.get():
        return Answer(False, "the kernels for this CPU are switched off")
    library, answer = _compiled(kernels)
    if library is None:
        return answer
    _start(kernels.name, library)
    slower = _slower(kernels)
    if slower is None:
        return answer
    _stop(kernels.name)
    return Answer(False, slower)


def load_for(operators: Iterable[Any]) -> None:
    """Load what can take the place of libraries for some of these operators."""
    targets = list(operators)
    for kernels in (PRODUCTS, decoding()):
        if any(serves(target, kernels.name) for target in targets):
            load(kernels)


def loaded(kernels: KernelSet = PRODUCTS) -> bool:
    """Whether `load` need not compile or load anything in this process."""
    return any(known == kernels for known, _ in _known)


def running(kernels: str) -> bool:
    """Whether the compiled kernels of the set of that name are registered now."""
    return kernels in _running


@contextmanager
def without() -> Iterator[None]:
    """Libraries run every operator, as on a CPU that the kernels are not for."""
    token = _switched_off.set(True)
    running = dict(_running)
    for name in running:
        _stop(name)
    try:
        yield
    finally:
        _switched_off.reset(token)
        for name, library in running.items():
            _start(name, library)


def _start(name: str, library: Any) -> None:
    if _running.get(name) is not library:
        _stop(name)
        unregister_libraries(name)
        library.register_kernels()
        _running[name] = library


def _stop(name: str) -> None:
    library = _running.pop(name, None)
    if library is not None:
        library.unregister_kernels()
        register_libraries(name)


@functools.cache
def _slower(kernels: KernelSet) -> str | None:
    """By how much the kernels, while registered, are slower than libraries, if they are."""
    digest = hashlib.sha256(kernels.source().encode()).hexdigest()[:16]
    timing = trial(kernels.layer, digest)
    ratio = timing.ratios.get("compiled")
    if ratio is not None and ratio.low <= 1.0:
        return None
    return f"libraries are faster here than the kernels compiled for this CPU: {timing}"


def _compiled(kernels: KernelSet) -> tuple[Any | None, Answer]:
    cpu = Device.describe("cpu")
    if (kernels, cpu) not in _known:
        _known[kernels, cpu] = _compile(kernels, cpu)
    return _known[kernels, cpu]


def _compile(kernels: KernelSet, cpu: Device) -> tuple[Any | None, Answer]:
    """The compiled library, where there can be one, and why there is or isn't."""
    answer = kernels.supported(cpu)
    if not answer:
        return None, answer
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        library = build(kernels.source())
    except InvalidCxxCompiler:
        return None, Answer(False, "no C++ compiler was found to build the kernels for this CPU")
    except (CppCompileError, OSError) as error:
        return None, Answer(False, f"the kernels for this CPU could not be built: {error}")
    return library, Answer(True, f"kernels compiled for {cpu.name} ({kernels.vectors})")
