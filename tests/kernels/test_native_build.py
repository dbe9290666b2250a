"""The sources of the compiled kernels compile, on every CPU that they are for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fxopt.device import Device
from fxopt.kernels import native
from fxopt.kernels.native.kernel_sets import DECODING, PRODUCTS, KernelSet


@pytest.mark.parametrize("kernels", [PRODUCTS, *DECODING.values()], ids=lambda one: one.vectors)
def test_the_sources_compile_here(kernels: KernelSet) -> None:
    # Elsewhere tests of the kernels are skipped where they can't be had: a broken source would be.
    answer = kernels.supported(Device.describe())
    if not answer:
        pytest.skip(answer.reason)
    reason = native.load(kernels).reason
    assert "could not be built" not in reason, reason


def test_a_cpu_without_wide_vectors_is_left_to_libraries() -> None:
    answer = DECODING["AVX2"].supported(Device("cpu", "Old", frozenset({"avx2"})))
    assert not answer
    assert answer.reason == "Old lacks fma, f16c, which the kernels need"


@pytest.mark.parametrize(
    ("cap", "found"),
    [
        ("avx2", "(AVX2)"),
        ("default", "torch uses DEFAULT of this CPU, the kernels AVX2"),
    ],
)
def test_what_torch_is_capped_at_caps_the_kernels(cap: str, found: str) -> None:
    answer = DECODING["AVX2"].supported(Device.describe())
    if not answer:
        pytest.skip(answer.reason)
    code = (
        "from fxopt.device import Device\n"
        "from fxopt.kernels import native\n"
        "kernels = native.decoding()\n"
        "print(f'({kernels.vectors})', kernels.supported(Device.describe()).reason)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={"ATEN_CPU_CAPABILITY": cap, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found in process.stdout
