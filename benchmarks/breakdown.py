"""Where the milliseconds of one call of a transformed model go, by kind of kernel."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.systems import System, Workload

_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("products", ("qlinear", "int8_linear", "int8_product", "packed_linear", "mkldnn::_linear")),
    ("products", ("aten::addmm", "aten::mm", "aten::_int_mm", "int8pack_mm")),
    ("attention", ("attention", "softmax", "bmm")),
    ("quantize elsewhere", ("quantize_tokens",)),
)
"""A kernel of a library is of the first kind that has a part of its name."""

_GENERATED_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention", ("softmax", "bmm")),
    ("norms, with what is fused into them", ("layer_norm", "rms_norm", "rsqrt")),
    ("quantize elsewhere", ("quantize", "round")),
    ("other generated code", ("",)),
)
"""A generated kernel is named after the operators that it came from and those that it feeds."""

_REST = "between the kernels"
_KERNELS_SHOWN = 12


def breakdown(system: System, workload: Workload, calls: int = 20) -> dict[str, Any]:
    """Milliseconds of a call by kind of kernel, and of the longest kernels, for a compiled system.

    Compiles it once more with Inductor's profiling of generated kernels. A kernel counts with all
    that it calls. `between the kernels` is the wall time of a call without the profiler less all
    kernels: Python, guards, allocation, and whatever has no kind. Calls with and without the
    profiler take turns.
    """
    import torch._inductor.config as inductor

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with inductor.patch({"cpp.enable_kernel_profile": True}):
            run = partial(system.prepare(workload), workload.inputs)
            run()
        wall, kernels = _measure(run, calls)
    kinds = dict.fromkeys([kind for kind, _ in (*_KINDS, *_GENERATED_KINDS)], 0.0)
    for name, spent in kernels.items():
        kinds[kind_of(name) or ""] += spent
    longest = sorted(kernels, key=lambda name: -kernels[name])[:_KERNELS_SHOWN]
    return {
        "wall_ms": round(wall, 2),
        "by_kind_ms": {
            **{kind: round(spent, 2) for kind, spent in kinds.items()},
            _REST: round(wall - sum(kinds.values()), 2),
        },
        "longest_kernels_ms": {name: round(kernels[name], 2) for name in longest},
    }


def _measure(run: Callable[[], object], calls: int) -> tuple[float, dict[str, float]]:
    """Median milliseconds of a call without the profiler, and of each kernel's time in one with."""
    walls: list[float] = []
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0] * calls)
    for index in range(calls):
        started = time.perf_counter()
        run()
        walls.append((time.perf_counter() - started) * 1e3)
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
            run()
        for event in profiled.events():
            if kind_of(event.name) and not any(kind_of(outer.name) for outer in _ancestors(event)):
                kernels[event.name][index] += event.cpu_time_total / 1e3
    return median(walls), {name: median(times) for name, times in kernels.items()}


def kind_of(name: str) -> str | None:
    """The kind of a kernel by its name in the profile; None for what is no kernel."""
    kinds = _GENERATED_KINDS if "cpp_" in name else _KINDS
    return next((kind for kind, parts in kinds if any(part in name for part in parts)), None)


def _ancestors(event: Any) -> list[Any]:
    found = []
    while event.cpu_parent is not None:
        event = event.cpu_parent
        found.append(event)
    return found
