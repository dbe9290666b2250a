"""Products of 8-bit integers are those of int64, whatever the CPU and the range of the weights."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fxopt import kernels
from fxopt.device import Device
from fxopt.kernels import native, onednn_int8
from fxopt.kernels.onednn import has_onednn
from fxopt.kernels.onednn_int8 import product_without_dot_product, takes_full_range

ops = torch.ops.fxopt

RANGES = [(-63, 63), (-64, 64), (63, 63), (-64, -64), (-127, 127), (127, 127), (-128, -128)]


def drawn(low: int, high: int, shape: tuple[int, int], seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def exact(q: Tensor, weight: Tensor, zero_point: int = 0) -> Tensor:
    return (q.long() - zero_point) @ weight.long().t()


sizes = st.tuples(
    st.integers(0, 70), st.sampled_from([1, 2, 3]) | st.integers(1, 1300), st.integers(1, 40)
)


@given(sizes, st.sampled_from(RANGES), st.sampled_from([(-128, 127), (127, 127), (-128, -128)]))
@example((3, 70_001, 5), (63, 63), (127, 127))
@example((3, 40_000, 5), (-128, -128), (-128, -128))
@example((70, 1_025, 4), (-128, -128), (-128, -128))
def test_a_signed_product_is_exact(
    size: tuple[int, int, int], weights: tuple[int, int], codes: tuple[int, int]
) -> None:
    rows, inner, outputs = size
    q = drawn(*codes, (rows, inner), 1, torch.int8)
    weight = drawn(*weights, (outputs, inner), 2, torch.int8)
    with native.without():
        assert torch.equal(ops.int8_product(q, weight).long(), exact(q, weight))
    if rows:
        assert torch.equal(product_without_dot_product(q, weight).long(), exact(q, weight))


@given(sizes, st.sampled_from(RANGES), st.sampled_from([(0, 255), (255, 255)]), st.integers(0, 255))
@example((20, 64, 16), (63, 63), (255, 255), 0)
@example((20, 64, 16), (-127, 127), (255, 255), 0)
def test_an_unsigned_product_is_exact_to_one_rounding(
    size: tuple[int, int, int], weights: tuple[int, int], codes: tuple[int, int], zero: int
) -> None:
    rows, inner, outputs = size
    q = drawn(*codes, (rows, inner), 1, torch.uint8)
    weight = drawn(*weights, (outputs, inner), 2, torch.int8)
    one, zero_point = torch.tensor(1.0), torch.tensor(zero, dtype=torch.uint8)
    with native.without():
        y = ops.packed_int8_linear(
            q, one, zero_point, weight, torch.ones(outputs, 1), None, "none", None, None,
            torch.float32,
        )  # fmt: skip
    assert torch.equal(y, exact(q, weight, zero).float())


@pytest.mark.skipif(not has_onednn(), reason="torch was built without oneDNN")
def test_what_is_known_of_the_library_is_what_it_does() -> None:
    q = torch.full((40, 96), 255, dtype=torch.uint8)
    full, narrow = (torch.full((24, 96), size, dtype=torch.int8) for size in (127, 64))

    def agrees(weight: Tensor) -> bool:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        y = torch.ops.onednn.qlinear_pointwise(
            q, 1.0, 0, packed, torch.ones(24), torch.zeros(24, dtype=torch.int32), None, 1.0, 0,
            torch.float32, "none", [], "",
        )  # fmt: skip
        return torch.equal(y, exact(q, weight).float())

    assert agrees(narrow)
    assert agrees(full) == takes_full_range()


def test_weights_that_would_saturate_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_int8, "takes_full_range", lambda: False)
    wide = torch.full((4, 8), 65, dtype=torch.int8)
    assert onednn_int8.packed_exactly(wide) is None
    assert onednn_int8.packed_exactly(-wide) is None
    assert onednn_int8.packed_exactly(torch.full((4, 8), -128, dtype=torch.int8)) is None
    if has_onednn():
        assert onednn_int8.packed_exactly(torch.full((4, 8), -64, dtype=torch.int8)) is not None


def test_a_weight_that_grows_is_packed_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_int8, "takes_full_range", lambda: False)
    weight = torch.full((4, 8), 63, dtype=torch.int8)
    q = torch.full((3, 8), 127, dtype=torch.int8)
    for value in (63, 127, 5):
        weight.fill_(value)
        assert (product_without_dot_product(q, weight) == 8 * 127 * value).all()


def test_without_onednn_the_product_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.kernels.onednn_int8.has_onednn", lambda: False)
    q, weight = drawn(-128, 127, (9, 50), 1, torch.int8), drawn(-63, 63, (7, 50), 2, torch.int8)
    assert torch.equal(product_without_dot_product(q, weight).long(), exact(q, weight))


def test_only_cpus_saturate() -> None:
    assert not kernels.saturates(torch.device("cuda"))
    assert kernels.saturates(torch.device("cpu")) == (not takes_full_range() and not native.load())


@pytest.mark.parametrize(
    ("device", "onednn", "yes", "reason"),
    [
        (Device("cpu", "Zen 3"), True, True,
         "oneDNN multiplies int8 weights of 7 bits exactly on Zen 3"),
        (Device("cpu", "Zen 3"), False, False,
         "Zen 3 has no instruction that multiplies torch.int8 (none of "),
        (Device("cpu", "Zen 4", frozenset({"avx512_vnni"})), True, True,
         "Zen 4 multiplies torch.int8 natively (avx512_vnni)"),
        (Device("cuda", "V100", capability=(7, 0)), True, False,
         "V100's tensor cores don't take torch.int8: capability 7.0, needs 7.5"),
    ],
)  # fmt: skip
def test_seven_bits_are_fast_wherever_onednn_is(
    device: Device, onednn: bool, yes: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "has_onednn", lambda: onednn)
    answer = kernels.multiplies_int8(device)
    assert answer.yes == yes
    assert answer.reason.startswith(reason)


_CAPPED = """
import torch
from fxopt.kernels import native
q = torch.full((70, 200), -128, dtype=torch.int8)
for value in (127, -128, 63):
    weight = torch.full((9, 200), value, dtype=torch.int8)
    with native.without():
        assert (torch.ops.fxopt.int8_product(q, weight) == -128 * 200 * value).all(), value
        y = torch.ops.fxopt.packed_int8_linear(
            torch.full((70, 200), 255, dtype=torch.uint8), torch.tensor(1.0),
            torch.tensor(0, dtype=torch.uint8), weight, torch.ones(9, 1), None, "none", None, None,
            torch.float32)
        assert (y == 255 * 200 * value).all(), value
"""


@pytest.mark.parametrize(
    "caps",
    [
        {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    ],
    ids=["avx2", "sse"],
)
def test_products_are_exact_under_capped_instruction_sets(caps: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CAPPED],
        env={**os.environ, **caps},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
