"""What `Optimized.save` wrote becomes a module again."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from fxopt.errors import FxoptError, SaveError
from fxopt.lower import Lowering
from fxopt.optimized.configs import read_config, read_generation_config
from fxopt.optimized.optimized import Optimized, optimized_like
from fxopt.optimized.pipeline_result import Evaluation, PipelineResult
from fxopt.pass_list import parse_passes
from fxopt.report import Report
from fxopt.rewriting import Pass
from fxopt.saving import load as read


def load(folder: str | Path, *, namespaces: Collection[str] = ()) -> Optimized:
    """The module that `Optimized.save` wrote; lowered as it was, at its first call.

    Nothing found in the folder is executed; `namespaces` are those of a user's own operators that
    the graph may call. Raises `SaveError` for a damaged, truncated, hostile or foreign folder.
    """
    saved = read(folder, namespaces=namespaces)
    if saved.report_json is None:
        raise SaveError(f"{folder} holds no report; save the module with its save method")
    lowering = None
    for pass_ in _passes(saved.lowering or "", folder):
        if not isinstance(pass_, Lowering):
            raise SaveError(f"{folder} names {pass_!r} as its lowering; only Lower can be one")
        lowering = pass_
    program = saved.program
    carried = {} if saved.config is None else {"config": read_config(saved.config, folder)}
    base = Optimized
    if saved.generation is not None:
        from fxopt.optimized.generating import POSITIONS  # it needs transformers
        from fxopt.optimized.generators import generator_called

        base = generator_called(saved.generation.get("kind", "decoder"), folder)
        carried["generation_config"] = read_generation_config(saved.generation, folder)
        positions = saved.generation.get("positions")
        carried[POSITIONS] = positions if positions in ("slots", "seen") else "unknown"
    twin = optimized_like(program.name, program.signature.forward, carried, base=base)
    report = Report.from_json(saved.report_json)
    known = replace(report, domains=())  # those of all programs are in the one report
    further = tuple(PipelineResult(one, known, (), lowering) for one in saved.further)
    evaluation = Evaluation.saved(saved.evaluation)
    outcome = PipelineResult(program, report, (), lowering, evaluation=evaluation, further=further)
    try:
        twin.install(outcome)
    except Exception as error:  # names of tensors that can't stand beside one another, and the like
        reason = f"{type(error).__name__}: {error!s:.200}"
        raise SaveError(f"{folder} holds a program that makes no module: {reason}") from error
    return twin


def _passes(spec: str, folder: str | Path) -> tuple[Pass, ...]:
    try:
        return parse_passes(spec)
    except FxoptError as error:
        raise SaveError(f"{folder} names a lowering that can't be read: {error!s:.200}") from error
