"""The contest: who wins by how much, and that nothing is timed twice. No time is asserted."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.errors import KernelError
from fxopt.timing import Latency, compare_kernels, kernel_timing, summarize, timings_in


class Clock:
    """Gives the times it was made with, and counts how often it was asked."""

    def __init__(self, **times: float | list[float]) -> None:
        self.times = times
        self.keys: list[Hashable] = []

    def __call__(
        self, key: Hashable, kernels: Mapping[str, Callable[[], object]]
    ) -> dict[str, Latency]:
        self.keys.append(key)
        found = {name: self.times[name] for name in kernels}
        return {n: summarize(t if isinstance(t, list) else [t] * 9) for n, t in found.items()}


def kernels(*names: str) -> dict[str, Callable[[], object]]:
    return dict.fromkeys(names, lambda: None)


def verdict(**times: float | list[float]) -> str:
    with timings_in(None, Clock(**times)):
        return compare_kernels(kernels(*times), "key").verdict


def test_the_fastest_that_pays_wins() -> None:
    assert verdict(float=10.0, int8=6.0, other=7.0) == "int8"
    assert verdict(float=10.0, int8=8.0, other=7.0) == "other"
    assert verdict(float=10.0, int8=12.0) == "float"
    assert verdict(float=10.0) == "float"


def test_a_win_needs_five_percent() -> None:
    assert verdict(float=100.0, int8=96.0) == "float"
    assert verdict(float=100.0, int8=94.0) == "int8"


def test_a_win_needs_to_stand_out_of_the_noise() -> None:
    calm = [8.0] * 6 + [9.0] * 5
    assert verdict(float=[10.0] * 11, int8=calm) == "int8"
    wild = [4.0, 15.0, 9.0, 16.0, 3.0, 9.0, 12.0, 2.0, 14.0, 9.0, 5.0]
    assert verdict(float=[10.0] * 11, int8=wild) == "float"


def test_drift_of_the_machine_is_no_noise() -> None:
    drift = [float(round_) for round_ in range(1, 12)]
    assert verdict(float=drift, int8=[0.8 * time for time in drift]) == "int8"


@given(
    baseline=st.lists(st.floats(0.1, 10.0), min_size=3, max_size=30),
    factor=st.floats(0.1, 3.0),
)
def test_the_interval_holds_the_median_and_scales(baseline: list[float], factor: float) -> None:
    rounds = [factor * time for time in baseline]
    with timings_in(None, Clock(float=baseline, int8=rounds)):
        timing = compare_kernels(kernels("float", "int8"), "key")
    ratio = timing.ratios["int8"]
    assert ratio.low <= ratio.median <= ratio.high
    assert ratio.median == pytest.approx(factor)
    assert ratio.spread == pytest.approx(0.0, abs=1e-9)
    assert timing.pays("int8") == (ratio.median <= 0.95)
    assert not timing.pays("float")
    assert not timing.pays("unknown")


def test_the_text() -> None:
    def broken() -> None:
        raise KernelError("no such unit\nmore")

    with timings_in(None, Clock(float=2.0, int8=1.0)):
        timing = compare_kernels({**kernels("float", "int8"), "fp8": broken}, "key")
    assert str(timing) == (
        "float 2 ms, int8 0.50x (0.50 to 0.50), fp8 can't run: no such unit; int8 it is"
    )


def test_asked_again_nothing_runs_not_even_in_another_process(tmp_path: Path) -> None:
    def never() -> None:
        raise AssertionError("timed a second time")

    clock = Clock(float=2.0, int8=1.0)
    with timings_in(tmp_path, clock):
        first = compare_kernels(kernels("float", "int8"), ("linear", 4, 8))
        again = compare_kernels({"float": never, "int8": never}, ("linear", 4, 8))
        compare_kernels(kernels("float", "int8"), ("linear", 4, 9))
        compare_kernels(kernels("int8", "float"), ("linear", 4, 8))
    assert len(clock.keys) == 3
    with timings_in(tmp_path, clock):
        recalled = compare_kernels({"float": never, "int8": never}, ("linear", 4, 8))
    assert first == again == recalled


def test_a_timing_on_a_busy_machine_is_forgotten_with_the_process(tmp_path: Path) -> None:
    wild = Clock(float=[1.0, 9.0, 1.0, 9.0, 3.0], int8=[9.0, 1.0, 9.0, 1.0, 3.0])
    with timings_in(tmp_path, wild):
        compare_kernels(kernels("float", "int8"), "key")
        compare_kernels(kernels("float", "int8"), "key")
    assert len(wild.keys) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong",
    [{}, {"baseline": "x"}, {"medians": {"float": "fast"}}, {"ratios": []}, {"failed": None}],
)
def test_an_answer_of_another_make_is_timed_anew(tmp_path: Path, wrong: dict[str, object]) -> None:
    clock = Clock(float=2.0, int8=1.0)
    with timings_in(tmp_path, clock):
        first = compare_kernels(kernels("float", "int8"), "key")
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    content["answer"] = {**content["answer"], **wrong} if wrong else {}
    path.write_text(json.dumps(content))
    with timings_in(tmp_path, clock):
        assert compare_kernels(kernels("float", "int8"), "key") == first
    assert len(clock.keys) == 2


def test_no_gradient_is_recorded_and_the_real_clock_works() -> None:
    grads: list[bool] = []
    with timings_in(None):
        timing = compare_kernels({"float": lambda: grads.append(torch.is_grad_enabled())}, "key")
    assert not any(grads)
    assert timing.verdict == "float"
    assert timing.medians["float"] > 0


def test_a_baseline_that_fails_and_no_kernels_at_all_are_errors() -> None:
    def broken() -> None:
        raise KernelError("out of order")

    with timings_in(None), pytest.raises(KernelError, match="out of order"):
        compare_kernels({"float": broken, "int8": lambda: None}, "key")
    with timings_in(None), pytest.raises(ValueError, match=r"key='k'\) got no kernels"):
        compare_kernels({}, "k")


def test_timings_are_kept_in_the_users_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    kernel_timing._default_bench.cache_clear()
    try:
        assert (
            kernel_timing._default_bench().store.folder == tmp_path / ".cache" / "fxopt" / "timings"
        )
    finally:
        kernel_timing._default_bench.cache_clear()


def test_without_a_home_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    kernel_timing._default_bench.cache_clear()
    try:
        assert kernel_timing._default_bench().store.folder is None
    finally:
        kernel_timing._default_bench.cache_clear()


def test_what_is_far_slower_at_a_glance_is_timed_no_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, ...]] = []
    times = {"float": 1.0, "near": 2.4, "far": 30.0}

    def clock(systems: Mapping[str, Callable[[], object]], **_: object) -> dict[str, Latency]:
        asked.append(tuple(systems))
        return {name: summarize([times[name], 1.1 * times[name]]) for name in systems}

    monkeypatch.setattr(kernel_timing, "latency", clock)
    with timings_in(None):
        timing = compare_kernels(kernels(*times), "key")
    assert asked == [("float", "near", "far"), ("float", "near")]
    assert not timing.pays("far")
    assert timing.ratios["far"].median == pytest.approx(30.0)
    assert timing.spread == timing.ratios["near"].spread
