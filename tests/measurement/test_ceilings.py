import sys

import pytest
import torch

from fxopt.device import Device, pretending
from fxopt.kernels import multiplies_int8
from fxopt.measurement.ceilings import _measured, ceilings
from fxopt.timing import summarize

# The package's attribute of that name is the function.
room = sys.modules["fxopt.measurement.ceilings"]


@pytest.fixture
def clock(monkeypatch):
    """One call of each kernel takes 10 ms at best, whatever it is; notes what was timed."""
    timed = []

    def latency(systems, repeats, seconds):
        timed.append(list(systems))
        return {name: summarize([30.0, 10.0, 20.0]) for name in systems}

    monkeypatch.setattr(room, "latency", latency)
    monkeypatch.setitem(room._PRODUCT, "cpu", (32, 64, 128))
    monkeypatch.setitem(room._COPIED_BYTES, "cpu", 1 << 20)
    _measured.cache_clear()
    yield timed
    _measured.cache_clear()


def test_rates_are_those_of_the_shortest_time(clock):
    found = ceilings("cpu")
    assert found is not None
    assert found.flops["float32"] == pytest.approx(2 * 32 * 64 * 128 / 0.01)
    assert found.bandwidth == pytest.approx(2 * (1 << 20) / 0.01)
    assert found.product_seconds(found.flops["float32"], "float32") == pytest.approx(1.0)
    assert found.memory_seconds(int(found.bandwidth)) == pytest.approx(1.0)
    assert str(found).startswith("float32 5.24e-05 TFLOP/s")
    assert str(found).endswith("memory 0.21 GB/s")


def test_all_take_turns_once_per_process(clock):
    assert ceilings("cpu") is ceilings(torch.device("cpu"))
    assert len(clock) == 1
    assert clock[0][0] == "copy"
    assert {"float32 0", "float32 1"} <= set(clock[0])


def test_a_dtype_that_is_emulated_has_no_ceiling_and_a_reason(clock):
    found = ceilings("cpu")
    assert found is not None
    for dtype in (torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn):
        name = str(dtype).removeprefix("torch.")
        cpu = Device.describe("cpu")
        fast = multiplies_int8(cpu) if dtype == torch.int8 else cpu.accelerates(dtype)
        assert (name in found.flops) == fast.yes
        assert fast.yes or found.missing[name] == fast.reason


@pytest.mark.parametrize("onednn", [True, False])
def test_a_cpu_without_a_dot_product_has_a_ceiling_for_int8_by_onednn(clock, monkeypatch, onednn):
    plain = Device("cpu", "a plain CPU")
    monkeypatch.setattr("fxopt.kernels.has_onednn", lambda: onednn)
    with pretending(plain):
        found = ceilings("cpu")
    assert found is not None
    assert ("int8" in found.flops) == onednn
    assert onednn or found.missing["int8"].startswith("a plain CPU has no instruction that")
    assert "bfloat16" in found.missing


def test_a_kernel_that_fails_is_left_out_with_its_reason(clock, monkeypatch):
    def kernels(device, dtype):
        def fail():
            raise RuntimeError("no such instruction\nstack")

        yield fail
        if dtype == torch.float32:
            yield lambda: None

    monkeypatch.setattr(room, "_kernels", kernels)
    monkeypatch.setattr(Device, "accelerates", lambda *_: type("Yes", (), {"reason": ""})())
    found = ceilings("cpu")
    assert found is not None
    assert list(found.flops) == ["float32"]
    assert found.missing["int8"] == "no such instruction"


def test_other_devices_have_none():
    assert ceilings("meta") is None


def test_the_kernels_do_the_product_that_is_counted(monkeypatch):
    monkeypatch.setitem(room._PRODUCT, "cpu", (32, 64, 128))
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        for kernel in room._kernels(torch.device("cpu"), dtype):
            assert kernel().shape == (32, 64)
