"""Times and joules of systems in turns, taken so that Ctrl-C keeps what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from fxopt.errors import MeasureError
from fxopt.measurement import (
    Energy,
    Unmeasured,
    energy_counter,
    estimate_energy,
    measure_energy,
)
from fxopt.progress import Progress
from fxopt.timing import Latency, latency, summarize

System = Callable[[], object]

# Rounds that are kept or lost together. Each block warms up anew, two rounds at least.
_BLOCK = 5
# A system is never timed for longer than this in one block.
_SECONDS = 60.0


@dataclass
class Rounds:
    """Latencies and energies by system; `interrupted` tells of a Ctrl-C, before which they are."""

    times: dict[str, Latency] = field(default_factory=dict)
    energy: dict[str, Energy | Unmeasured] = field(default_factory=dict)
    interrupted: bool = False


def measure_rounds(
    systems: Mapping[str, System],
    device: torch.device,
    *,
    repeats: int,
    energy: bool,
    watts: float | None,
    say: Progress,
) -> Rounds:
    """Time `systems` for `repeats` rounds, then read joules, or estimate them from `watts`."""
    taken = Rounds(energy=dict.fromkeys(systems, Unmeasured("--no-energy was given")))
    samples: dict[str, list[float]] = {name: [] for name in systems}
    try:
        done = 0
        while done < repeats:
            say(f"timing in turns, {done} of {repeats} rounds done")
            block = latency(systems, repeats=min(_BLOCK, repeats - done), seconds=_SECONDS)
            for name, found in block.items():
                samples[name] += found.samples
            taken.times = {name: summarize(values) for name, values in samples.items()}
            done = len(next(iter(samples.values())))
        if energy:
            taken.energy = dict.fromkeys(systems, Unmeasured("interrupted before it was measured"))
            say("reading joules")
            taken.energy = _energy(systems, device, watts)
    except KeyboardInterrupt:
        taken.interrupted = True
    return taken


def _energy(
    systems: Mapping[str, System], device: torch.device, watts: float | None
) -> dict[str, Energy | Unmeasured]:
    counter = energy_counter(device)
    if not isinstance(counter, Unmeasured):
        return measure_energy(systems, counter, synchronize=_waiting_for(device))
    if watts is None:
        return dict.fromkeys(systems, counter)
    if device.type != "cpu":
        raise MeasureError(
            f"--watts estimates the energy of a CPU alone, and the model runs on {device}; its "
            f"counter: {counter.reason}. Leave --watts out."
        )
    return dict(estimate_energy(systems, watts))


def _waiting_for(device: torch.device) -> System:
    if device.type != "cuda":
        return lambda: None
    return lambda: torch.cuda.synchronize(device)
