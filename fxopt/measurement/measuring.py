"""measure: what a call of a model costs on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fxopt.calls import Inputs
from fxopt.errors import MeasureError
from fxopt.measurement.ceilings import ceilings
from fxopt.measurement.counters import EnergyCounter, Unmeasured, energy_counter
from fxopt.measurement.energy import Energy, estimate_energy, measure_energy
from fxopt.measurement.fields import Throughput
from fxopt.measurement.generation import Generation
from fxopt.measurement.measurement import Measurement
from fxopt.measurement.outputs import judging
from fxopt.measurement.roofline import roofline
from fxopt.measurement.subject import Subject, resident_bytes
from fxopt.measurement.writing import System, Task, measure_generation
from fxopt.timing import Latency, fingerprint, latency, peak_memory

_NOT_ASKED = Unmeasured("energy=False")


def measure(
    model: Any,
    inputs: Inputs,
    *,
    name: str | None = None,
    repeats: int = 10,
    seconds: float = 2.0,
    tokens: int | None = None,
    energy: bool = True,
    estimate: bool = False,
    watts: float | None = None,
    carbon: float | None = None,
    subtract_idle: bool = False,
    count: bool = True,
    new_tokens: int | None = None,
    contexts: Sequence[int] = (0,),
) -> Measurement:
    """What one call of `model` on `inputs` costs: time, memory, work and energy.

    `model` is an `nn.Module` (measured in eval mode), an `fxopt.Optimized` or any callable;
    `inputs` a tensor, a tuple of positional arguments or a dict of keyword arguments. `labels`
    among them are left out. No gradients are recorded. `name` left out: that of the class.

    Latency takes `repeats` rounds within `seconds`, after a warm-up of its own. `tokens` is the
    number of tokens of a call; left out, a 2-D `attention_mask` tells. Operators are counted, and
    set against what the machine can do, unless `count` is False; a module that isn't an
    `Optimized` is captured for that.

    Energy is read from the counter of the device over windows as long as it needs, minus the power
    at rest with `subtract_idle`; `carbon`, in g CO2 a kWh, adds the CO2. Where no counter can be
    read there is no number, unless `estimate` asks for one made of the processor's utilisation and
    `watts`, its power at full load.

    With `new_tokens`, for a causal language model of transformers or what `fxopt.transform` makes
    of it, and `inputs` that are text, `generation` says what writing so many tokens costs: the time
    to the first one, steps behind each of `contexts`, which are numbers of tokens that the cache
    holds before, a whole greedy `generate` call, joules a token, and the bytes of the cache.

    Raises `MeasureError` for a model or inputs of another kind, options out of range, and
    `estimate` without `watts`; `ValueError` for `repeats` below 1 or `seconds` not above 0.
    """
    label = name if name is not None else _name_of(model)
    return measure_all(
        {label: model},
        inputs,
        repeats=repeats,
        seconds=seconds,
        tokens=tokens,
        energy=energy,
        estimate=estimate,
        watts=watts,
        carbon=carbon,
        subtract_idle=subtract_idle,
        count=count,
        new_tokens=new_tokens,
        contexts=contexts,
    )[label]


def measure_all(
    models: Mapping[str, Any],
    inputs: Inputs,
    *,
    repeats: int = 10,
    seconds: float = 2.0,
    tokens: int | None = None,
    energy: bool = True,
    estimate: bool = False,
    watts: float | None = None,
    carbon: float | None = None,
    subtract_idle: bool = False,
    count: bool = True,
    new_tokens: int | None = None,
    contexts: Sequence[int] = (0,),
) -> dict[str, Measurement]:
    """`measure` for several models that take turns, so that their ratios hold on a busy machine.

    `fxopt.timing.ratio(a.latency, b.latency)` compares two of them round by round. Energy windows
    take turns as well. Raises what `measure` raises.
    """
    _check(models, tokens, estimate, watts, carbon)
    task = _task(inputs, new_tokens, contexts)
    subjects = {name: Subject.of(model, inputs, name, tokens) for name, model in models.items()}
    with judging(models.values()):
        first = {name: _first_call(subject) for name, subject in subjects.items()}
        times = latency(subjects, repeats, seconds)
        subject = next(iter(subjects.values()))
        joules = partial(
            _joules, subject, energy, watts if estimate else None, carbon, subtract_idle
        )
        spent = joules(subjects, subject.tokens)
        measured = {
            name: _measured(name, subject, times[name], first[name], spent[name])
            for name, subject in subjects.items()
        }
        if task is not None:
            written = measure_generation(models, task, repeats, seconds, joules)
            measured = {name: _with_generation(m, written[name]) for name, m in measured.items()}
        if not count:
            return {name: _without_work(found) for name, found in measured.items()}
        return {name: _with_work(found, subjects[name]) for name, found in measured.items()}


def _measured(
    name: str, subject: Subject, time: Latency, first_call: float, spent: Energy | Unmeasured
) -> Measurement:
    """What is known without the graph."""
    device, parameters, resident = subject.device, subject.parameter_bytes(), resident_bytes()
    peak = peak_memory(subject, device)
    missing = {
        field: value.reason
        for field, value in (("parameter_bytes", parameters), ("resident_bytes", resident))
        if isinstance(value, Unmeasured)
    }
    if peak is None:
        missing["peak_bytes"] = f"no honest reading is possible here on {device.type}"
    return Measurement(
        name,
        str(device),
        time,
        first_call,
        _throughput(time, subject.rows, subject.tokens),
        spent,
        parameter_bytes=None if isinstance(parameters, Unmeasured) else parameters,
        peak_bytes=None if peak is None else peak.bytes,
        peak_source=None if peak is None else peak.source,
        resident_bytes=None if isinstance(resident, Unmeasured) else resident,
        device_bytes=subject.device_bytes(),
        reasons=missing,
        fingerprint=fingerprint(),
    )


def _throughput(time: Latency, rows: int | None, tokens: int | None) -> Throughput:
    rate = 1e3 / time.median
    return Throughput(
        rate, None if rows is None else rows * rate, None if tokens is None else tokens * rate
    )


def _with_work(measurement: Measurement, subject: Subject) -> Measurement:
    counted, limits = subject.work(), ceilings(subject.device)
    reasons = dict(measurement.reasons)
    if limits is None:
        reasons["ceilings"] = f"only those of CPU and CUDA are known, not of {subject.device.type}"
    if isinstance(counted, Unmeasured):
        reasons |= dict.fromkeys(("flops", "bytes_moved"), counted.reason)
        return replace(measurement, ceilings=limits, reasons=reasons)
    work, kinds = counted
    return replace(
        measurement,
        flops=sum(item.flops for item in work),
        bytes_moved=sum(item.bytes for item in work),
        ceilings=limits,
        layers=() if limits is None else roofline(work, kinds, limits),
        reasons=reasons,
    )


def _without_work(measurement: Measurement) -> Measurement:
    missing = dict.fromkeys(("flops", "bytes_moved", "ceilings"), "count=False")
    return replace(measurement, reasons={**measurement.reasons, **missing})


def _with_generation(measurement: Measurement, found: Generation | Unmeasured) -> Measurement:
    if isinstance(found, Generation):
        return replace(measurement, generation=found)
    reasons = {**measurement.reasons, "generation": found.reason}
    return replace(measurement, reasons=reasons)


def _joules(
    like: Subject,
    asked: bool,
    estimated_watts: float | None,
    carbon: float | None,
    subtract_idle: bool,
    systems: Mapping[str, System],
    tokens: int | None,
) -> Mapping[str, Energy | Unmeasured]:
    """The energy of a call of each system, on the device of the subject `like`."""
    if not asked:
        return dict.fromkeys(systems, _NOT_ASKED)
    counter = energy_counter(like.device)
    if isinstance(counter, EnergyCounter):
        return measure_energy(
            systems,
            counter,
            subtract_idle=subtract_idle,
            tokens=tokens,
            carbon=carbon,
            synchronize=like.synchronize,
        )
    if estimated_watts is None:
        return dict.fromkeys(systems, counter)
    if like.device.type != "cpu":
        reason = f"{counter.reason}; an estimate needs a CPU's utilisation"
        return dict.fromkeys(systems, Unmeasured(reason))
    return estimate_energy(systems, estimated_watts, tokens=tokens, carbon=carbon)


def _first_call(subject: Subject) -> float:
    started = time.perf_counter()
    subject()
    subject.synchronize()
    return time.perf_counter() - started


def _name_of(model: Any) -> str:
    if isinstance(model, torch.nn.Module):
        return type(model).__name__
    return str(getattr(model, "__name__", type(model).__name__))


def _task(inputs: Inputs, new_tokens: int | None, contexts: Sequence[int]) -> Task | None:
    """What is to be written, if anything."""
    if new_tokens is not None:
        return Task.of(inputs, new_tokens, contexts)
    if tuple(contexts) != (0,):
        raise MeasureError(
            f"contexts={tuple(contexts)!r} without new_tokens=: say how many tokens are to be "
            "written behind each"
        )
    return None


def _check(
    models: Mapping[str, Any],
    tokens: int | None,
    estimate: bool,
    watts: float | None,
    carbon: float | None,
) -> None:
    if not models:
        raise MeasureError("measure_all() got no models; give it {name: model}")
    if tokens is not None and tokens < 1:
        raise MeasureError(f"tokens={tokens!r}: give the number of tokens of one call, at least 1")
    if carbon is not None and not (0 <= carbon < math.inf):
        raise MeasureError(
            f"carbon={carbon!r}: give the grid's carbon intensity in grams of CO2 a kWh, such as "
            "350; electricitymaps.com and the national grid's operator publish it"
        )
    if estimate and (watts is None or not 0 < watts < math.inf):
        raise MeasureError(
            f"estimate=True with watts={watts!r}: an estimate is the processor's utilisation times "
            "a power that you state. Give watts=..., what the whole processor draws at full load: "
            "its TDP in the maker's data sheet (Intel ARK, AMD's product pages), or better a "
            "wattmeter's reading"
        )
