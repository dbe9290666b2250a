"""The pool in C++ (`pool.h`), and the calls that run on it."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fxopt.cpp_library import build

_Inputs = TypeVar("_Inputs")
_Outputs = TypeVar("_Outputs")
_log = logging.getLogger(__name__)


def load() -> bool:
    """Whether memory can be kept in this process: whether the pool's C++ could be compiled.

    The first call on a machine compiles it, some three seconds.
    """
    return _pool() is not None


def reusing(run: Callable[[_Inputs], _Outputs]) -> Callable[[_Inputs], _Outputs]:
    """`run`, whose calls take what earlier calls of it, and of others made so, have freed.

    CPU tensors of at least 1 KiB that are made in a call, on its thread, take a block that was
    given back, of at most twice their size, or a new one. `run` itself where there is no pool.
    """
    pool = _pool()
    if pool is None:
        return run
    enter, leave = pool.enter, pool.leave

    def call(inputs: _Inputs) -> _Outputs:
        enter()
        try:
            return run(inputs)
        finally:
            leave()

    return call


def kept_bytes() -> int:
    """Bytes in the pool that no tensor is using."""
    return _pool().kept_bytes() if _loaded() else 0


def release() -> None:
    """Give what the pool keeps back to the C library; the next calls take memory anew."""
    if _loaded():
        _pool().release()


def _loaded() -> bool:
    return _pool.cache_info().currsize > 0 and _pool() is not None


@functools.cache
def _pool() -> Any:
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    source = (Path(__file__).parent / "pool.h").read_text(encoding="utf-8")
    try:
        pool = build(source)
    except (CppCompileError, InvalidCxxCompiler, OSError) as error:
        _log.warning("compiled programs take their memory anew at each call: %s", error)
        return None
    pool.kept_bytes.restype = ctypes.c_size_t
    pool.install()
    return pool
