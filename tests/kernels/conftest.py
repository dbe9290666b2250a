"""Operators that either a library or a compiled kernel runs are tested with each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fxopt.kernels import native


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
