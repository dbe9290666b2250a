"""The first stage: a model becomes a program, and the capture itself is judged."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

from torch import Tensor, nn

from fxopt import wellformed
from fxopt.analyses.precision import rounding_claim
from fxopt.calibration import Calibration
from fxopt.calls import Inputs
from fxopt.capture import normalize_inputs
from fxopt.choices import Choices
from fxopt.claim import Claim, Close
from fxopt.data_sizes import observe_sizes
from fxopt.errors import EquivalenceError, InputError, OutsideError
from fxopt.optimized import Optimized
from fxopt.pipeline.nested import capture_whole
from fxopt.pipeline.recording import StepTaken, since, violation_text
from fxopt.pipeline.reference import Reference
from fxopt.pipeline.run import Judging, Run
from fxopt.program import Changes, Mode, Program
from fxopt.verify import (
    Verdict,
    judge,
    judge_learning,
    note_on_attributes,
    output_names,
    run_model,
    run_program,
    trials,
    with_edges,
)


def captured(
    model: nn.Module,
    inputs: Inputs | None,
    mode: Mode,
    judging: Judging,
    *,
    more: Sequence[Inputs] = (),
    resized: Sequence[Inputs] = (),
    calibration: Iterable[Any] | None = None,
    notes: Sequence[str] = (),
    further: bool = False,
    choices: Choices | None = None,
) -> Run:
    """The run that begins with `model`, captured on `inputs`, or with the program that it is.

    It is judged on the inputs `more` as well, and on those of `resized` that are its own in place
    of the example at other sizes. A `further` program of a model is judged on those of `more` that
    are its own, and calibrated on the example where none of the batches is. `choices` are those of
    passes for the programs before it. Raises `EquivalenceError` where the capture computes
    something else than the model, and what `capture` raises.
    """
    run = captured_alone(model, inputs, mode, judging, more=more, resized=resized, further=further)
    return begun(
        run, judging, calibration=calibration, notes=notes, further=further, choices=choices
    )


def captured_alone(
    model: nn.Module,
    inputs: Inputs | None,
    mode: Mode,
    judging: Judging,
    *,
    more: Sequence[Inputs] = (),
    resized: Sequence[Inputs] = (),
    further: bool = False,
) -> Run:
    """What of `captured` depends on the model and its inputs alone: several runs can be `begun`
    with it."""
    judging.progress(f"capturing {type(model).__name__}")
    start = time.perf_counter()
    program = _program_of(model, inputs, mode, further)
    wellformed.check(program)
    capture_ms = since(start)
    if judging.verify:
        program = with_edges(program, run_model(model, program), known=_is_known(model))
    own, elsewhere = _sorted_inputs(program, more, further)
    other_sizes, _ = _sorted_inputs(program, resized, True)
    run = Run(
        model,
        inputs,
        program,
        Reference(program),
        capture_ms,
        notes=program.notes,
        elsewhere=elsewhere,
    )
    claim: Claim = Close()
    verdict = None
    if judging.verify:
        run, claim, verdict = _judged(run, own, other_sizes)
    fired = {"operations": program.node_count()}
    step = StepTaken("capture", "capture", program, program, claim, verdict, start, fired=fired)
    return run.recording(step, judging)


def begun(
    run: Run,
    judging: Judging,
    *,
    calibration: Iterable[Any] | None = None,
    notes: Sequence[str] = (),
    further: bool = False,
    choices: Choices | None = None,
) -> Run:
    """A run with what was captured alone: `calibration` is streamed to its passes, which find in
    `choices` what those before them chose, and its notes begin with `notes`."""
    run = replace(run, notes=(*notes, *run.notes))
    program = replace(run.program, choices=choices)
    if calibration is not None:
        instead = program.example if further else None
        given = Calibration(calibration, program.signature, judging.progress, instead)
        program = replace(program, calibration=given)
    return replace(run, program=program, reference=replace(run.reference, captured=program))


def _program_of(model: nn.Module, inputs: Inputs | None, mode: Mode, further: bool) -> Program:
    config = getattr(model, "config", None)
    if _is_known(model):
        program = model.program_for(inputs) if further else model.program
        program = replace(program, changes=Changes(), taken=frozenset(), config=config)
        observe_sizes(program)
        return program
    return replace(capture_whole(model, inputs, mode, empty=further), config=config)


def _is_known(model: nn.Module) -> TypeGuard[Optimized]:
    """Whether `model` has a program already."""
    return isinstance(model, Optimized) and model.is_captured


def _sorted_inputs(
    program: Program, more: Sequence[Inputs], further: bool
) -> tuple[list[list[Tensor]], tuple[tuple[Inputs, OutsideError], ...]]:
    """The tensors of those inputs that are this program's, and the others with the reason."""
    own: list[list[Tensor]] = []
    elsewhere: list[tuple[Inputs, OutsideError]] = []
    signature = program.signature
    for one in more:
        try:
            own.append(signature.flatten((), normalize_inputs(signature.forward, one)))
        except OutsideError as outside:
            elsewhere.append((one, outside))
        except InputError:
            if not further:
                raise
    return own, tuple(elsewhere)


def _judged(
    run: Run, own: Sequence[list[Tensor]], resized: Sequence[list[Tensor]]
) -> tuple[Run, Claim, Verdict]:
    """The run with its trials, the claim that the capture was held to, and the verdict."""
    program, model = run.program, run.model
    extra, others = (
        [[tensor.clone() for tensor in one] for one in all_] for all_ in (own, resized)
    )
    changed: set[str] = set()
    found, skipped = trials(program, run_model(model, program, changed), extra, others)
    if changed:
        run = run.noting(note_on_attributes(model, program, changed))
    # One other size a step keeps judging cheap; the whole list is judged on both.
    few = found[:-1] if len(found) == len(extra) + 3 else found
    run = replace(run, trials=few, last_trials=found[len(few) :]).noting(*skipped)
    reference = [trial.outputs for trial in found]
    rounding = rounding_claim(program)
    if rounding is not None:  # a quantized module, transformed once more
        # What comes now decides ties otherwise, and so differs as far as rounding goes.
        run = replace(
            run,
            unrounded=(rounding, reference[: len(few)]),
            reference=run.reference.plus(rounding),
        )
    claim = rounding or Close()
    # All of them now: a size at which the graph fails must not show at the end of the list.
    names = output_names(program)
    verdict, outputs = judge(claim, found, reference, run_program(program), names)
    if program.mode == "train" and verdict.holds and rounding is None:
        learnt = judge_learning(claim, model, program, few[0])
        verdict = learnt if learnt is not None and not learnt.holds else verdict
    if not verdict.holds:
        raise EquivalenceError(violation_text("the capture", verdict))
    return replace(run, outputs=outputs[: len(few)]), claim, verdict
