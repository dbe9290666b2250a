"""The bound counts products at the ceiling of their dtype, and never more than there are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fxopt
from fxopt.measurement.ceilings import Ceilings
from fxopt.program import Program
from fxopt.search import static_cost
from fxopt.search.static_cost import least_milliseconds, least_ratios
from tests.search.small import INPUTS, mlp

WORK = 2 * (4 * 8 * 16 + 4 * 16 * 4)
LIMITS = Ceilings("cpu", {"float32": 1e6, "bfloat16": 2e6, "int8": 8e6}, 1e9)


@pytest.fixture(autouse=True)
def _known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_cost, "ceilings", lambda device: LIMITS)


def program(passes: str) -> Program:
    made = fxopt.transform(mlp(), passes, example_inputs=INPUTS[0], measure_cost=False)
    return made.program


@pytest.mark.parametrize(
    ("passes", "operations_a_second"),
    [
        ("canonicalize", 1e6),
        ("autocast{dtype=bfloat16, force=True}", 2e6),
        ("int8-linear{where=always}", 8e6),
        ("int8-linear{mode=weight_only, where=always}", 8e6),
    ],
)
def test_products_run_at_the_ceiling_of_their_dtype(
    passes: str, operations_a_second: float
) -> None:
    wanted = 0.8 * 1e3 * WORK / operations_a_second
    assert least_milliseconds(program(passes)) == pytest.approx(wanted)


def test_channels_that_are_cut_cost_nothing() -> None:
    whole = least_milliseconds(program("canonicalize"))
    half = least_milliseconds(program("prune-channels{ratio=0.5}"))
    assert whole is not None
    assert half == pytest.approx(whole / 2)


def test_a_device_without_ceilings_has_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_cost, "ceilings", lambda device: None)
    assert least_milliseconds(program("canonicalize")) is None


@given(
    st.floats(0.01, 100.0) | st.none(), st.integers(0, 10**9), st.floats(0.01, 100.0),
    st.integers(1, 10**9),
)  # fmt: skip
def test_ratios_are_to_the_original(
    milliseconds: float | None, size: int, original_ms: float, original_bytes: int
) -> None:
    original = {"latency_ms": original_ms, "memory_bytes": float(original_bytes)}
    found = least_ratios(("memory", "energy", "latency"), milliseconds, size, original)
    assert found == pytest.approx((size / original_bytes, 0.0, (milliseconds or 0.0) / original_ms))
    assert least_ratios(("latency",), milliseconds, size, {}) == (0.0,)
