"""measure and measure_all on tiny models: what is measured, in which order, what is only said."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import MeasureError, SaveError
from fxopt.measurement import (
    Ceilings,
    Domain,
    Energy,
    EnergyCounter,
    Measurement,
    Unmeasured,
    measure,
    measure_all,
)
from fxopt.timing import Memory, ratio

measuring = sys.modules["fxopt.measurement.measuring"]
LIMITS = Ceilings("cpu", {"float32": 1e11}, 1e10)
QUICK = {"repeats": 3, "seconds": 0.05}


PEAK = Memory(4096, "resident memory")
peak_memory = measuring.peak_memory


@pytest.fixture(autouse=True)
def _known_and_quick(monkeypatch):
    monkeypatch.setattr(measuring, "ceilings", lambda device: LIMITS)
    monkeypatch.setattr(measuring, "peak_memory", lambda call, device: PEAK)
    monkeypatch.setattr(sys.modules["fxopt.measurement.energy"], "_ESTIMATE_WINDOW", 0.02)
    monkeypatch.setattr("gc.collect", lambda: 0)


@pytest.fixture
def no_counter(monkeypatch):
    monkeypatch.setattr(measuring, "energy_counter", lambda device: Unmeasured("no counter here"))


def linear():
    return nn.Linear(64, 32).eval()


def tied():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.BatchNorm1d(16))
    model[1].weight = model[0].weight
    return model


def test_a_module_is_measured_and_counted(no_counter):
    found = measure(linear(), torch.randn(8, 64), **QUICK)
    assert (found.name, found.device) == ("Linear", "cpu")
    assert found.latency.runs == 3
    assert found.first_call_seconds > 0
    assert found.parameter_bytes == 4 * (64 * 32 + 32)
    assert found.flops == 2 * 8 * 64 * 32
    assert found.bytes_moved == 4 * (8 * 64 + 64 * 32 + 32 + 8 * 32)
    assert found.bound_ms == pytest.approx(max(found.flops / 1e11, found.bytes_moved / 1e10) * 1e3)
    assert found.share_of_bound == pytest.approx(found.bound_ms / found.latency.median)
    assert [layer.share for layer in found.layers] == [1.0]
    assert found.resident_bytes is not None
    assert found.resident_bytes > 10_000_000
    assert found.device_bytes is None
    assert found.energy == Unmeasured("no counter here")
    assert found.fingerprint["torch"] == torch.__version__


def test_tied_parameters_count_once_and_buffers_count(no_counter):
    found = measure(tied(), torch.randn(8, 16), **QUICK)
    state = 16 * 16 * 4 + 2 * 16 * 4 + 4 * 16 * 4 + 8
    assert found.parameter_bytes == state
    shared = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    shared[1].weight = nn.Parameter(shared[0].weight.data)
    assert measure(shared, torch.randn(8, 16), **QUICK).parameter_bytes == 16 * 16 * 4


def test_an_optimized_is_counted_from_its_own_program(no_counter):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU()).eval()
    x = torch.randn(40, 64)
    optimized = fxopt.transform(model, "int8-linear{mode=dynamic},select-kernels", example_inputs=x)
    found = measure_all({"a": model, "b": optimized}, x, **QUICK)
    assert found["b"].flops == found["a"].flops == 2 * 40 * 64 * 64
    assert found["b"].parameter_bytes == optimized.program.parameter_bytes()
    assert found["b"].parameter_bytes < found["a"].parameter_bytes


def test_an_optimized_without_example_is_captured_by_the_first_call(no_counter):
    optimized = fxopt.transform(linear(), "canonicalize")
    assert measure(optimized, torch.randn(8, 64), **QUICK).flops == 2 * 8 * 64 * 32


def test_a_plain_callable_is_timed_and_the_rest_is_said(no_counter):
    weight = torch.randn(64, 32)
    found = measure(lambda x: x @ weight, torch.randn(8, 64), **QUICK)
    assert found.name == "<lambda>"
    assert found.latency.runs == 3
    assert (found.flops, found.bytes_moved, found.parameter_bytes) == (None, None, None)
    assert (found.layers, found.bound_ms, found.share_of_bound) == ((), None, None)
    assert found.reasons["parameter_bytes"] == "a plain callable doesn't show its parameters"
    assert found.reasons["flops"] == found.reasons["bytes_moved"]
    assert "work           not measured: work is counted on a graph, and a plain" in str(found)


def test_a_module_that_cannot_be_captured_is_measured_with_the_reason(no_counter):
    class Branching(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum().item() > 0 else x

    found = measure(Branching().eval(), torch.randn(8, 4), **QUICK)
    assert found.flops is None
    assert found.reasons["flops"].startswith("the graph can't be counted: CaptureError: Branching")


def test_counting_can_be_left_out(no_counter, monkeypatch):
    monkeypatch.setattr(measuring, "ceilings", lambda device: pytest.fail("measured"))
    found = measure(linear(), torch.randn(8, 64), count=False, **QUICK)
    assert (found.flops, found.ceilings, found.layers) == (None, None, ())
    assert found.reasons["flops"] == "count=False"


def test_modules_are_measured_in_eval_mode_without_gradients_and_put_back(no_counter):
    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = set()
            self.drop = nn.Dropout()

        def forward(self, x):
            self.seen.add((self.training, self.drop.training, torch.is_grad_enabled()))
            return x

    model = Watching()
    model.drop.eval()
    measure(model, torch.randn(8, 4), count=False, **QUICK)
    assert model.seen == {(False, False, False)}
    assert (model.training, model.drop.training) == (True, False)


def test_models_take_turns_so_that_a_slowing_machine_is_unfair_to_none(no_counter, monkeypatch):
    clock = SimpleNamespace(now=0.0, order=[])

    def system(name, seconds):
        def call(x):
            clock.order.append(name)
            # Every call finds the machine half a percent slower than the one before.
            clock.now += seconds * (1 + 0.005 * len(clock.order))

        return call

    latency = sys.modules["fxopt.timing.latency"]
    fake = SimpleNamespace(
        perf_counter=lambda: clock.now, perf_counter_ns=lambda: int(clock.now * 1e9)
    )
    monkeypatch.setattr(latency, "time", fake)
    models = {"slow": system("slow", 0.02), "fast": system("fast", 0.01)}
    found = measure_all(models, torch.zeros(1), repeats=12, seconds=100.0, count=False)
    compared = ratio(found["slow"].latency, found["fast"].latency)
    assert compared.pairs == 12
    assert compared.median == pytest.approx(2.0, rel=0.01)
    times = found["slow"].latency.samples
    assert times[-1] / times[0] > 1.05
    timed = clock.order[: clock.order.index("fast", 4) + 20]
    assert timed[:20] == ["slow", "fast"] * 10


def test_peak_memory_is_read_or_its_absence_explained(no_counter, monkeypatch):
    monkeypatch.setattr(measuring, "peak_memory", peak_memory)
    found = measure(lambda x: x.repeat(1 << 22), torch.zeros(1), **QUICK)
    if found.peak_bytes is None:
        assert found.peak_source is None
    else:
        assert found.peak_bytes == pytest.approx(4 << 22, rel=0.1)
    monkeypatch.setattr(measuring, "peak_memory", lambda call, device: None)
    found = measure(lambda x: x, torch.zeros(1), **QUICK)
    assert found.peak_bytes is None
    assert found.reasons["peak_bytes"] == "no honest reading is possible here on cpu"


def test_throughput_of_rows_and_tokens(no_counter):
    def forward(input_ids, attention_mask):
        return input_ids

    mask = torch.ones(4, 8, dtype=torch.int64)
    mask[-1, 5:] = 0
    inputs = {"input_ids": torch.zeros(4, 8), "attention_mask": mask, "labels": torch.zeros(4)}
    found = measure(forward, inputs, count=False, **QUICK).throughput
    assert found.rows == pytest.approx(4 * found.calls)
    assert found.tokens == pytest.approx(29 * found.calls)
    told = measure(forward, inputs, tokens=7, count=False, **QUICK).throughput
    assert told.tokens == pytest.approx(7 * told.calls)
    assert measure(torch.relu, torch.zeros(3, 2), **QUICK).throughput.tokens is None
    assert measure(lambda: 0, (), **QUICK).throughput.rows is None


def test_energy_of_a_counter_at_hand(monkeypatch):
    joules = iter(range(10**9))
    counter = EnergyCounter("fake", (Domain("board", lambda: float(next(joules))),), 0.01)
    monkeypatch.setattr(measuring, "energy_counter", lambda device: counter)
    found = measure(linear(), torch.randn(8, 64), tokens=8, carbon=100.0, **QUICK).energy
    assert isinstance(found, Energy)
    assert (found.source, found.tokens, found.carbon) == ("fake", 8, 100.0)
    assert found.joules.median > 0
    assert not found.estimated


def test_an_estimate_is_made_only_on_request_and_says_so(no_counter):
    plain = measure(linear(), torch.randn(8, 64), watts=65.0, **QUICK)
    assert plain.energy == Unmeasured("no counter here")
    found = measure(linear(), torch.randn(8, 64), estimate=True, watts=65.0, **QUICK)
    assert isinstance(found.energy, Energy)
    assert found.energy.estimated
    assert 0 < found.energy.watts <= 65.0
    assert "ESTIMATED" in str(found)


def test_a_counter_is_preferred_to_an_estimate(monkeypatch):
    joules = iter(range(10**9))
    counter = EnergyCounter("fake", (Domain("board", lambda: float(next(joules))),), 0.01)
    monkeypatch.setattr(measuring, "energy_counter", lambda device: counter)
    found = measure(linear(), torch.randn(8, 64), estimate=True, watts=65.0, **QUICK).energy
    assert isinstance(found, Energy)
    assert not found.estimated


def test_energy_left_out():
    assert measure(torch.relu, torch.zeros(3), energy=False, **QUICK).energy == Unmeasured(
        "energy=False"
    )


@pytest.mark.skipif(
    Path("/sys/class/powercap/intel-rapl").exists(), reason="this machine has RAPL counters"
)
def test_on_a_machine_without_a_counter_no_number_is_invented():
    found = measure(linear(), torch.randn(8, 64), carbon=400.0, subtract_idle=True, **QUICK)
    assert isinstance(found.energy, Unmeasured)
    assert json.loads(found.to_json())["energy"] == {"reason": found.energy.reason}
    (line,) = [line for line in str(found).splitlines() if line.strip().startswith("energy")]
    assert line.split(maxsplit=1)[1].startswith("not measured: ")


@pytest.mark.parametrize(
    ("model", "inputs", "options", "text"),
    [
        (7, torch.zeros(1), {}, r"int is a int, which can't be called; give an nn\.Module, an "),
        (torch.relu, "text", {}, r"inputs must be a tensor, a tuple of positional "),
        (torch.relu, torch.zeros(1), {"tokens": 0}, r"tokens=0: give the number of tokens of one"),
        (torch.relu, torch.zeros(1), {"carbon": -1.0}, r"carbon=-1\.0: give the grid's carbon "),
        (
            torch.relu,
            torch.zeros(1),
            {"estimate": True},
            r"estimate=True with watts=None: an estimate is the processor's utilisation times a "
            r"power that you state\. Give watts=\.\.\., what the whole processor draws at full "
            r"load: its TDP in the maker's data sheet \(Intel ARK, AMD's product pages\)",
        ),
        (torch.relu, torch.zeros(1), {"estimate": True, "watts": float("nan")}, "watts=nan"),
        (torch.relu, torch.zeros(1), {"repeats": 0}, "repeats must be at least 1"),
    ],
)
def test_bad_arguments(model, inputs, options, text):
    with pytest.raises(ValueError, match=text) as caught:
        measure(model, inputs, **options)
    assert isinstance(caught.value, MeasureError) or "repeats" in options


def test_no_models():
    with pytest.raises(MeasureError, match=r"got no models; give it \{name: model\}"):
        measure_all({}, torch.zeros(1))


def test_json_round_trip(no_counter, monkeypatch):
    for found in (
        measure(linear(), torch.randn(8, 64), **QUICK),
        measure(linear(), torch.randn(8, 64), estimate=True, watts=65, carbon=9.5, **QUICK),
        measure(lambda x: x, torch.zeros(1), **QUICK),
    ):
        assert Measurement.from_json(found.to_json()) == found
        assert str(Measurement.from_json(found.to_json())) == str(found)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda d: "{", "this is no measurement: "),
        (lambda d: [], 'it has no "schema": "fxopt.measurement"'),
        (lambda d: d | {"version": 2}, "schema version 2, and this fxopt reads version 1"),
        (lambda d: d | {"flops": "many"}, "measurement.flops holds 'many', which is no int"),
        (lambda d: d | {"more": 1}, "measurement has unknown more"),
        (lambda d: {k: v for k, v in d.items() if k != "name"}, "measurement lacks name"),
        (lambda d: d | {"energy": {"joules": 1}}, "measurement.energy lacks source"),
    ],
)
def test_damaged_json_is_refused_by_field(no_counter, damage, text):
    content = json.loads(measure(torch.relu, torch.zeros(1), **QUICK).to_json())
    damaged = damage(content)
    with pytest.raises(SaveError) as caught:
        Measurement.from_json(damaged if isinstance(damaged, str) else json.dumps(damaged))
    assert text in str(caught.value)


def test_the_table(no_counter):
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(10))).eval()
    found = measure(model, torch.randn(8, 16), name="ten", **QUICK)
    table = str(found)
    assert table.startswith("fxopt measurement: ten on cpu\n")
    assert "of its bound" in table
    assert "energy         not measured: no counter here" in table
    assert "2 further layers, 20% of the bound, in the JSON" in table
    assert max(map(len, table.splitlines())) <= 100
    fast = dataclasses.replace(found, latency=dataclasses.replace(found.latency, median=1e-6))
    assert fast.share_of_bound > 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_cuda(no_counter):
    model = nn.Linear(1024, 1024).cuda().eval()
    found = measure(model, torch.randn(64, 1024, device="cuda"), **QUICK)
    assert found.device.startswith("cuda")
    assert found.device_bytes is not None
    assert found.device_bytes >= 4 * 1024 * 1024
    assert found.peak_source == "CUDA allocator"
