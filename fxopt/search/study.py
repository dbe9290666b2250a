"""A study: what is searched for, written down with its trials, so that it can be gone on with."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from fxopt.errors import SearchError
from fxopt.search.found import Found, TrialRecord
from fxopt.search.signs_of_life import OUTCOME, WORKER
from fxopt.search.space import Space
from fxopt.timing import fingerprint

if TYPE_CHECKING:
    import optuna

_TERMS, _MACHINE, PASSES, MACHINE, INSTEAD_OF = (
    "terms", "machine:", "passes", "machine", "instead_of",
)  # fmt: skip
# What a fingerprint says of the moment, not of the machine.
_PASSING = ("load",)


@dataclass(frozen=True)
class Terms:
    """What every trial of a study has in common."""

    objectives: tuple[str, ...]
    direction: str
    tolerance: float
    original_metric: float
    model: str
    space: Space

    @property
    def threshold(self) -> float:
        """What the metric must be at least, or at most where less is better."""
        sign = -1.0 if self.direction == "maximize" else 1.0
        return self.original_metric + sign * self.tolerance

    def to_plain(self) -> dict[str, Any]:
        """Plain values, as for JSON."""
        return {
            **{name: value for name, value in vars(self).items() if name != "space"},
            "objectives": list(self.objectives),
            "space": self.space.to_plain(),
        }

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> Terms:
        """The terms that `to_plain` described."""
        return Terms(
            **{
                **plain,
                "objectives": tuple(plain["objectives"]),
                "space": Space.from_plain(plain["space"]),
            }
        )


def model_digest(model: nn.Module) -> str:
    """The class of a model and the names, shapes and dtypes of its state, as a short text."""
    state = [(name, tuple(t.shape), str(t.dtype)) for name, t in model.state_dict().items()]
    text = json.dumps([type(model).__name__, state], default=str)
    return f"{type(model).__name__}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def machine_key(machine: Mapping[str, Any]) -> str:
    """A short name of the machine that a fingerprint describes."""
    lasting = {name: value for name, value in machine.items() if name not in _PASSING}
    text = json.dumps(lasting, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def this_machine(study: optuna.Study) -> str:
    """The key of this machine, whose fingerprint is kept with the study."""
    machine = fingerprint()
    name = machine_key(machine)
    if _MACHINE + name not in study.user_attrs:
        study.set_user_attr(_MACHINE + name, machine)
    return name


def known_terms(study: optuna.Study) -> Terms | None:
    """The terms that a study was begun with; None for a new one."""
    plain = study.user_attrs.get(_TERMS)
    return None if plain is None else Terms.from_plain(plain)


def begin(study: optuna.Study, terms: Terms, points: Sequence[Mapping[str, str]]) -> None:
    """Write down the terms of a new study and queue the points to be tried first."""
    study.set_user_attr(_TERMS, terms.to_plain())
    for point in points:
        study.enqueue_trial(dict(point), skip_if_exists=True)


def check_same(known: Terms, asked: Terms, study: str) -> None:
    """Raise `SearchError` where a study is to be gone on with under other terms."""
    slack = max(asked.tolerance, 1e-6 * abs(known.original_metric))
    same_metric = math.isclose(known.original_metric, asked.original_metric, abs_tol=slack)
    different = [
        f"{name} was {getattr(known, name)!r} and is {getattr(asked, name)!r}"
        for name in ("objectives", "direction", "tolerance", "model")
        if getattr(known, name) != getattr(asked, name)
    ]
    if not same_metric:
        values = f"was {known.original_metric:.6g} and is {asked.original_metric:.6g}"
        different.append(f"the metric of the original {values}")
    if known.space != asked.space:
        different.append(f"the space is another; it was\n{known.space}\n")
    if different:
        raise SearchError(
            f"the storage has a study {study!r} of something else: {'; '.join(different)}. Give "
            "the same model, data and options to go on with it, or another study= to begin one"
        )


def records(study: optuna.Study) -> list[TrialRecord]:
    """The trials of a study, by number."""
    trials = study.get_trials(deepcopy=False)
    found = [record_of(trial) for trial in trials]
    for lost, anew in recorded_anew(trials).items():
        if found[lost].state == "lost":
            found[lost] = replace(found[lost], reason=_taken_for_lost(anew))
    return found


def recorded_anew(trials: Sequence[optuna.trial.FrozenTrial]) -> dict[int, int]:
    """The trials that others had ended under their workers, each with the one recorded instead."""
    return {
        int(trial.user_attrs[INSTEAD_OF]): trial.number
        for trial in trials
        if INSTEAD_OF in trial.user_attrs
    }


def _taken_for_lost(anew: int) -> str:
    return f"taken for lost while its worker lived; what it found is trial {anew}"


def record_of(trial: optuna.trial.FrozenTrial) -> TrialRecord:
    """A trial of optuna's as a record."""
    attributes = trial.user_attrs
    passes = str(attributes.get(PASSES, ""))
    machine = str(attributes.get(MACHINE, ""))
    outcome: dict[str, Any] = dict(attributes.get(OUTCOME, {}))
    if trial.state.name == "WAITING":
        return TrialRecord(trial.number, passes, "waiting")
    if trial.state.name == "RUNNING":
        return TrialRecord(trial.number, passes, "running", machine=machine)
    if not outcome:
        reason = "interrupted, or its worker died or gave no sign of life"
        return TrialRecord(trial.number, passes, "lost", reason, machine=machine)
    return TrialRecord(trial.number, passes, machine=machine, **outcome)


def plain_outcome(record: TrialRecord) -> dict[str, Any]:
    """What of a record is kept as the outcome of its trial."""
    plain = asdict(record)
    return {name: plain[name] for name in plain if name not in ("number", "passes", "machine")}


def taken(study: optuna.Study) -> int:
    """How many of the trials asked for are done or under way."""
    count = 0
    for trial in study.get_trials(deepcopy=False):
        running = trial.state.name == "RUNNING" and WORKER in trial.user_attrs
        count += running or record_of(trial).counts
    return count


def found_in(
    study: optuna.Study, terms: Terms, machine: str, interrupted: bool, notes: Sequence[str]
) -> Found:
    """What a study holds by now."""
    machines = {
        name.removeprefix(_MACHINE): value
        for name, value in study.user_attrs.items()
        if name.startswith(_MACHINE)
    }
    anew = recorded_anew(study.get_trials(deepcopy=False))
    told = [f"trial {lost} was {_taken_for_lost(number)}" for lost, number in anew.items()]
    return Found(
        terms.objectives,
        tuple(records(study)),
        machine,
        machines,
        terms.original_metric,
        terms.threshold,
        terms.space,
        interrupted,
        (*notes, *told),
    )
