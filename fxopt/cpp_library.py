"""C++ that this package brings, compiled on the machine that runs it.

Inductor's own cache of C++ libraries builds it, with the compiler, the flags and the folder of
everything else that it compiles, so that a second process finds the library built.
"""

from __future__ import annotations

from typing import Any


def build(source: str) -> Any:
    """The library of `source`, compiled with torch's headers, by its `extern "C"` functions.

    Raises torch's `InvalidCxxCompiler` where there is no compiler, `CppCompileError` or `OSError`
    where it can't be built or loaded.
    """
    from torch._inductor.codecache import CppCodeCache

    class Library(CppCodeCache):
        """With torch's headers and a cache of its own in this process."""

        cpp_compile_command_flags = {"include_pytorch": True}  # noqa: RUF012  (torch's own form)
        cache = {}  # noqa: RUF012

    return Library.load(source)
