import pytest
import torch

from fxopt.device import Device, read_cpuinfo

CPUINFO = """processor\t: 0
model name\t: Some CPU
flags\t\t: fpu avx512f avx512_vnni avx512_bf16
processor\t: 1
model name\t: Some CPU
"""


def test_reads_cpuinfo():
    name, instructions = read_cpuinfo(CPUINFO)
    assert name == "Some CPU"
    assert instructions == {"fpu", "avx512f", "avx512_vnni", "avx512_bf16"}
    assert read_cpuinfo("") == ("", frozenset())


@pytest.mark.parametrize(
    ("dtype", "yes"),
    [
        (torch.float32, True),
        (torch.float64, True),
        (torch.bfloat16, True),
        (torch.float16, False),
        (torch.int8, True),
        (torch.int64, False),
        (torch.float8_e4m3fn, False),
    ],
)
def test_cpu_answers_by_instruction_set(dtype, yes):
    device = Device("cpu", *read_cpuinfo(CPUINFO))
    answer = device.accelerates(dtype)
    assert bool(answer) is answer.yes is yes


def test_cpu_reason_names_what_is_missing():
    answer = Device("cpu", "Old CPU", frozenset({"sse2"})).accelerates(torch.float16)
    assert answer.reason == (
        "Old CPU has no instruction that multiplies torch.float16 (none of amx_fp16, avx512_fp16, "
        "asimdhp): it would be emulated, slower than float32"
    )


@pytest.mark.parametrize(
    ("capability", "dtypes"),
    [
        ((7, 0), {torch.float16}),
        ((7, 5), {torch.float16, torch.int8}),
        ((8, 6), {torch.float16, torch.int8, torch.bfloat16}),
        ((8, 9), {torch.float16, torch.int8, torch.bfloat16, torch.float8_e4m3fn}),
        ((9, 0), {torch.float16, torch.int8, torch.bfloat16, torch.float8_e4m3fn}),
        (None, set()),
    ],
)
def test_cuda_answers_by_capability(capability, dtypes):
    device = Device("cuda", "GPU", capability=capability)
    asked = (torch.float16, torch.int8, torch.bfloat16, torch.float8_e4m3fn)
    assert {dtype for dtype in asked if device.accelerates(dtype)} == dtypes


def test_cuda_reasons():
    old = Device("cuda", "GPU", capability=(7, 0))
    assert "capability 7.0, needs 8.0" in old.accelerates(torch.bfloat16).reason
    assert Device("cuda", "CUDA").accelerates(torch.int8).reason == (
        "this machine has no CUDA device"
    )


def test_float8_reasons_name_what_is_missing():
    cpu = Device("cpu", *read_cpuinfo(CPUINFO))
    assert cpu.accelerates(torch.float8_e4m3fn).reason == (
        "no CPU kernel multiplies torch.float8_e4m3fn natively: on Some CPU it would be emulated, "
        "slower than float32"
    )
    gpu = Device("cuda", "A100", capability=(8, 0))
    assert gpu.accelerates(torch.float8_e4m3fn).reason == (
        "A100's tensor cores don't take torch.float8_e4m3fn: capability 8.0, needs 8.9"
    )


@pytest.mark.parametrize(
    ("device", "yes", "reason"),
    [
        (Device("cpu", "Some CPU"), False, "Triton kernels run on CUDA devices, not on Some CPU"),
        (Device("cuda", "CUDA", triton=True), False, "this machine has no CUDA device"),
        (
            Device("cuda", "H100", capability=(9, 0)),
            False,
            "Triton isn't installed: pip install triton, on Linux",
        ),
        (
            Device("cuda", "T4", capability=(7, 5), triton=True),
            False,
            "T4 has capability 7.5; the kernels need 8.0",
        ),
        (
            Device("cuda", "H100", capability=(9, 0), triton=True),
            True,
            "Triton compiles for H100 (capability 9.0)",
        ),
    ],
)
def test_triton_answers(device, yes, reason):
    answer = device.runs_triton()
    assert bool(answer) is yes
    assert answer.reason == reason


def test_describes_this_machine_once():
    assert Device.describe("cpu") is Device.describe(torch.device("cpu"))
    assert Device.describe("cpu").name
    assert not Device.describe("meta").accelerates(torch.int8)
