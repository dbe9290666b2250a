"""The sources of the compiled kernels compile, on every CPU that they are for."""

from __future__ import annotations

import pytest

from fxopt.kernels import native
from fxopt.kernels.native import building


def test_the_sources_compile_here() -> None:
    # Elsewhere tests of the kernels are skipped where they can't be had: a broken source would be.
    if not building._supported():
        pytest.skip(building._supported().reason)
    reason = native.load().reason
    assert "could not be built" not in reason, reason
