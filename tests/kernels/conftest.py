"""Operators that either a library or a compiled kernel runs are tested with each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fxopt.kernels import native
from fxopt.kernels.native import building
from fxopt.kernels.native.kernel_sets import DECODING


@pytest.fixture(scope="module", params=["library", "native"])
def served_by(request: pytest.FixtureRequest) -> Iterator[str]:
    """Who runs the operators of the module's tests."""
    if request.param == "native":
        answer = native.load()
        if not answer:
            pytest.skip(answer.reason)
        yield "native"
        return
    with native.without():
        yield "library"


@pytest.fixture(scope="module", params=["library", *DECODING])
def decoded_by(request: pytest.FixtureRequest) -> Iterator[str]:
    """Who runs the module's operators of a step of generation: a library, or the kernels for what
    torch calls AVX2 or AVX512."""
    if request.param == "library":
        with native.without():
            yield "library"
        return
    before = building._running.get("decoding")
    answer = native.load(DECODING[request.param])
    if not answer:
        pytest.skip(answer.reason)
    yield request.param
    building._stop("decoding")
    if before is not None:
        building._start("decoding", before)


@pytest.fixture(scope="module", params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """With three threads what is divided among them is uneven."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)
