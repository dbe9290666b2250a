"""The machine that a number was measured on; a number without it means nothing."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

# What decides the speed of a matrix product, in the order an engineer looks for it.
_INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
)


def fingerprint() -> dict[str, str | int | float | None]:
    """What a benchmark result must say of its machine.

    Keys: `cpu`, `cores` (those this process may use), `threads` (torch's), `isa`, `gpu` (None
    without CUDA), `load` (processes that wanted to run, mean of the last minute; None where the
    system doesn't tell), `os`, `python`, `torch`, `transformers`.
    """
    return {
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "isa": _isa(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
    }


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _isa() -> str:
    flags = set((_cpu_field("flags") or _cpu_field("Features")).split())
    known = [name for name in _INSTRUCTIONS if name in flags]
    return " ".join(known) or torch.backends.cpu.get_cpu_capability()


def _cpu_field(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
