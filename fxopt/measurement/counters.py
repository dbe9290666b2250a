"""Energy counters of the hardware, found and read through zeus: NVML's of a GPU, RAPL's of a CPU.

    NVML   nvmlDeviceGetTotalEnergyConsumption, of the whole board, Volta and later; brought up to
           date 10 to 50 times a second, by the board: windows of at least 2 s
    RAPL   energy_uj of each package and of its memory, where it is counted; brought up to date
           about every millisecond, wraps around at max_energy_range_uj: windows of at least 0.5 s

A window of so many updates is off by less than 5 % (NVML) and 0.5 % (RAPL) by where it begins
and ends. Whatever else runs on the board or in the package is in the reading.
Sources: NVML API reference, "Device Queries"; Yang, Adamek, Armour, "Part-time Power Measurements:
nvidia-smi's Lack of Attention" (SC 2024); Intel SDM volume 3B, "RAPL Interfaces"; Linux kernel,
"Power Capping Framework".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_NVML_WINDOW, _RAPL_WINDOW = 2.0, 0.5
# More than any processor package draws; zeus assumes the same.
_MOST_WATTS = 1000.0
_ADVICE = "pip install 'fxopt[energy]'"


@dataclass(frozen=True)
class Unmeasured:
    """What can't be measured here, and why. Stands where a number would; holds none."""

    reason: str

    def __str__(self) -> str:
        return f"not measured: {self.reason}"


@dataclass(frozen=True)
class Domain:
    """One counter: `read()` gives joules so far, which start over at `wraps_at` (None: never)."""

    name: str
    read: Callable[[], float]
    wraps_at: float | None = None


@dataclass(frozen=True)
class EnergyCounter:
    """Counters that are read together. `window_seconds` is the least time between two readings
    whose difference means something. Reading raises `OSError` where a counter can't be read."""

    source: str
    domains: tuple[Domain, ...]
    window_seconds: float

    @property
    def longest_seconds(self) -> float:
        """No counter can turn over twice within this time."""
        turns = [domain.wraps_at for domain in self.domains if domain.wraps_at is not None]
        return min(turns, default=math.inf) / _MOST_WATTS

    def read(self) -> tuple[float, ...]:
        """Joules so far, by domain; only differences mean something."""
        return tuple(domain.read() for domain in self.domains)

    def joules(self, before: Sequence[float], after: Sequence[float]) -> float:
        """Joules between two readings less than one turn of each counter apart.

        Raises `OSError` where a counter that doesn't wrap around went backwards.
        """
        spent = 0.0
        for domain, start, end in zip(self.domains, before, after, strict=True):
            difference = end - start
            if domain.wraps_at is not None:
                difference %= domain.wraps_at
            elif difference < 0:
                raise OSError(f"the counter {domain.name} went backwards, from {start} to {end} J")
            spent += difference
        return spent


def energy_counter(
    device: torch.device | str = "cpu", watched: bool = False
) -> EnergyCounter | Unmeasured:
    """The counter of `device`: of its board on CUDA, of all packages and their memory on a CPU.

    RAPL's counters turn over within minutes on large processors. With `watched` zeus counts the
    turns, so that windows may be longer than one; it starts a process for that, which imports the
    caller's main script again. `Unmeasured`, with the reason, where nothing can be read.
    """
    place = torch.device(device)
    try:
        if place.type == "cuda":
            return _nvml(place)
        if place.type == "cpu":
            return _rapl(watched)
    except ImportError:
        return Unmeasured(f"energy counters are read through zeus, which is missing: {_ADVICE}")
    except (OSError, ValueError) as error:
        return Unmeasured(str(error))
    return Unmeasured(f"no energy counter is known for a device of type {place.type}")


def _rapl(watched: bool) -> EnergyCounter:
    from zeus.device.cpu import get_cpus

    packages = _readable(lambda: list(get_cpus().cpus), "RAPL can't be read")
    domains = [domain for package in packages for domain in _package(package, watched)]
    if not domains:
        raise OSError("RAPL can't be read: it names no package of this processor")
    names = ", ".join(domain.name for domain in domains)
    return _tried(EnergyCounter(f"RAPL ({names})", tuple(domains), _RAPL_WINDOW))


def _package(package: Any, watched: bool) -> list[Domain]:
    """The counters of one package. That of a whole laptop ("psys") holds them once more."""
    file = getattr(package, "rapl_file", None)
    name = file.name if file is not None else f"package-{package.cpu_index}"
    if not name.startswith("package"):
        return []
    if watched or file is None:  # without files zeus asks its daemon
        return [Domain(name, _guarded(lambda: _both(package.get_total_energy_consumption())))]
    # Not zeus's own read: the process that it starts for it would import the caller's main script.
    files = {name: file, f"{name} memory": package.dram}
    return [
        Domain(part, _file_reader(found.energy_uj_path), found.max_energy_range_uj / 1e6)
        for part, found in files.items()
        if found is not None
    ]


def _both(measurement: Any) -> float:
    return float(measurement.cpu_mj + (measurement.dram_mj or 0.0)) / 1e3


def _file_reader(path: str) -> Callable[[], float]:
    return lambda: int(Path(path).read_text(encoding="ascii")) / 1e6


def _nvml(device: torch.device) -> EnergyCounter:
    if not torch.cuda.is_available():
        raise OSError("this machine has no CUDA device")
    import pynvml
    from zeus.device.gpu import get_gpus

    index = torch.cuda.current_device() if device.index is None else device.index
    properties: Any = torch.cuda.get_device_properties(index)
    boards = _readable(lambda: list(get_gpus().gpus), "NVML can't be read")
    # By UUID: how torch and NVML number the boards need not agree.
    wanted = f"GPU-{properties.uuid}"
    found = [board for board in boards if pynvml.nvmlDeviceGetUUID(board.handle) == wanted]
    if not found:
        raise OSError(f"NVML knows no board of the UUID of cuda:{index} ({wanted})")
    read = _guarded(lambda: found[0].get_total_energy_consumption() / 1e3)
    source = f"NVML (whole board, {properties.name})"
    return _tried(EnergyCounter(source, (Domain(properties.name, read),), _NVML_WINDOW))


def _tried(counter: EnergyCounter) -> EnergyCounter:
    counter.read()
    return counter


def _guarded(read: Callable[[], float]) -> Callable[[], float]:
    return lambda: float(_readable(read, "the energy counter can't be read"))


def _readable(read: Callable[[], Any], what: str) -> Any:
    """What `read` gives; the errors of zeus as `OSError`."""
    from zeus.exception import ZeusBaseError

    try:
        return read()
    except ZeusBaseError as error:
        raise OSError(f"{what} (zeus: {error})") from error
