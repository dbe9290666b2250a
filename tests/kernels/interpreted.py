"""Runs Triton kernels in Triton's interpreter, on the CPU, in a process of its own.

The interpreter is chosen by an environment variable that Triton reads when it is imported, and
stays chosen: in this process it would take real kernels away from the tests that need a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import pytest

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which only Linux has"
)


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """`call(function, *args)`: a function of a module's top level, run where kernels are
    interpreted; arguments and results are pickled."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_start) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def _start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)
