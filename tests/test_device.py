import pytest
import torch

from fxopt import PassError
from fxopt.device import Device, pretending, read_cpuinfo

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
        "Old CPU has no instruction that multiplies torch.float16 (none of amx_fp16, avx512_fp16): "
        "it would be emulated, slower than float32"
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


def test_another_device_is_pretended_until_the_end_of_the_block():
    gpu, old = Device("cuda", "H100", capability=(9, 0)), Device("cpu", "Old", frozenset())
    with pretending(gpu):
        assert Device.describe("cpu") is Device.describe("cuda:1") is Device.parse("cpu") is gpu
        with pytest.raises(PassError), pretending(old):
            Device.parse(Device.describe("cpu").name)
        assert Device.describe("cpu") is gpu
    assert Device.describe("cpu").name not in (gpu.name, old.name)


def test_arm_multiplies_bfloat16_but_torch_has_no_float16_product_there():
    device = Device("cpu", "Neoverse V1", frozenset({"asimdhp", "asimdfhm", "bf16", "i8mm"}))
    assert device.accelerates(torch.bfloat16)
    assert not device.accelerates(torch.float16)


def test_widening_alone_is_no_acceleration():
    device = Device("cpu", "Arrow Lake", frozenset({"avx_ne_convert", "avx_vnni", "avx2"}))
    assert not device.accelerates(torch.bfloat16)
    assert not device.accelerates(torch.float16)
    assert device.accelerates(torch.int8)


@pytest.mark.parametrize(
    ("text", "bfloat16", "float16"),
    [
        ("cuda:6.1", False, False),
        ("cuda:7.5", False, True),
        ("cuda:8.0", True, True),
        ("cuda:12.0", True, True),
        ("cpu:none", False, False),
        ("cpu:amx_bf16+avx512_bf16", True, False),
        ("cpu:avx512_bf16+avx512_fp16", True, True),
        ("cpu:amx_fp16", False, True),
    ],
)
def test_described_devices_answer_and_print_as_they_were_written(text, bfloat16, float16):
    device = Device.parse(text)
    assert device.spec == text
    assert Device.parse(device.spec) == device
    assert bool(device.accelerates(torch.bfloat16)) is bfloat16
    assert bool(device.accelerates(torch.float16)) is float16


@pytest.mark.parametrize("text", ["cpu", "cuda"])
def test_a_bare_kind_is_this_machine(text):
    device = Device.parse(text)
    assert device is Device.describe(text)
    again = Device.parse(device.spec)
    for dtype in (torch.bfloat16, torch.float16, torch.int8):
        assert bool(again.accelerates(dtype)) is bool(device.accelerates(dtype))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "tpu",
            "no device is called 'tpu': write cpu or cuda for this machine's, cuda:8.0 (a compute "
            "capability) or cpu:avx512_bf16+amx_bf16 (instruction sets) for another",
        ),
        (
            "cuda:0",
            "'cuda:0' gives no compute capability: write it as cuda:8.0 (A100) or cuda:9.0 (H100)",
        ),
        (
            "cuda:0.0",
            "'cuda:0.0' gives no compute capability: write it as cuda:8.0 (A100) or cuda:9.0 "
            "(H100)",
        ),
        (
            "cpu:avx512bf16",
            "'cpu:avx512bf16' names 'avx512bf16', which is none of the instruction sets that "
            "matter here: amx_bf16, amx_fp16, amx_int8, asimddp, avx512_bf16, avx512_fp16, "
            "avx512_vnni, avx_vnni, avx_vnni_int8, bf16, i8mm. Join several with +; cpu:none is a "
            "CPU without any",
        ),
    ],
)
def test_nonsense_is_no_device(text, message):
    with pytest.raises(PassError) as caught:
        Device.parse(text)
    assert str(caught.value) == message


@pytest.mark.parametrize("text", ["cpu:", "cpu:avx512_bf16,amx_bf16", "cuda:", "cuda:eight", ""])
def test_other_nonsense_is_no_device_either(text):
    with pytest.raises(PassError):
        Device.parse(text)


@pytest.mark.parametrize(
    ("text", "dtype", "reason"),
    [
        (
            "cuda:8.0",
            torch.bfloat16,
            "a CUDA device's tensor cores take torch.bfloat16 (capability 8.0); it has float32's "
            "range",
        ),
        (
            "cuda:7.5",
            torch.float16,
            "a CUDA device's tensor cores don't take torch.bfloat16: capability 7.5, needs 8.0; "
            "a CUDA device's tensor cores take torch.float16 (capability 7.5)",
        ),
        (
            "cpu:none",
            None,
            "a CPU without such instructions has no instruction that multiplies torch.bfloat16 "
            "(none of amx_bf16, avx512_bf16, bf16): it would be emulated, slower than float32; "
            "a CPU without such instructions has no instruction that multiplies torch.float16 "
            "(none of amx_fp16, avx512_fp16): it would be emulated, slower than float32",
        ),
    ],
)
def test_half_precision_is_bfloat16_where_it_can_be(text, dtype, reason):
    choice = Device.parse(text).half()
    assert choice.dtype is dtype
    assert choice.reason == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("cuda:7.5", "a CUDA device has no sparse tensor cores: capability 7.5, needs 8.0"),
        ("cuda:8.0", "a CUDA device has sparse tensor cores (capability 8.0)"),
        ("cuda:12.0", "a CUDA device has sparse tensor cores (capability 12.0)"),
        ("cpu:none", "a CPU without such instructions has no sparse tensor cores"),
    ],
)
def test_which_device_multiplies_2_to_4_sparse(text, reason):
    answer = Device.parse(text).sparse24()
    assert answer.reason == reason
    assert bool(answer) == ("has sparse" in reason)
    assert Device("cuda", "CUDA").sparse24().reason == "this machine has no CUDA device"
