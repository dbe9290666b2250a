"""The ending: the whole list judged against the original, its cost measured, the report written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fxopt.errors import FxoptError
from fxopt.eval_graph import evaluation_mode, without_dropout
from fxopt.graph_modules import graph_module
from fxopt.optimized import Evaluation, Optimized, Origins, PipelineResult, Source
from fxopt.pipeline.domains import domain_of
from fxopt.pipeline.evaluation import Evaluator
from fxopt.pipeline.result import Result
from fxopt.pipeline.run import Judging, Run
from fxopt.program import Changes, Program
from fxopt.verify import is_random


def finished(run: Run, judging: Judging, measure_cost: bool | None) -> PipelineResult:
    """What the run hands over. `measure_cost` left out measures where the list was lowered.

    Raises `EquivalenceError` where the whole list is over its budget.
    """
    program = run.program if run.lowering else run.program.materialized()
    module = run.module or graph_module(program)
    run = run.noting(*_note_on_calibration(program))
    origins = _origins(run)
    if origins is not None:
        run = run.noting(
            f"weights were derived from {len(origins)} tensors of the original: once one of "
            "these is changed in place, calls raise ModelError; transform again then"
        )
    run, evaluation = _evaluation(run, program, judging)
    program = replace(program, changes=Changes(), notes=run.notes, calibration=None, choices=None)
    result = Result(program, module, run.compiled)
    end_to_end = _judged(run, result, judging) if judging.verify else None
    steps = tuple(step.record for step in run.steps)
    report = result.reported(run.reference.captured, run.capture_ms, steps, end_to_end)
    report = replace(report, domains=(domain_of(program, (*run.trials, *run.last_trials)),))
    if measure_cost or (measure_cost is None and run.lowering is not None):
        judging.progress("measuring latency and memory")
        report = result.with_cost(report, run.model)
    config = program.config
    return PipelineResult(
        program,
        report,
        run.steps,
        run.lowering,
        run.compiled,
        module,
        None if config is getattr(run.model, "config", None) else config,
        evaluation=evaluation,
        origins=origins,
        claim=judging.budget or (None if run.reference.oracle else run.reference.budget),
    )


def with_source(
    result: PipelineResult,
    model: nn.Module,
    further: Callable[[nn.Module, Any], PipelineResult],
    most: int,
) -> PipelineResult:
    """`result` with where more programs of `model` come from: `further`, up to `most` in all."""
    report = replace(result.report, most_programs=most)
    return replace(result, report=report, source=Source.of(model, result.program, further, most))


def _note_on_calibration(program: Program) -> tuple[str, ...]:
    if program.calibration is None or program.calibration.was_read:
        return ()
    return (
        "calibration= was given, but no pass of the list asked for it: none of them "
        "learns from inputs with these options",
    )


def _origins(run: Run) -> Origins | None:
    """The original's tensors from which passes derived others, but for what calls write, which
    is copied anyway, and in training for what the result itself trains."""
    captured, program = run.reference.captured, run.program
    kept = {id(tensor) for tensor in program.state.values()} if program.mode == "train" else ()
    taken = {
        name: tensor
        for name, tensor in captured.state.items()
        if name in program.taken - captured.written
        and isinstance(tensor, Tensor)
        and id(tensor) not in kept
    }
    earlier = run.model.origins if isinstance(run.model, Optimized) else None
    return Origins(taken, earlier) if taken or earlier else None


def _evaluation(run: Run, program: Program, judging: Judging) -> tuple[Run, Evaluation]:
    """What the model computes in evaluation, where `program` trains; or why that isn't had."""
    if program.mode == "eval":
        return run, Evaluation()
    judging.progress("capturing the evaluation graph")
    captured = replace(run.reference.captured, calibration=None, choices=None)
    kept = (name for name, one in captured.state.items() if program.state.get(name) is one)
    evaluator = Evaluator(run.model, captured, run.applied, frozenset(kept), run.joined)
    held = run.reference if judging.budget is None else run.reference.original()
    judged = held.oracle is None and judging.verify
    budget = (judging.budget or held.budget) if judged else None
    try:
        found, missing = evaluator.program(run.inputs, program, budget), ""
    except FxoptError as error:
        found, missing = None, str(error)
        run = run.noting(f"opt.eval() is refused: {missing}")
    return run, Evaluation(found, missing, evaluator.for_call)


def _judged(run: Run, result: Result, judging: Judging) -> str:
    """The end-to-end verdict, against the original where the user set a budget."""
    held = run.reference if judging.budget is None else run.reference.original()
    known = run.outputs
    if held.redrawn:
        program, known = evaluation_mode(without_dropout(result.program)), []
        result = replace(result, program=program, compiled=None)
    elif is_random(result.program):
        # Compiled code draws other numbers; what it computes has been judged without dropout.
        result = replace(result, compiled=None)
    return result.judged(judging.budget, held, (*run.trials, *run.last_trials), known)
