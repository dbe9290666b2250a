"""Fake counters and clocks prove the arithmetic: joules are power times time."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.measurement import Domain, Energy, EnergyCounter, Unmeasured
from fxopt.measurement.energy import Stopwatch, estimate_energy, measure_energy

POWERS = st.lists(st.floats(0.5, 400.0), min_size=1, max_size=8)


class Machine:
    """Time, and a processor whose power follows a trace of one value a second, then repeats.

    `rest` watts are drawn while nothing runs. The counter wraps around at `range_j` joules.
    """

    def __init__(self, powers, rest=0.0, range_j=None, phase=0.0):
        self.powers, self.rest, self.range_j = powers, rest, range_j
        self.time, self.joules, self.busy = 0.0, phase, 0.0
        self.order = []

    def pass_time(self, seconds, working):
        end = self.time + seconds
        while self.time < end - 1e-12:
            step = min(end, math.floor(self.time + 1e-9) + 1.0) - self.time
            watts = self.powers[int(self.time + 1e-9) % len(self.powers)] if working else self.rest
            self.joules += watts * step
            self.busy += step * working
            self.time += step

    def system(self, name, seconds):
        def call():
            self.order.append(name)
            self.pass_time(seconds, working=True)

        return call

    def counter(self, window=2.0):
        def read():
            return self.joules % self.range_j if self.range_j else self.joules

        return EnergyCounter("fake", (Domain("board", read, self.range_j),), window)

    def watch(self):
        return Stopwatch(
            lambda: self.time, lambda s: self.pass_time(s, working=False), lambda: self.busy
        )

    def measured(self, systems=None, window=2.0, **options):
        systems = systems or {"a": self.system("a", 0.25)}
        return measure_energy(systems, self.counter(window), watch=self.watch(), **options)


@given(POWERS, st.floats(0.01, 3.0), st.integers(1, 4))
def test_joules_are_power_times_time(powers, seconds, windows):
    machine = Machine(powers)
    system = machine.system("a", seconds)
    energy = machine.measured({"a": system}, windows=windows)["a"]
    assert energy.watts == pytest.approx(_mean_power(machine, seconds, energy), rel=1e-6)
    assert len(energy.joules.samples) == windows


def _mean_power(machine, seconds, energy):
    """Of the windows, replayed on the trace: one call, then calls for two seconds."""
    replay = Machine(machine.powers)
    joules = time = 0.0
    for _ in energy.joules.samples:
        replay.pass_time(seconds, working=True)
        start, spent = replay.time, replay.joules
        while replay.time == start or replay.time - start < 2.0:
            replay.pass_time(seconds, working=True)
        joules, time = joules + replay.joules - spent, time + replay.time - start
    return joules / time


@given(st.floats(1.0, 400.0), st.floats(0.01, 1.5), st.integers(1, 5))
def test_at_constant_power_a_call_takes_its_power_times_its_seconds(watts, seconds, windows):
    machine = Machine([watts])
    energy = machine.measured({"a": machine.system("a", seconds)}, windows=windows)["a"]
    assert energy.joules.median == pytest.approx(watts * seconds, rel=1e-6)
    assert energy.joules.samples == pytest.approx([watts * seconds] * windows, rel=1e-6)
    assert energy.watts == pytest.approx(watts, rel=1e-6)


@given(POWERS, st.floats(0.0, 1.0, exclude_max=True), st.floats(0.05, 1.0))
def test_a_counter_that_wraps_around_gives_the_same(powers, phase, seconds):
    # Two seconds, and a call more, fit between two turns, as RAPL's are minutes apart.
    range_j = 4000.0
    straight, turning = Machine(powers), Machine(powers, range_j=range_j, phase=phase * range_j)
    expected = straight.measured({"a": straight.system("a", seconds)})["a"]
    found = turning.measured({"a": turning.system("a", seconds)})["a"]
    assert found.joules.samples == pytest.approx(expected.joules.samples, rel=1e-6)


@given(st.floats(1.0, 300.0), st.floats(0.0, 300.0))
def test_idle_power_is_subtracted_on_request(work, rest):
    machine = Machine([work + rest], rest=rest)
    with_rest = machine.measured()["a"]
    assert with_rest.joules.median == pytest.approx((work + rest) * 0.25, rel=1e-6)
    assert with_rest.idle_watts is None
    machine = Machine([work + rest], rest=rest)
    net = machine.measured(subtract_idle=True)["a"]
    assert net.joules.median == pytest.approx(work * 0.25, rel=1e-6)
    assert net.idle_watts == pytest.approx(rest, rel=1e-6)
    assert net.watts == pytest.approx(work + rest, rel=1e-6)


def test_idle_power_is_measured_in_a_window_before_any_call():
    machine = Machine([50.0], rest=10.0)
    ordered = []
    watch = Stopwatch(
        lambda: machine.time,
        lambda s: (ordered.append(("sleep", s, len(machine.order))), machine.pass_time(s, False)),
    )
    systems = {"a": machine.system("a", 0.5)}
    measure_energy(systems, machine.counter(), subtract_idle=True, watch=watch)
    assert ordered == [("sleep", 1.0, 0), ("sleep", 2.0, 0)]


def test_calls_that_draw_no_more_than_rest_give_no_number():
    found = Machine([20.0], rest=30.0).measured(subtract_idle=True)["a"]
    assert found == Unmeasured(
        "fake: the calls drew 20.0 W, no more than the 30.0 W at rest before them; something else "
        "was running then. Measure on a quiet machine, or without subtract_idle"
    )


def test_windows_take_turns_and_last_as_long_as_the_counter_needs():
    machine = Machine([10.0])
    systems = {"a": machine.system("a", 1.0), "b": machine.system("b", 0.5)}
    found = machine.measured(systems, window=3.0, windows=2, seconds=0.1)
    assert found["a"].window_seconds == 3.0
    assert machine.order == (["a"] * 4 + ["b"] * 7) * 2
    longer = machine.measured({"a": machine.system("a", 1.0)}, window=3.0, seconds=4.0)
    assert longer["a"].window_seconds == 4.0


def test_the_device_is_waited_for_after_every_call():
    machine = Machine([10.0])
    machine.measured({"a": machine.system("a", 1.0)}, windows=1, synchronize=_noting(machine))
    assert machine.order == ["a", "wait"] * 3


def _noting(machine):
    return lambda: machine.order.append("wait")


def test_a_counter_that_stands_still_gives_no_number():
    counter = EnergyCounter("RAPL (package-0)", (Domain("package-0", lambda: 7.0, 9e3),), 2.0)
    machine = Machine([10.0])
    found = measure_energy({"a": machine.system("a", 1.0)}, counter, watch=machine.watch())
    assert found == {
        "a": Unmeasured(
            "RAPL (package-0): the counter stood still in 5 of 5 windows of 2 s while the model "
            "ran, as in containers and virtual machines that show a counter but not the hardware's"
        )
    }


def test_a_counter_that_goes_backwards_without_wrapping_gives_no_number():
    values = iter([5.0, 3.0])
    counter = EnergyCounter("NVML", (Domain("board", lambda: next(values)),), 2.0)
    machine = Machine([10.0])
    found = measure_energy({"a": machine.system("a", 3.0)}, counter, watch=machine.watch())
    assert found["a"] == Unmeasured("NVML: the counter board went backwards, from 5.0 to 3.0 J")


def test_a_counter_that_fails_midway_gives_no_number():
    values = iter([5.0])

    def read():
        try:
            return next(values)
        except StopIteration:
            raise PermissionError(13, "Permission denied") from None

    machine = Machine([10.0])
    counter = EnergyCounter("RAPL", (Domain("package-0", read),), 2.0)
    found = measure_energy({"a": machine.system("a", 3.0)}, counter, watch=machine.watch())
    assert found["a"] == Unmeasured("RAPL: [Errno 13] Permission denied")


def test_a_call_longer_than_a_turn_of_the_counter_gives_no_number():
    machine = Machine([10.0], range_j=4000.0)
    assert machine.counter().longest_seconds == 4.0
    assert machine.measured({"a": machine.system("a", 5.0)})["a"] == Unmeasured(
        "fake: one call takes 5 s, in which the counter may turn over twice; measure fewer rows at "
        "a time"
    )


def test_domains_are_added_up_and_wrap_by_themselves():
    counter = EnergyCounter(
        "two", (Domain("package-0", float, 100.0), Domain("memory", float, 40.0)), 0.5
    )
    assert counter.joules((95.0, 10.0), (5.0, 30.0)) == 10.0 + 20.0


@given(st.floats(1.0, 500.0), st.integers(1, 64), st.floats(0.0, 1.0))
def test_an_estimate_is_utilisation_times_the_stated_power(watts, processors, share):
    machine = Machine([0.0])

    def call():
        machine.pass_time(0.25 * share, working=True)
        machine.pass_time(0.25 * (1 - share), working=False)

    energy = estimate_energy(
        {"a": call}, watts, watch=machine.watch(), processors=processors, tokens=5
    )["a"]
    assert energy.estimated
    assert energy.joules.median == pytest.approx(watts * share / processors * 0.25, abs=1e-6)
    assert f"of {processors} logical processors busy" in energy.source
    assert f"times {watts:g} W, as stated by the caller" in energy.source
    assert str(energy).startswith("ESTIMATED ")


def test_tokens_and_carbon():
    machine = Machine([36.0])
    energy = machine.measured({"a": machine.system("a", 1.0)}, tokens=12, carbon=400.0)["a"]
    assert energy.joules_per_token == pytest.approx(3.0)
    assert energy.co2_grams == pytest.approx(36.0 / 3.6e6 * 400.0)
    assert str(energy) == (
        "36 J (36 to 36, 5 windows of 2 s, 36.0 W), 3 J a token, 0.004 g CO2 at 400 g/kWh; fake"
    )
    plain = machine.measured({"a": machine.system("a", 1.0)}, subtract_idle=False)["a"]
    assert (plain.joules_per_token, plain.co2_grams) == (None, None)


def test_rest_of_no_watts_is_still_shown_as_subtracted():
    energy = Machine([36.0], rest=0.0).measured(subtract_idle=True)["a"]
    assert energy.idle_watts == 0.0
    assert "0.0 W at rest subtracted" in str(energy)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_nvml_s_joules_agree_with_power_times_time():
    pynvml = pytest.importorskip("pynvml")
    from fxopt.measurement import energy_counter

    counter = energy_counter("cuda")
    if isinstance(counter, Unmeasured):
        pytest.skip(str(counter))
    pynvml.nvmlInit()
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    powers = []

    def call():
        x @ x
        powers.append(pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3)

    energy = measure_energy({"a": call}, counter, synchronize=torch.cuda.synchronize)["a"]
    assert isinstance(energy, Energy)
    assert energy.watts == pytest.approx(sum(powers) / len(powers), rel=0.15)
