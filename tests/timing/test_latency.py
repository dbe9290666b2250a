import gc
import time

import pytest
import torch

from fxopt.timing import Latency, latency, ratio
from fxopt.timing.latency import summarize


class Recorder:
    """Callables that note in which order they were called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def system(self, name: str, seconds: float = 0.006):
        def call() -> None:
            self.calls.append(name)
            time.sleep(seconds)

        return call


def test_systems_take_turns():
    recorder = Recorder()
    latency({"a": recorder.system("a"), "b": recorder.system("b")}, repeats=4)
    assert recorder.calls == ["a", "b"] * (len(recorder.calls) // 2)


def test_warm_up_is_thrown_away():
    recorder = Recorder()
    result = latency({"a": recorder.system("a")}, repeats=5)
    assert result["a"].runs == 5 == len(result["a"].samples)
    assert len(recorder.calls) > 5


def test_the_budget_ends_the_rounds_but_never_before_three():
    recorder = Recorder()
    result = latency({"a": recorder.system("a", 0.02)}, repeats=1000, seconds=0.01)
    assert result["a"].runs == 3


def test_a_fast_system_is_called_several_times_per_sample():
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    latency({"fast": count}, repeats=3)
    assert calls > 100


def test_percentiles_and_text():
    times = [float(value) for value in range(1, 102)]
    summary = summarize(times)
    assert (summary.median, summary.p5, summary.p95, summary.runs) == (51.0, 6.0, 96.0, 101)
    assert str(summary) == "51.00 ms (6.00 to 96.00, 101 runs)"


def test_ratio_is_taken_pair_by_pair():
    # The machine was twice as slow in the second round; the ratio doesn't feel it.
    slow, fast = summarize([20.0, 40.0, 20.0]), summarize([10.0, 20.0, 10.0])
    result = ratio(slow, fast)
    assert (result.median, result.p5, result.p95, result.pairs) == (2.0, 2.0, 2.0, 3)
    assert str(result) == "2.00x (2.00 to 2.00, 3 pairs)"


def test_ratio_refuses_what_does_not_pair_up():
    with pytest.raises(ValueError, match="measure both systems in one call"):
        ratio(summarize([1.0, 2.0]), summarize([1.0]))
    with pytest.raises(ValueError, match="got 0 and 0 of them"):
        ratio(Latency(1.0, 1.0, 1.0, 1), Latency(1.0, 1.0, 1.0, 1))


@pytest.mark.parametrize(
    ("systems", "options", "text"),
    [
        ({}, {}, "got no systems"),
        ({"a": lambda: None}, {"repeats": 0}, "repeats must be at least 1"),
        ({"a": lambda: None}, {"seconds": 0.0}, "seconds above 0"),
        ({"a": lambda: None}, {"seconds": float("nan")}, "seconds above 0"),
    ],
)
def test_bad_arguments(systems, options, text):
    with pytest.raises(ValueError, match=text):
        latency(systems, **options)


def test_the_garbage_collector_rests_meanwhile_and_is_as_before_even_after_an_error():
    during = []

    def fails_later() -> None:
        during.append(gc.isenabled())
        if len(during) == 3:
            raise RuntimeError("the system failed")

    with pytest.raises(RuntimeError, match="the system failed"):
        latency({"a": fails_later})
    assert during == [True, False, False]
    assert gc.isenabled()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_work_is_waited_for():
    x = torch.randn(4096, 4096, device="cuda")
    done = torch.cuda.Event()

    def call() -> torch.Tensor:
        result = x @ x
        done.record()
        return result

    latency({"matmul": call}, repeats=3)
    assert done.query()
