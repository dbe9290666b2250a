"""What Inductor needs on this machine, asked before it is needed, and its failures explained."""

from __future__ import annotations

import importlib.util

import torch

from fxopt.errors import LowerError

_NO_COMPILER = (
    "Inductor compiles for the CPU with a C++ compiler, and none was found; install one "
    "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install) "
    "or run uncompiled with Lower(fallback='eager')"
)
_BROKEN_COMPILER = (
    "the C++ compiler failed on generated code; if it misses a header, install it (Python.h comes "
    "with python3-dev), else update the compiler, or run uncompiled with Lower(fallback='eager')"
)
_NO_TRITON = (
    "Inductor compiles for CUDA with Triton, which is not installed; pip install triton, or run "
    "uncompiled with Lower(fallback='eager')"
)


def check_toolchain(device: torch.device) -> None:
    """Raise `LowerError` where Inductor can't compile for `device` on this machine."""
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise LowerError(
                f"the program is on {device}, and this machine has no CUDA device (or torch is "
                "built without CUDA); move the model to the CPU first"
            )
        if importlib.util.find_spec("triton") is None:
            raise LowerError(_NO_TRITON)
        return
    if device.type == "cpu" and not has_cpp_compiler():
        raise LowerError(_NO_COMPILER)


def has_cpp_compiler() -> bool:
    """Whether Inductor finds a C++ compiler that starts."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def explain_compiler_failure(error: Exception) -> Exception:
    """A `LowerError` for a failure of the compiler beneath `error`; any other error as it is."""
    from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    for cause in _causes(error):
        if isinstance(cause, InvalidCxxCompiler):
            return LowerError(_NO_COMPILER)
        if isinstance(cause, CppCompileError):
            return LowerError(f"{_BROKEN_COMPILER}\n  {_first_error_line(cause.output)}")
    if isinstance(error, (BackendCompilerFailed, TorchDynamoException)):
        first = str(error).strip().splitlines() or [type(error).__name__]
        return LowerError(
            f"torch.compile can't lower this program: {first[0]}; run it uncompiled with "
            "Lower(fallback='eager')"
        )
    return error


def recompile_limit_error() -> type[Exception]:
    """What Dynamo raises, in full-graph mode, when it has compiled one code too often."""
    from torch._dynamo.exc import FailOnRecompileLimitHit

    return FailOnRecompileLimitHit


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        inner = getattr(current, "inner_exception", None)
        current = inner or current.__cause__ or current.__context__
    return chain


def _first_error_line(output: str) -> str:
    lines = [line for line in output.splitlines() if "error" in line]
    return (lines or output.splitlines() or [""])[0].strip()
