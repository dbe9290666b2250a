"""A candidate measured beside the original, in turns, so that values are ratios to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.calls import spread
from fxopt.errors import SearchError
from fxopt.measurement.counters import EnergyCounter, Unmeasured, energy_counter
from fxopt.measurement.energy import measure_energy
from fxopt.optimized import Optimized
from fxopt.search.objectives import Measured, key
from fxopt.timing import latency, peak_memory, ratio

_REPEATS, _SECONDS = 15, 2.0


def measure_beside(
    original: nn.Module, candidate: nn.Module, inputs: Any, objectives: tuple[str, ...]
) -> Measured:
    """Latency and energy in rounds of both; memory of both; gradients are not recorded.

    Raises `SearchError` where an objective can't be measured here.
    """
    calls = {"original": bound(original, inputs), "candidate": bound(candidate, inputs)}
    values: dict[str, float] = {}
    reference: dict[str, float] = {}
    ratios: dict[str, float] = {}
    with torch.no_grad():
        if "latency" in objectives:
            times = latency(calls, repeats=_REPEATS, seconds=_SECONDS)
            values[key("latency")] = times["candidate"].median
            reference[key("latency")] = times["original"].median
            ratios["latency"] = ratio(times["candidate"], times["original"]).median
        if "memory" in objectives:
            values[key("memory")] = memory_bytes(candidate, calls["candidate"])
            reference[key("memory")] = memory_bytes(original, calls["original"])
            ratios["memory"] = values[key("memory")] / max(reference[key("memory")], 1)
        if "energy" in objectives:
            joules = _joules(calls, _device(original))
            values[key("energy")], reference[key("energy")] = (
                joules["candidate"],
                joules["original"],
            )
            ratios["energy"] = joules["candidate"] / joules["original"]
    return Measured(values, reference, ratios)


def bound(model: Any, inputs: Any) -> Callable[[], object]:
    """A call of `model` with `inputs`: a tensor, a tuple of positionals or a dict of keywords."""
    args, kwargs = spread(inputs)
    return lambda: model(*args, **kwargs)


def memory_bytes(model: nn.Module, call: Callable[[], object]) -> int:
    """Bytes of the parameters plus the extra bytes of a call at its peak."""
    peak = peak_memory(call, _device(model))
    if peak is None:
        raise SearchError(
            "objectives= asks for memory, but the peak memory of a call can't be read here: it "
            "takes CUDA, or Linux with glibc and a writable /proc/self/clear_refs. Leave memory out"
        )
    return parameter_bytes(model) + peak.bytes


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, what is shared counted once."""
    if isinstance(model, Optimized):
        return model.program.parameter_bytes()
    state: dict[int, Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def check_measurable(original: nn.Module, inputs: Any, objectives: tuple[str, ...]) -> None:
    """Raise `SearchError` before the first trial where an objective can't be measured here."""
    if "energy" in objectives:
        _counter(_device(original))
    if "memory" in objectives:
        with torch.no_grad():
            memory_bytes(original, bound(original, inputs))


def _joules(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    found = measure_energy(calls, _counter(device), synchronize=synchronize)
    joules = {}
    for name, energy in found.items():
        if isinstance(energy, Unmeasured):
            raise SearchError(_no_energy(energy))
        joules[name] = energy.joules.median
    return joules


def _counter(device: torch.device) -> EnergyCounter:
    counter = energy_counter(device)
    if isinstance(counter, Unmeasured):
        raise SearchError(_no_energy(counter))
    return counter


def _no_energy(reason: Unmeasured) -> str:
    return (
        f"objectives= asks for energy, but it is {reason}. Leave energy out, or give measure= a "
        "function that reads your own meter"
    )


def _device(model: nn.Module) -> torch.device:
    tensors = (*model.parameters(), *model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
