"""What a device multiplies fast, asked once.

A dtype that a device only emulates is slower than float32, whatever its size: float16 on a CPU
without an fp16 unit runs at a quarter of float32's speed. A pass that lowers precision asks here
whether that pays, and its plan shows the answer.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch

from fxopt.errors import PassError

_ASKED = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.float8_e4m3fn,
)
_CPUINFO = Path("/proc/cpuinfo")
# A dtype -> the instruction sets that multiply it natively, by their names in /proc/cpuinfo on x86
# (flags) and on Arm (Features). AVX-512 alone and avx_ne_convert only widen bfloat16 and float16 to
# float32 (oneDNN developer guide, "Data Types", hardware limitations). Arm's asimdhp multiplies
# float16, but torch has no matrix product on it: the kernel of the Arm Compute Library was taken
# out because it adds up in float16 (pytorch/pytorch pull request 144992), and float16 runs at a
# half to a tenth of bfloat16's speed there (issue 134709).
_NATIVE: dict[torch.dtype, tuple[str, ...]] = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16"),
    torch.int8: ("amx_int8", "avx512_vnni", "avx_vnni", "avx_vnni_int8", "i8mm", "asimddp"),
    # Some CPUs to come have instructions for it; torch has no kernel that uses them.
    torch.float8_e4m3fn: (),
}
# The least compute capability whose tensor cores take the dtype.
# Source: CUDA C++ Programming Guide, "Compute Capabilities".
_TENSOR_CORES: dict[torch.dtype, tuple[int, int]] = {
    torch.float16: (7, 0),
    torch.int8: (7, 5),
    torch.bfloat16: (8, 0),
    torch.float8_e4m3fn: (8, 9),
}
# The least one whose tensor cores skip the zeros of 2:4 sparsity: same source, "Compute Capability
# 8.x".
_SPARSE_TENSOR_CORES: tuple[int, int] = (8, 0)
# Below, Triton has no pipelined int8 product.
_TRITON: tuple[int, int] = (8, 0)
_NO_CUDA = "this machine has no CUDA device"
_NONE = "none"
_CAPABILITY = re.compile(r"(\d+)\.(\d)")


@dataclass(frozen=True)
class Answer:
    """Yes or no, and why; true exactly when `yes`."""

    yes: bool
    reason: str

    def __bool__(self) -> bool:
        return self.yes


@dataclass(frozen=True)
class HalfChoice:
    """The dtype that "half precision" means on a device, None where it has none, and why."""

    dtype: torch.dtype | None
    reason: str


@dataclass(frozen=True)
class Device:
    """A device by what it has: CPU instruction sets, or a CUDA compute capability and Triton.

    `Device.describe("cpu")` asks this machine; `Device.parse("cuda:8.0")` describes another one.
    """

    kind: str
    name: str
    instructions: frozenset[str] = frozenset()
    capability: tuple[int, int] | None = None
    triton: bool = False

    @staticmethod
    def describe(device: torch.device | str = "cpu") -> Device:
        """What `device` is on this machine; a CUDA device that isn't here has no capability."""
        pretended = _PRETENDED.get()
        if pretended is not None:
            return pretended
        device = torch.device(device)
        if device.type == "cuda":
            return _describe_cuda(device.index or 0)
        return _describe_cpu() if device.type == "cpu" else Device(device.type, str(device))

    @staticmethod
    def parse(text: str) -> Device:
        """The device that `text` describes, for compiling on one machine for another.

        "cuda:8.0" gives a compute capability, "cpu:avx512_bf16+amx_bf16" the instruction sets, as
        /proc/cpuinfo names them, out of those that matter here, "cpu:none" a CPU without any;
        "cpu" and "cuda" are this machine's. Raises `PassError` for anything else.
        """
        kind, colon, detail = text.partition(":")
        if kind not in ("cpu", "cuda"):
            raise PassError(
                f"no device is called {text!r}: write cpu or cuda for this machine's, cuda:8.0 "
                "(a compute capability) or cpu:avx512_bf16+amx_bf16 (instruction sets) for another"
            )
        if not colon:
            return Device.describe(kind)
        return _parse_cpu(text, detail) if kind == "cpu" else _parse_cuda(text, detail)

    @property
    def spec(self) -> str:
        """The text from which `Device.parse` makes a device that gives the same answers."""
        if self.kind == "cpu":
            known = sorted(self.instructions & _known_instructions())
            return f"cpu:{'+'.join(known) or _NONE}"
        if self.capability is None:
            return self.kind
        return f"{self.kind}:{'.'.join(map(str, self.capability))}"

    def half(self) -> HalfChoice:
        """The dtype of half precision that this device multiplies natively, and why that one.

        bfloat16 wherever it can be: it has float32's range, so nothing overflows. float16 has 3
        bits of mantissa more and ends at 65504.
        """
        bfloat16, float16 = (self.accelerates(d) for d in (torch.bfloat16, torch.float16))
        if bfloat16:
            return HalfChoice(torch.bfloat16, f"{bfloat16.reason}; it has float32's range")
        why = f"{bfloat16.reason}; {float16.reason}"
        return HalfChoice(torch.float16 if float16 else None, why)

    def accelerates(self, dtype: torch.dtype) -> Answer:
        """Whether matrix products of `dtype` run at float32's speed or above here, and why."""
        if dtype not in _ASKED:
            return Answer(False, f"{dtype} is not a dtype that products are chosen in")
        if dtype in (torch.float32, torch.float64):
            return Answer(True, f"every device multiplies {dtype} natively")
        if self.kind == "cpu":
            return self._on_cpu(dtype)
        if self.kind == "cuda":
            return self._on_cuda(dtype)
        return Answer(False, f"nothing is known about {dtype} on {self.name}")

    def runs_triton(self) -> Answer:
        """Whether kernels written in Triton run here, and why."""
        if self.kind != "cuda":
            return Answer(False, f"Triton kernels run on CUDA devices, not on {self.name}")
        if self.capability is None:
            return Answer(False, _NO_CUDA)
        if not self.triton:
            return Answer(False, "Triton isn't installed: pip install triton, on Linux")
        has, wants = _versions(self.capability, _TRITON)
        if self.capability >= _TRITON:
            return Answer(True, f"Triton compiles for {self.name} (capability {has})")
        return Answer(False, f"{self.name} has capability {has}; the kernels need {wants}")

    def sparse24(self) -> Answer:
        """Whether products with a 2:4 sparse weight run faster than dense ones here, and why."""
        if self.kind != "cuda":
            return Answer(False, f"{self.name} has no sparse tensor cores")
        if self.capability is None:
            return Answer(False, _NO_CUDA)
        has, wants = _versions(self.capability, _SPARSE_TENSOR_CORES)
        if self.capability >= _SPARSE_TENSOR_CORES:
            return Answer(True, f"{self.name} has sparse tensor cores (capability {has})")
        return Answer(
            False, f"{self.name} has no sparse tensor cores: capability {has}, needs {wants}"
        )

    def _on_cpu(self, dtype: torch.dtype) -> Answer:
        if not _NATIVE[dtype]:
            return Answer(
                False,
                f"no CPU kernel multiplies {dtype} natively: on {self.name} it would be emulated, "
                "slower than float32",
            )
        found = [name for name in _NATIVE[dtype] if name in self.instructions]
        if found:
            return Answer(True, f"{self.name} multiplies {dtype} natively ({', '.join(found)})")
        return Answer(
            False,
            f"{self.name} has no instruction that multiplies {dtype} "
            f"(none of {', '.join(_NATIVE[dtype])}): it would be emulated, slower than float32",
        )

    def _on_cuda(self, dtype: torch.dtype) -> Answer:
        if self.capability is None:
            return Answer(False, _NO_CUDA)
        need = _TENSOR_CORES[dtype]
        has, wants = _versions(self.capability, need)
        if self.capability >= need:
            return Answer(True, f"{self.name}'s tensor cores take {dtype} (capability {has})")
        return Answer(
            False, f"{self.name}'s tensor cores don't take {dtype}: capability {has}, needs {wants}"
        )


@contextmanager
def pretending(device: Device) -> Iterator[None]:
    """Inside, `Device.describe` of any place answers `device`: how another machine would decide."""
    token = _PRETENDED.set(device)
    try:
        yield
    finally:
        _PRETENDED.reset(token)


_PRETENDED: ContextVar[Device | None] = ContextVar("pretended", default=None)


def _parse_cpu(text: str, detail: str) -> Device:
    if detail == _NONE:
        return Device("cpu", "a CPU without such instructions")
    instructions = frozenset(detail.split("+"))
    unknown = sorted(instructions - _known_instructions())
    if unknown:
        raise PassError(
            f"{text!r} names {unknown[0]!r}, which is none of the instruction sets that matter "
            f"here: {', '.join(sorted(_known_instructions()))}. Join several with +; cpu:{_NONE} "
            "is a CPU without any"
        )
    return Device("cpu", f"a CPU with {', '.join(sorted(instructions))}", instructions)


def _parse_cuda(text: str, detail: str) -> Device:
    version = _CAPABILITY.fullmatch(detail)
    if version is None or not int(version[1]):
        raise PassError(
            f"{text!r} gives no compute capability: write it as cuda:8.0 (A100) or cuda:9.0 (H100)"
        )
    major, minor = int(version[1]), int(version[2])
    return Device("cuda", "a CUDA device", capability=(major, minor), triton=True)


def _known_instructions() -> frozenset[str]:
    return frozenset(name for names in _NATIVE.values() for name in names)


def _versions(*capabilities: tuple[int, int]) -> list[str]:
    return [".".join(map(str, capability)) for capability in capabilities]


@functools.cache
def _describe_cpu() -> Device:
    name, instructions = read_cpuinfo(_CPUINFO.read_text() if _CPUINFO.exists() else "")
    if not instructions:
        instructions = frozenset(_asked_of_torch())
    return Device("cpu", name or platform.processor() or platform.machine(), instructions)


def read_cpuinfo(text: str) -> tuple[str, frozenset[str]]:
    """The model name and the instruction sets that the text of /proc/cpuinfo lists."""
    name, instructions = "", frozenset[str]()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and not name:
            name = value.strip()
        elif key.strip() in ("flags", "Features") and not instructions:
            instructions = frozenset(value.split())
    return name, instructions


def _asked_of_torch() -> Iterable[str]:
    # Where there is no /proc/cpuinfo (Windows, macOS) torch itself knows these.
    probes = {
        "avx512_vnni": "_is_avx512_vnni_supported",
        "avx512_bf16": "_is_avx512_bf16_supported",
    }
    for instruction, probe in probes.items():
        if getattr(torch.cpu, probe, lambda: False)():
            yield instruction


@functools.cache
def _describe_cuda(index: int) -> Device:
    if not torch.cuda.is_available():
        return Device("cuda", "CUDA")
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    # Looked for, not imported: that takes a second and settles how Triton itself runs.
    triton = importlib.util.find_spec("triton") is not None
    return Device("cuda", name, capability=capability, triton=triton)
