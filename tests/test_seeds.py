"""What a test draws depends on its name alone."""

from __future__ import annotations

import pytest

_DRAWS = """
    import random
    import numpy as np
    import pytest
    import torch

    def drawn():
        return (random.random(), float(np.random.rand()), float(torch.rand(())))

    AT_IMPORT = drawn()

    @pytest.fixture(scope="module", params=["one", "two"])
    def shared(request):
        return drawn()

    @pytest.fixture
    def own():
        return drawn()

    def test_first(shared, own):
        print("numbers", {"import": AT_IMPORT, "shared": shared, "own": own, "first": drawn()})

    def test_second(shared, own):
        print("numbers", {"import": AT_IMPORT, "shared": shared, "own": own, "second": drawn()})
"""


def test_a_test_draws_alone_what_it_draws_among_others(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_draws=_DRAWS)

    def lines(*names: str) -> list[str]:
        options = ("-p", "tests.seeds", "-p", "no:randomly", "-s", "-q", "-n0")
        result = pytester.runpytest_inprocess(*options, *(f"test_draws.py::{n}" for n in names))
        result.assert_outcomes(passed=2 * len(names))
        return sorted(line.lstrip(".") for line in result.outlines if "numbers" in line)

    both = lines("test_first", "test_second")
    assert both == sorted(lines("test_second") + lines("test_first"))
    numbers = [number for line in both for number in _numbers(line)]
    # One draw each at import, of the two shared fixtures, and of two own ones and calls a test.
    assert len(set(numbers)) == 3 * (1 + 2 + 4 + 4)


def _numbers(line: str) -> list[float]:
    found = eval(line.removeprefix("numbers "))
    return [number for drawn in found.values() for number in drawn]
