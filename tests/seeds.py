"""Random numbers that a test gets are those of its name, whichever ran before it.

The global generators of Python, NumPy and torch are seeded before a file is imported, before a
fixture is set up and before a test is called, each from its own name, so that a test alone draws
what it draws among others. A test that needs certain numbers seeds for itself.
"""

from __future__ import annotations

import random
import zlib
from typing import Any

import numpy as np
import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> None:
    if isinstance(collector, pytest.Module):
        _seed(collector.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: Any, request: Any) -> None:
    _seed(f"{fixturedef.argname}[{request.param_index}] of {request.node.nodeid}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    _seed(item.nodeid)


def _seed(name: str) -> None:
    number = zlib.crc32(name.encode())
    random.seed(number)
    np.random.seed(number)
    # Not torch.manual_seed, which formats a traceback for each device that isn't there.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
