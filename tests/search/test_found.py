"""The front is exactly what no other trial beats; machines are never mixed."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fxopt.search import Found, Space, TrialRecord
from fxopt.search.found import front

OBJECTIVES = ("latency", "memory", "energy")
KEYS = ("latency_ms", "memory_bytes", "energy_j")

ratios = st.sampled_from([0.25, 0.5, 0.75, 1.0, 1.25])


@st.composite
def trial_lists(draw: st.DrawFn) -> list[TrialRecord]:
    found = []
    for number in range(draw(st.integers(0, 12))):
        state = draw(st.sampled_from(["measured", "measured", "infeasible", "pruned", "lost"]))
        costs = [draw(ratios) for _ in OBJECTIVES] if state == "measured" else []
        found.append(
            TrialRecord(
                number, f"p{number}", state, metric=1.0,
                values=dict(zip(KEYS, costs, strict=False)),
                ratios=dict(zip(OBJECTIVES, costs, strict=False)),
                machine=draw(st.sampled_from(["here", "there"])),
            )
        )  # fmt: skip
    return found


def found(
    trials: list[TrialRecord], objectives: tuple[str, ...] = OBJECTIVES, **more: Any
) -> Found:
    machines = {name: {"cpu": f"{name}'s"} for name in ("here", "there")}
    return Found(
        objectives, tuple(trials), "here", machines, 1.0, 0.9, Space.of([["lower"]]), **more
    )


@given(trial_lists(), st.integers(1, 3))
def test_the_front_is_what_brute_force_finds(trials: list[TrialRecord], count: int) -> None:
    objectives = OBJECTIVES[:count]

    def is_beaten(one: TrialRecord, by: TrialRecord) -> bool:
        pairs = [(by.ratios[name], one.ratios[name]) for name in objectives]
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    for machine, candidates in found(trials, objectives).fronts.items():
        measured = [t for t in trials if t.state == "measured" and t.machine == machine]
        wanted = {
            one.number for one in measured if not any(is_beaten(one, other) for other in measured)
        }
        assert {candidate.trial for candidate in candidates} == wanted
        firsts = [candidate.ratios[objectives[0]] for candidate in candidates]
        assert firsts == sorted(firsts)
    assert found(trials, objectives).pareto == found(trials, objectives).fronts.get("here", ())


def measured(number: int, *costs: float, **more: Any) -> TrialRecord:
    return TrialRecord(
        number, f"list {number}", "measured", metric=0.95, machine=more.pop("machine", "here"),
        values=dict(zip(KEYS, (10 * costs[0], 1e6 * costs[-1], 1.0), strict=True)),
        ratios=dict(zip(OBJECTIVES, costs, strict=False)), **more,
    )  # fmt: skip


def test_a_list_that_was_drawn_twice_stands_on_the_front_once() -> None:
    trials = [measured(0, 0.5), measured(1, 0.5, same_as=0)]
    assert [one.trial for one in front(trials, ("latency",))] == [0]
    assert [trial.counts for trial in trials] == [True, False]


def test_the_best_has_the_least_product_of_ratios() -> None:
    trials = [measured(0, 0.2, 1.0), measured(1, 0.4, 0.4), measured(2, 1.0, 0.3)]
    best = found(trials, ("latency", "memory")).best
    assert best is not None
    assert best.trial == 1
    assert found([]).best is None


def test_what_was_found_prints_as_a_table() -> None:
    trials = [
        measured(0, 0.5, 0.25),
        measured(1, 0.1, 0.1, machine="there"),
        TrialRecord(2, "x", "infeasible", "0.5 < 0.9 allowed", metric=0.5, machine="here"),
        TrialRecord(3, "y", "lost", "interrupted, or its worker died"),
    ]
    text = str(found(trials, ("latency", "memory"), interrupted=True, notes=("a note",)))
    assert text == (
        "search over latency, memory: 2 measured, 1 infeasible\n"
        "metric of the original 1, allowed 0.9\n"
        "  5 ms (0.50x), 0.25 MB (0.25x), metric 0.95: list 0\n"
        "  1 more on the front of another machine (there's), not comparable with these: "
        "fronts['there']\n"
        "interrupted: what was measured before is kept\n"
        "a note"
    )
    empty = str(found([]))
    assert "no trial finished" in empty
    assert "no list measured on this machine keeps the metric" in empty


def test_what_was_found_is_json() -> None:
    plain = json.loads(json.dumps(found([measured(0, 0.5, 0.25)], ("latency", "memory")).to_json()))
    assert plain["best"] == "list 0"
    assert plain["pareto"][0]["ratios"] == {"latency": 0.5, "memory": 0.25}
    assert plain["trials"][0]["state"] == "measured"


def test_a_trial_prints() -> None:
    assert str(measured(3, 0.5, 0.25)) == (
        "trial 3, measured: list 3 (latency 0.500x, memory 0.250x; metric 0.95)"
    )
