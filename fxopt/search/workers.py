"""Several processes on one storage, each a worker of its own; the parent watches."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

import torch

from fxopt.errors import SearchError
from fxopt.search.found import TrialRecord
from fxopt.search.interrupts import held_back
from fxopt.search.judging import Task
from fxopt.search.quiet import Turns
from fxopt.search.signs_of_life import put_back_dead
from fxopt.search.storage import open_storage, quiet_optuna
from fxopt.search.study import known_terms, records
from fxopt.search.worker import Budget, Worker, make_sampler

if TYPE_CHECKING:
    import optuna

_POLL_SECONDS = 0.5
_FAREWELL_SECONDS = 30.0


@dataclass(frozen=True)
class Job:
    """What a worker's process is started with."""

    task: Task
    url: str
    study: str
    budget: Budget
    seed: int
    threads: int


def run_workers(
    job: Job,
    count: int,
    study: optuna.Study,
    tell: Callable[[TrialRecord], None],
) -> tuple[bool, list[str]]:
    """Run `count` processes until they end; whether none was interrupted, and what to note.

    `tell` gets the record of each trial that ends meanwhile. Raises `SearchError` where the job
    can't be sent to another process.
    """
    context = multiprocessing.get_context("spawn")
    jobs = [_pickled(job, index) for index in range(count)]
    processes = [context.Process(target=work, args=(one,), daemon=True) for one in jobs]
    known = {record.number for record in records(study) if record.counts}
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            time.sleep(_POLL_SECONDS)
            put_back_dead(study)
            _tell_new(study, known, tell)
        finished = True
    except KeyboardInterrupt:
        finished = False
        with suppress(KeyboardInterrupt):
            _ask_to_end(processes)
    finally:
        with suppress(KeyboardInterrupt), held_back():
            _end(processes)
            put_back_dead(study)
    _tell_new(study, known, tell)
    dead = [process.exitcode for process in processes if process.exitcode]
    notes = [f"a worker died (exit code {code}); its trial is in the queue again" for code in dead]
    return finished, notes if finished else []


def work(pickled: bytes) -> None:
    """One worker's process, from its start to its end."""
    import optuna

    job: Job = pickle.loads(pickled)
    torch.set_num_threads(job.threads)  # as the parent, or timings couldn't be compared
    with quiet_optuna():
        storage = open_storage(job.url)
        sampler = make_sampler(len(job.task.objectives), job.budget.trials, job.seed)
        study = optuna.load_study(study_name=job.study, storage=storage, sampler=sampler)
        terms = known_terms(study)
        assert terms is not None
        turns = Turns(f"{job.url} {job.study}")
        Worker(study, job.task, terms.space, job.budget, turns, job.seed).run()


def _pickled(job: Job, index: int) -> bytes:
    try:
        return pickle.dumps(replace(job, seed=job.seed + index))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SearchError(
            f"workers= starts processes, and model, data and metric can't be sent to them: {error}."
            " Define the metric at the top of a module, not as a lambda, or leave workers out"
        ) from error


def _tell_new(study: optuna.Study, known: set[int], tell: Callable[[TrialRecord], None]) -> None:
    for record in records(study):
        if record.counts and record.number not in known:
            known.add(record.number)
            tell(record)


def _ask_to_end(processes: Sequence[BaseProcess]) -> None:
    """Stop the processes as Ctrl-C does, and wait for them to put their trials back."""
    living = [process for process in processes if process.is_alive() and process.pid]
    for process in living:
        with suppress(ProcessLookupError):
            _interrupt(process)
    until = time.monotonic() + _FAREWELL_SECONDS
    for process in living:
        process.join(max(until - time.monotonic(), 0.1))


def _end(processes: Sequence[BaseProcess]) -> None:
    """End the processes that are still there; their trials are those of dead workers."""
    for process in processes:
        if process.is_alive():
            process.terminate()
            process.join()


def _interrupt(process: BaseProcess) -> None:
    if os.name == "posix" and process.pid is not None:
        os.kill(process.pid, signal.SIGINT)
