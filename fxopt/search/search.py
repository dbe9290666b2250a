"""Search: which list of passes is the cheapest that keeps the metric, on this machine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxopt.capture import check_is_module
from fxopt.device import Device
from fxopt.errors import SearchError
from fxopt.kernels import multiplies_int8
from fxopt.progress import Progress, silent
from fxopt.search.found import Found, TrialRecord
from fxopt.search.judging import Direction, Metric, Task, judge_metric
from fxopt.search.measuring import check_measurable, measure_beside
from fxopt.search.objectives import Measure, checked_objectives
from fxopt.search.quiet import Turns
from fxopt.search.space import Space
from fxopt.search.standard import costly_linears, first_points, standard_space
from fxopt.search.storage import (
    check_installed,
    open_storage,
    quiet_optuna,
    reading,
    storage_url,
    study_there,
)
from fxopt.search.study import (
    Terms,
    begin,
    check_same,
    found_in,
    known_terms,
    model_digest,
    this_machine,
)
from fxopt.search.trial_log import TrialLog
from fxopt.search.worker import Budget, Worker, make_sampler
from fxopt.search.workers import Job, run_workers

if TYPE_CHECKING:
    import optuna


def search(
    model: nn.Module,
    data: Any,
    *,
    metric: Metric,
    tolerance: float,
    objectives: str | Iterable[str] = ("latency",),
    direction: Direction = "maximize",
    inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    trials: int = 30,
    seconds: float | None = None,
    storage: str | Path | None = None,
    study: str = "fxopt",
    space: Space | Iterable[Iterable[str]] | None = None,
    start: Iterable[str] = (),
    seed: int = 0,
    workers: int = 1,
    measure: Measure | None = None,
    progress: Progress | None = None,
    log_dir: str | Path | None = None,
    wandb: str | None = None,
) -> Found:
    """The lists of passes that cost least among those that keep `metric` within `tolerance`.

    `metric(model, data)` gives a number; `direction` says whether more of it is better. A list is
    allowed that keeps it within `tolerance` of the original's. `objectives` are "latency" (ms a
    call on `inputs`), "memory" (bytes of parameters plus a call's peak) and "energy" (joules a
    call, where a counter can be read); all are measured in turns with the original, and what is
    made small are the ratios to it. `inputs` left out is the first item of `data`. `calibration` is
    what `transform` takes; it must be a list or a DataLoader, since each trial reads it.

    `space` is a `Space` or a list of alternatives for each place of a pass list; left out, it is
    what the device is fast at. `start` are lists to try first, besides the usual ones; the space
    grows by them. `trials` counts those of the whole study, `seconds` those of this call.

    `storage` keeps the study: a path (a SQLite file) or a database's URL, such as
    `postgresql+psycopg://user@host/name`. The same call goes on where it was; a killed worker loses
    its own trial at most, and that is tried again. `workers` are processes on one storage (call it
    under `if __name__ == "__main__"`); more may join from other machines with the same storage.
    They build side by side and measure one at a time on each machine. Timings of different machines
    are never on one front. Ctrl-C ends the search and returns what was measured.

    `measure` replaces the measuring; `progress` is called with a line for each trial; `log_dir`
    takes TensorBoard events, `wandb` the name of a Weights & Biases project.

    Raises `SearchError` for options, a metric, data or a storage that can't be used, an objective
    that can't be measured here, or a package that isn't installed; `PassError` for a wrong space.
    """
    check_is_module(model)
    check_installed()
    objectives = checked_objectives(objectives)
    _check_options(model, direction, tolerance, trials, workers)
    _check_repeatable(data, calibration)
    inputs = _first_input(data) if inputs is None else inputs
    if measure is None:
        check_measurable(model, inputs, objectives)
    say = progress or silent
    deadline = None if seconds is None else time.time() + seconds
    log = TrialLog(log_dir, wandb, study)

    def tell(record: TrialRecord) -> None:
        log.write(record)
        say(str(record))

    try:
        with quiet_optuna(), _kept_at(storage, workers) as url, reading(url):
            opened = _opened(url, study, make_sampler(len(objectives), trials, seed), objectives)
            with study_there(opened):
                say("judging the original")
                original = judge_metric(metric, model, data)
                asked = partial(
                    Terms, objectives, direction, tolerance, original, model_digest(model)
                )
                given = space if space is None or isinstance(space, Space) else Space.of(space)
                standard = partial(_standard, model, inputs, calibration, say)
                terms = _terms(opened, asked, given, tuple(start), standard)
                task = Task(
                    model, data, metric, inputs, calibration, objectives, direction,
                    terms.threshold, measure or measure_beside,
                )  # fmt: skip
                budget = Budget(trials, deadline)
                finished, notes = _work(opened, task, terms, budget, url, seed, workers, tell)
                return found_in(opened, terms, this_machine(opened), not finished, notes)
    finally:
        log.close()


def _work(
    study: optuna.Study,
    task: Task,
    terms: Terms,
    budget: Budget,
    url: str | None,
    seed: int,
    workers: int,
    tell: Callable[[TrialRecord], None],
) -> tuple[bool, list[str]]:
    """Whether the search wasn't interrupted, and what to note."""
    if workers > 1:
        assert url is not None
        job = Job(task, url, study.study_name, budget, seed, torch.get_num_threads())
        return run_workers(job, workers, study, tell)
    turns = Turns(None if url is None else f"{url} {study.study_name}")
    worker = Worker(study, task, terms.space, budget, turns, seed, tell)
    return worker.run(), worker.notes


def _terms(
    study: optuna.Study,
    asked: Callable[[Space], Terms],
    space: Space | None,
    start: tuple[str, ...],
    standard: Callable[[], Space],
) -> Terms:
    """The terms of the study as it is, or as it begins now."""
    known = known_terms(study)
    if known is None:
        first = space or standard()
        points = first_points(first) if space is None else [first.point()]
        for passes in start:
            first, point = first.including(passes)
            points.append(point)
        known = asked(first)
        begin(study, known, points)
        return known
    wanted = known.space if space is None else space
    for passes in start:
        wanted, _ = wanted.including(passes)
    check_same(known, asked(wanted), study.study_name)
    return known


def _standard(
    model: nn.Module, inputs: Any, calibration: Iterable[Any] | None, say: Progress
) -> Space:
    tensors = (*model.parameters(), *model.buffers())
    device = Device.describe(next((t.device for t in tensors), torch.device("cpu")))
    if calibration is None:
        return standard_space(device, False)
    costly: tuple[str, ...] = ()
    if multiplies_int8(device):
        costly = costly_linears(model, inputs, calibration, say)
    return standard_space(device, True, costly)


def _opened(
    url: str | None,
    name: str,
    sampler: optuna.samplers.BaseSampler,
    objectives: tuple[str, ...],
) -> optuna.Study:
    import optuna

    return optuna.create_study(
        storage=open_storage(url),
        study_name=name,
        directions=["minimize"] * len(objectives),
        sampler=sampler,
        load_if_exists=True,
    )


@contextmanager
def _kept_at(storage: str | Path | None, workers: int) -> Iterator[str | None]:
    """The URL of the storage; workers without one share a temporary file."""
    if storage is not None or workers == 1:
        yield storage_url(storage)
        return
    with tempfile.TemporaryDirectory(prefix="fxopt-search-") as folder:
        yield storage_url(Path(folder) / "study.db")


def _check_options(
    model: nn.Module, direction: str, tolerance: float, trials: int, workers: int
) -> None:
    if direction not in ("maximize", "minimize"):
        raise SearchError(f"direction={direction!r}: must be 'maximize' or 'minimize'")
    if not tolerance >= 0:
        raise SearchError(
            f"tolerance={tolerance!r}: give how much of the metric may be lost, 0 or more"
        )
    for name, value in (("trials", trials), ("workers", workers)):
        if not isinstance(value, int) or value < 1:
            raise SearchError(f"{name}={value!r}: give a whole number from 1 on")
    if model.training:
        raise SearchError(
            "the model is in training mode, in which its metric is random: call model.eval() first"
        )


def _check_repeatable(data: Any, calibration: Any) -> None:
    for name, given in (("data", data), ("calibration", calibration)):
        if isinstance(given, Iterator):
            raise SearchError(
                f"{name}= is read in every trial, and a {type(given).__name__} can be read once: "
                "give a list or a DataLoader"
            )


def _first_input(data: Any) -> Any:
    first = next(iter(data), None) if isinstance(data, Iterable) else None
    if isinstance(first, (Tensor, tuple, Mapping)):
        return first
    raise SearchError(
        "inputs= was left out, and data has no first item that a model could be called with (a "
        "tensor, a tuple of positionals or a dict of keywords): give inputs="
    )
