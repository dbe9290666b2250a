"""Joules by the counters of the hardware: an NVIDIA board's own, or RAPL's of the processor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from fxopt.measure import Latency, summarize

# NVML brings its counter up to date a few dozen times a second: a sample must span many updates.
_LEAST_SECONDS = 2.0


def joules(
    runs: Mapping[str, Callable[[], object]], rounds: int, seconds: float = _LEAST_SECONDS
) -> dict[str, dict[str, float]]:
    """Joules of the whole board for one call of each, in turns: median, 5th and 95th percentile.

    Each sample calls for `seconds`; what the board draws at rest is in it. Raises `OSError` where
    NVML or the counter (Volta and later) isn't there.
    """
    counter = _counter(torch.cuda.current_device())
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            samples[name].append(_sample(run, counter, seconds))
    return {name: _figures(summarize(values)) for name, values in samples.items()}


def energy_counter(device: torch.device | str) -> Callable[[], float]:
    """Joules so far, to be read before and after: of the board on CUDA, of all packages on a CPU.

    Whatever else runs there is in it. Raises `OSError`, with the reason, where there is no counter.
    """
    kind = torch.device(device)
    if kind.type == "cuda":
        return _counter(torch.cuda.current_device() if kind.index is None else kind.index)
    if kind.type != "cpu":
        raise OSError(f"no energy counter is known for a device of type {kind.type}")
    try:
        from zeus.device.cpu import get_cpus
        from zeus.exception import ZeusBaseError
    except ImportError as error:
        raise OSError("the energy counter of a CPU needs zeus: see requirements.txt") from error
    try:
        packages = get_cpus().cpus
    except ZeusBaseError as error:
        raise OSError(f"RAPL can't be read: {error}") from error
    return lambda: sum(p.get_total_energy_consumption().cpu_mj for p in packages) / 1000.0


def _sample(run: Callable[[], object], counter: Callable[[], float], seconds: float) -> float:
    torch.cuda.synchronize()
    calls, before, started = 0, counter(), time.perf_counter()
    while time.perf_counter() - started < seconds:
        run()
        # Without it the loop would queue calls for minutes ahead of the device.
        torch.cuda.synchronize()
        calls += 1
    return (counter() - before) / calls


def _counter(device: int) -> Callable[[], float]:
    """Joules since the driver was loaded, for torch's device of that index."""
    try:
        import pynvml
    except ImportError as error:
        raise OSError("the energy counter needs nvidia-ml-py: see requirements.txt") from error
    try:
        pynvml.nvmlInit()
        # By UUID: NVML counts all devices, torch only the visible ones.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        raise OSError(f"NVML has no energy counter for this device: {error}") from error
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000.0


def _figures(value: Latency) -> dict[str, float]:
    return {
        "median_j": round(value.median, 4),
        "p5_j": round(value.p5, 4),
        "p95_j": round(value.p95, 4),
    }
