"""Which counters are found, through zeus, and what is said where none can be read."""

import sys
import threading
from pathlib import Path

import pytest
import torch

from fxopt.measurement import EnergyCounter, Unmeasured, energy_counter, measure_energy
from fxopt.measurement.energy import Stopwatch

pytest.importorskip("zeus", reason="energy is read through zeus: pip install 'fxopt[energy]'")
import zeus.device.cpu
import zeus.device.cpu.rapl


class Powercap:
    """The folder of the kernel's power capping framework, as Linux lays it out."""

    def __init__(self, folder):
        self.folder = folder

    def add(self, path, name, microjoules=0, wraps_at=262_143_328_850):
        zone = self.folder / path
        zone.mkdir(parents=True)
        (zone / "name").write_text(f"{name}\n")
        (zone / "energy_uj").write_text(f"{microjoules}\n")
        (zone / "max_energy_range_uj").write_text(f"{wraps_at}\n")

    def spend(self, path, microjoules):
        file = self.folder / path / "energy_uj"
        wraps_at = int((self.folder / path / "max_energy_range_uj").read_text())
        file.write_text(f"{(int(file.read_text()) + microjoules) % wraps_at}\n")


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    monkeypatch.setattr(zeus.device.cpu.rapl, "RAPL_DIR", str(tmp_path))
    monkeypatch.setattr(zeus.device.cpu, "_cpus", None)
    zeus.device.cpu.rapl.rapl_is_available.cache_clear()
    yield Powercap(tmp_path)
    zeus.device.cpu.rapl.rapl_is_available.cache_clear()


PACKAGE, MEMORY = "intel-rapl:0", "intel-rapl:0/intel-rapl:0:0"


def test_packages_and_their_memory_are_read_and_turn_over(powercap):
    powercap.add(PACKAGE, "package-0", 999_000_000, wraps_at=1_000_000_000)
    powercap.add(MEMORY, "dram", 5_000_000)
    powercap.add("intel-rapl:1", "package-1")
    counter = energy_counter("cpu")
    assert isinstance(counter, EnergyCounter)
    assert counter.source == "RAPL (package-0, package-0 memory, package-1)"
    assert counter.window_seconds == 0.5
    before = counter.read()
    assert before == (999.0, 5.0, 0.0)
    for path, microjoules in ((PACKAGE, 3_000_000), (MEMORY, 500_000), ("intel-rapl:1", 7)):
        powercap.spend(path, microjoules)
    assert counter.joules(before, counter.read()) == pytest.approx(3.500007)


def test_reading_starts_no_process_and_no_thread(powercap, monkeypatch):
    powercap.add(PACKAGE, "package-0", 1)
    monkeypatch.setattr(
        zeus.device.cpu.rapl, "RaplWraparoundTracker", lambda *_: pytest.fail("a process")
    )
    threads = threading.active_count()
    counter = energy_counter("cpu")
    assert isinstance(counter, EnergyCounter)
    counter.read()
    assert threading.active_count() == threads


def test_watched_counters_are_zeus_s_own(powercap, monkeypatch):
    class Tracker:
        def __init__(self, *_):
            pass

        def get_num_wraparounds(self):
            return 2

    monkeypatch.setattr(zeus.device.cpu.rapl, "RaplWraparoundTracker", Tracker)
    powercap.add(PACKAGE, "package-0", 1_000_000, wraps_at=100_000_000)
    counter = energy_counter("cpu", watched=True)
    assert isinstance(counter, EnergyCounter)
    assert counter.read() == (201.0,)


def test_the_whole_laptop_is_not_counted_beside_its_package(powercap):
    powercap.add(PACKAGE, "package-0", 1)
    powercap.add("intel-rapl:1", "psys", 1)
    counter = energy_counter("cpu")
    assert isinstance(counter, EnergyCounter)
    assert counter.source == "RAPL (package-0)"


def test_a_folder_without_packages(powercap):
    powercap.add("intel-rapl:0", "psys")
    assert energy_counter("cpu") == Unmeasured(
        "RAPL can't be read: it names no package of this processor"
    )


def test_a_counter_of_a_container_that_never_moves_gives_no_number(powercap):
    powercap.add(PACKAGE, "package-0", 12_345)
    counter = energy_counter("cpu")
    assert isinstance(counter, EnergyCounter)
    ticks = iter(range(1000))
    watch = Stopwatch(lambda: float(next(ticks)), lambda _: None)
    found = measure_energy({"a": lambda: None}, counter, watch=watch)["a"]
    assert isinstance(found, Unmeasured)
    assert "stood still in 5 of 5 windows" in found.reason


def test_a_counter_that_may_not_be_read(powercap, monkeypatch):
    powercap.add(PACKAGE, "package-0")
    real = open

    def forbidden(path, *args, **kwargs):
        if str(path).endswith("energy_uj"):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", forbidden)
    found = energy_counter("cpu")
    assert isinstance(found, Unmeasured)
    assert found.reason.startswith("RAPL can't be read (zeus: Can't read file due to permission")
    assert "root privileges" in found.reason


def test_without_zeus_it_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "zeus"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "zeus", None)
    assert energy_counter("cpu") == Unmeasured(
        "energy counters are read through zeus, which is missing: pip install 'fxopt[energy]'"
    )


@pytest.mark.skipif(
    Path("/sys/class/powercap/intel-rapl").exists(), reason="this machine has RAPL counters"
)
def test_a_machine_without_rapl_has_no_number():
    found = energy_counter("cpu")
    assert isinstance(found, Unmeasured)
    assert str(found).startswith("not measured: RAPL can't be read (zeus: RAPL")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_has_no_number():
    assert energy_counter("cuda") == Unmeasured("this machine has no CUDA device")


def test_a_device_of_another_kind():
    assert energy_counter("meta") == Unmeasured(
        "no energy counter is known for a device of type meta"
    )
