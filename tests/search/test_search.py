"""A search keeps the metric, survives lists that don't hold, and its lists can be pasted."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import fxopt
from fxopt import kernels
from fxopt.device import Device, pretending
from fxopt.errors import PassError
from fxopt.measurement.counters import Domain, EnergyCounter, Unmeasured
from fxopt.search import Found, Measured, SearchError, judging, search, storage
from fxopt.search.found import front
from fxopt.search.worker import make_sampler
from fxopt.timing import fingerprint
from tests.search.small import INPUTS, SPACE, Mlp, by_graph, closeness, constant, mlp

optuna = pytest.importorskip("optuna")

# By name, since `fxopt.search` is the function where an attribute is asked for.
MEASURING, STUDY = (import_module(f"fxopt.search.{name}") for name in ("measuring", "study"))


def run(**options: Any) -> Found:
    given: dict[str, Any] = {
        "metric": closeness, "tolerance": 0.1, "trials": 8, "space": SPACE, "measure": by_graph,
        **options,
    }  # fmt: skip
    return search(mlp(), INPUTS, **given)


def test_the_front_keeps_the_metric_and_can_be_pasted() -> None:
    found = run(objectives=("latency", "memory"), trials=18)
    states = {trial.state for trial in found.trials}
    assert states == {"measured", "infeasible"}
    assert found.original_metric == pytest.approx(1.0)
    for trial in found.trials:
        if trial.state == "infeasible":
            assert trial.metric is not None
            assert trial.metric < found.threshold
            assert "allowed" in trial.reason
            assert not trial.ratios
    assert found.pareto == front(found.trials, found.objectives)
    for candidate in found.pareto:
        assert candidate.metric >= found.threshold
        again = fxopt.transform(mlp(), candidate.passes, example_inputs=INPUTS[0])
        assert closeness(again, INPUTS) == pytest.approx(candidate.metric, abs=1e-6)
        measured = by_graph(None, again, INPUTS[0], found.objectives)
        assert dict(measured.values) == dict(candidate.values)


def test_a_space_that_is_used_up_ends_the_search() -> None:
    found = run(space=[["canonicalize"], ["", "int8-linear{where=always}"]], trials=30)
    assert sorted(trial.passes for trial in found.trials if trial.counts) == [
        "canonicalize", "canonicalize, int8-linear{where=always}",
    ]  # fmt: skip
    assert found.notes == ("every list of the space has been tried",)
    repeated = [trial for trial in found.trials if trial.same_as is not None]
    assert all(trial.ratios == found.trials[trial.same_as or 0].ratios for trial in repeated)


def test_the_same_seed_finds_the_same() -> None:
    lists = [[trial.passes for trial in run(trials=6).trials] for _ in range(2)]
    assert lists[0] == lists[1]


def test_lists_that_do_not_hold_are_pruned_with_the_reason() -> None:
    space = [["", "lower"], ["canonicalize", "int8-linear{where=always}"], ["", "prepack"]]
    found = run(space=space, start=["int8-linear{where=always, claim=sqnr(90)}"], trials=20)
    reasons = {trial.passes: trial.reason for trial in found.trials if trial.state == "pruned"}
    wrong = next(reason for passes, reason in reasons.items() if passes.startswith("lower, int8"))
    assert wrong.startswith("PassError: ")
    assert "comes after Lower()" in wrong
    broken = next(reason for passes, reason in reasons.items() if "sqnr(90" in passes)
    assert broken.startswith(("EquivalenceError: ", "PassError: "))
    assert any(reason.startswith("EquivalenceError: ") for reason in reasons.values())
    assert found.best is not None


def test_an_empty_list_is_the_original() -> None:
    found = run(space=[["", "canonicalize"]])
    empty = next(trial for trial in found.trials if not trial.passes)
    assert empty.reason == "no pass is left: that is the original itself"


def test_less_can_be_better() -> None:
    def error(model: Any, data: Any) -> float:
        return 1 - closeness(model, data)

    found = run(metric=error, direction="minimize", tolerance=0.01, trials=18)
    assert found.threshold == pytest.approx(0.01)
    assert all(candidate.metric <= 0.01 for candidate in found.pareto)
    beyond = [trial for trial in found.trials if trial.state == "infeasible"]
    assert beyond
    assert all("> 0.01 allowed" in trial.reason for trial in beyond)


def test_samplers_are_told_of_the_constraint(tmp_path: Path) -> None:
    from optuna.samplers import NSGAIISampler, TPESampler

    assert isinstance(make_sampler(1, 30, 0), TPESampler)
    assert isinstance(make_sampler(2, 30, 0), NSGAIISampler)
    found = run(storage=tmp_path / "search.db", trials=18)
    with storage.quiet_optuna():
        kept = storage.open_storage(storage.storage_url(tmp_path / "search.db"))
        trials = optuna.load_study(study_name="fxopt", storage=kept).trials
    for trial, record in zip(trials, found.trials, strict=True):
        assert record.metric is not None
        assert trial.constraints == {"metric": pytest.approx(found.threshold - record.metric)}
        assert (trial.constraints["metric"] > 0) == (record.state == "infeasible")
        wanted = record.ratios.get("latency", float("inf"))
        assert trial.values == [wanted]


def test_only_lists_that_keep_the_metric_are_measured() -> None:
    timed = []

    def note(original: Any, candidate: Any, inputs: Any, objectives: tuple[str, ...]) -> Measured:
        timed.append(closeness(candidate, INPUTS))
        return by_graph(original, candidate, inputs, objectives)

    found = run(measure=note, trials=18, tolerance=0.02)
    assert min(timed) >= 0.98
    assert len(timed) == sum(t.state == "measured" and t.same_as is None for t in found.trials)


def test_a_failing_trial_does_not_end_the_search() -> None:
    def fails(original: Any, candidate: Any, inputs: Any, objectives: tuple[str, ...]) -> Measured:
        if candidate.program.node_count() > 3:
            raise RuntimeError("out of memory")
        return by_graph(original, candidate, inputs, objectives)

    found = run(measure=fails, trials=6)
    failed = [trial for trial in found.trials if trial.state == "failed"]
    assert failed
    assert {trial.reason for trial in failed} == {"RuntimeError: out of memory"}
    assert found.best is not None


@pytest.mark.parametrize("error", [KeyError("f1"), SystemExit(3)])
def test_a_metric_that_raises_makes_a_failed_trial(error: BaseException) -> None:
    def fails(model: Any, data: Any) -> float:
        if isinstance(model, fxopt.Optimized) and model.program.node_count() > 3:
            raise error
        return closeness(model, data)

    found = run(metric=fails, trials=6)
    failed = [trial for trial in found.trials if trial.state == "failed"]
    assert failed
    reason = f"SearchError: metric= raised {type(error).__name__}: {error}"
    assert {trial.reason for trial in failed} == {reason}


@pytest.mark.parametrize("error", [KeyError("f1"), SystemExit(3)])
def test_a_metric_that_raises_on_the_original_ends_the_search(error: BaseException) -> None:
    def fails(model: Any, data: Any) -> float:
        raise error

    with pytest.raises(SearchError) as caught:
        run(metric=fails)
    assert str(caught.value) == f"metric= raised {type(error).__name__}: {error}"


def test_what_cannot_beat_the_front_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "least_milliseconds", lambda program: 500.0)

    def measure(original: Any, candidate: Any, *rest: Any) -> Measured:
        return Measured({"latency_ms": 400.0}, {"latency_ms": 1000.0}, {"latency": 0.4})

    found = run(space=[["canonicalize"], ["", "lower"]], measure=measure, tolerance=1.0, trials=2)
    compiled = next(trial for trial in found.trials if "lower" in trial.passes)
    assert compiled.state == "pruned"
    assert compiled.reason == (
        "not compiled: its products and parameters alone take latency at least 0.50x, and trial 0 "
        "is below that"
    )


def test_a_trial_says_what_it_does() -> None:
    lines: list[str] = []
    run(trials=2, progress=lines.append)
    assert lines[0] == "judging the original"
    assert lines[1].startswith("trial 0, measured: canonicalize (latency ")


def test_lists_to_start_with_are_tried_first() -> None:
    passes = "canonicalize, int8-linear{where=always, mode=static}"
    found = run(start=[passes], trials=2)
    wanted = "canonicalize, int8-linear{mode=static, where=always}"
    assert [trial.passes for trial in found.trials] == ["canonicalize", wanted]


def interrupting_at(call: int) -> Callable[..., Measured]:
    calls = 0

    def measure(*given: Any) -> Measured:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return by_graph(*given)

    return measure


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "search.db"
    found = run(measure=interrupting_at(3), storage=file, tolerance=1.0)
    assert found.interrupted
    assert [trial.state for trial in found.trials[:4]] == ["measured"] * 2 + ["lost", "waiting"]
    assert found.best is not None
    resumed = run(storage=file, tolerance=1.0)
    assert not resumed.interrupted
    assert resumed.trials[3].passes == found.trials[2].passes
    assert resumed.trials[:2] == found.trials[:2]
    assert sum(trial.counts for trial in resumed.trials) == 8


def test_a_study_goes_on_where_it_was(tmp_path: Path) -> None:
    first = run(storage=tmp_path / "search.db", trials=3)
    again = run(storage=str(tmp_path / "search.db"), trials=3)
    assert again.trials == first.trials
    more = run(storage=tmp_path / "search.db", trials=5)
    assert more.trials[:3] == first.trials
    assert sum(trial.counts for trial in more.trials) == 5


def test_another_search_does_not_mix_with_a_study(tmp_path: Path) -> None:
    run(storage=tmp_path / "search.db", trials=1)
    with pytest.raises(SearchError) as caught:
        run(storage=tmp_path / "search.db", tolerance=0.2, objectives="memory")
    assert str(caught.value) == (
        "the storage has a study 'fxopt' of something else: objectives was ('latency',) and is "
        "('memory',); tolerance was 0.1 and is 0.2. Give the same model, data and options to go on "
        "with it, or another study= to begin one"
    )
    with pytest.raises(SearchError, match="the space is another; it was\n1: canonicalize:"):
        run(storage=tmp_path / "search.db", space=[["canonicalize"]])
    with pytest.raises(SearchError, match="the metric of the original was 1 and is 7"):
        run(storage=tmp_path / "search.db", metric=lambda model, data: 7.0)
    assert run(storage=tmp_path / "search.db", study="other", tolerance=0.2, trials=1).trials


def test_timings_of_another_machine_stay_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "search.db"
    here = run(storage=file, trials=4, tolerance=1.0)
    other = {**fingerprint(), "cpu": "another CPU", "load": 3.0}
    monkeypatch.setattr(STUDY, "fingerprint", lambda: other)

    def faster(*given: Any) -> Measured:
        found = by_graph(*given)
        return replace(found, ratios=dict.fromkeys(found.ratios, 0.01))

    there = run(storage=file, trials=6, tolerance=1.0, measure=faster)
    assert there.machine != here.machine
    assert len(there.fronts) == 2
    assert there.fronts[here.machine] == here.pareto
    assert {candidate.ratios["latency"] for candidate in there.pareto} == {0.01}
    assert "on the front of another machine (" in str(there)
    assert there.machines[there.machine]["cpu"] == "another CPU"


def test_the_real_measure_gives_ratios_to_the_original() -> None:
    found = run(measure=None, objectives=("latency", "memory"), trials=1)
    trial = found.trials[0]
    assert trial.ratios["latency"] > 0
    assert trial.values["memory_bytes"] >= 4 * (8 * 16 + 16 + 16 * 4 + 4)
    assert trial.original["latency_ms"] > 0


def test_the_standard_space_runs_on_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "least_milliseconds", lambda program: None)
    found = run(space=None, calibration=INPUTS, trials=1, metric=constant)
    assert found.trials[0].passes == "canonicalize"
    assert any(slot.name == "prune" for slot in found.space.slots)


def test_a_search_on_a_cpu_without_a_dot_product_asks_which_linears_to_spare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "has_onednn", lambda: True)
    plain = Device("cpu", "a plain one")
    monkeypatch.setattr(judging, "least_milliseconds", lambda program: None)
    with pretending(plain):
        found = run(space=None, calibration=INPUTS, trials=1, metric=constant)
    (choices,) = (slot.choices for slot in found.space.slots if slot.name == "int8")
    assert "int8-linear" in choices
    assert {"int8-linear{mode=static, exclude=up}", "int8-linear{mode=static, exclude=down}"} & {
        *choices
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objectives": ()}, "objectives=(): give one or more of latency, memory, energy, each"),
        ({"objectives": "speed"}, "objectives=('speed',): give one or more of latency, memory"),
        ({"direction": "up"}, "direction='up': must be 'maximize' or 'minimize'"),
        ({"tolerance": -1.0}, "tolerance=-1.0: give how much of the metric may be lost, 0 or more"),
        ({"trials": 0}, "trials=0: give a whole number from 1 on"),
        ({"workers": 0}, "workers=0: give a whole number from 1 on"),
        ({"metric": lambda m, d: "good"}, "metric= returned 'good'; it must return a number"),
        ({"metric": lambda m, d: float("nan")}, "metric= returned nan; it must return a number"),
        ({"calibration": iter(INPUTS)}, "calibration= is read in every trial, and a"),
        (
            {"storage": "nodb://nowhere", "measure": by_graph},
            "storage='nodb://nowhere' can't be opened: ",
        ),
        (
            {"storage": "postgresql+psycopg://me:secret@127.0.0.1:1/none"},
            "storage='postgresql+psycopg://me:***@127.0.0.1:1/none' can't be opened: ",
        ),
    ],
)
def test_what_cannot_work_is_said_first(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchError) as caught:
        run(**options)
    assert message in str(caught.value)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(SearchError) as caught:
        search(Mlp(), INPUTS, metric=constant, tolerance=0.1)
    assert str(caught.value) == (
        "the model is in training mode, in which its metric is random: call model.eval() first"
    )


def test_data_must_be_readable_again_and_hold_an_input() -> None:
    with pytest.raises(SearchError) as caught:
        search(mlp(), (x for x in INPUTS), metric=constant, tolerance=0.1)
    assert str(caught.value) == (
        "data= is read in every trial, and a generator can be read once: give a list or a "
        "DataLoader"
    )
    with pytest.raises(SearchError) as caught:
        search(mlp(), ["text"], metric=constant, tolerance=0.1)
    assert str(caught.value).startswith("inputs= was left out, and data has no first item that")


def test_a_measuring_function_must_return_what_was_asked() -> None:
    found = run(measure=lambda *given: Measured({}, {}, {}), trials=1)
    assert found.trials[0].reason.startswith(
        "SearchError: measure= returned Measured(values={}, original={}, ratios={}): it must return"
    )


def test_a_wrong_space_is_an_error_at_once() -> None:
    with pytest.raises(PassError, match=r"unknown pass 'lowr'; did you mean 'lower'\?"):
        run(space=[["lowr"]])


def test_without_optuna_the_way_to_install_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SearchError) as caught:
        run()
    assert str(caught.value) == (
        "search() needs optuna 5 or later, which isn't installed: pip install 'fxopt[search]'"
    )


def test_memory_that_cannot_be_read_is_no_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MEASURING, "peak_memory", lambda call, device: None)
    with pytest.raises(SearchError) as caught:
        run(objectives=("memory",), measure=None)
    assert str(caught.value).startswith(
        "objectives= asks for memory, but the peak memory of a call can't be read here: it takes"
    )


def test_energy_is_measured_where_a_counter_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = itertools.count()
    counter = EnergyCounter("a meter", (Domain("all", lambda: float(next(readings))),), 0.01)
    monkeypatch.setattr(MEASURING, "energy_counter", lambda device: counter)
    trial = run(objectives="energy", measure=None, trials=1).trials[0]
    assert trial.values["energy_j"] > 0
    assert trial.ratios["energy"] == trial.values["energy_j"] / trial.original["energy_j"]


def test_without_a_counter_no_energy_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Unmeasured("this machine has no RAPL")
    monkeypatch.setattr(MEASURING, "energy_counter", lambda device: missing)
    with pytest.raises(SearchError) as caught:
        run(objectives=("latency", "energy"), measure=None)
    assert str(caught.value) == (
        "objectives= asks for energy, but it is not measured: this machine has no RAPL. Leave "
        "energy out, or give measure= a function that reads your own meter"
    )


def test_optuna_is_left_as_it_was() -> None:
    import optuna

    before = optuna.logging.get_verbosity()
    with storage.quiet_optuna():
        assert optuna.logging.get_verbosity() != before
    assert optuna.logging.get_verbosity() == before
