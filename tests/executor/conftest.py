"""Listings are tested with the kernels for AVX2 and with those for AVX-512."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fxopt.kernels import native
from fxopt.kernels.native import building
from fxopt.kernels.native.kernel_sets import DECODING


@pytest.fixture(scope="module", params=DECODING, autouse=True)
def compiled_for(request: pytest.FixtureRequest) -> Iterator[None]:
    before = building._running.get("decoding")
    answer = native.load(DECODING[request.param])
    if not answer:
        pytest.skip(answer.reason)
    yield
    building._stop("decoding")
    if before is not None:
        building._start("decoding", before)
