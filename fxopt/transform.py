"""The pipeline: capture, then plan, apply, check and judge each pass, lower, measure, report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from fxopt.calls import Inputs, bind, check_batches, forward_signature, generates
from fxopt.capture import callers_modes_off, check_is_module, uncompiled
from fxopt.choices import Choices
from fxopt.claim import Claim, Close
from fxopt.errors import CalibrationError, ModelError, NotCapturedError, PassError
from fxopt.interpreter import fork_rng
from fxopt.optimized import MOST_PROGRAMS, Optimized, PipelineResult, make_optimized
from fxopt.pass_list import resolve_passes, scheduled
from fxopt.pass_registry import AUTO
from fxopt.passes import QuantizeCache
from fxopt.pipeline import Judging, OnViolation, Run, captured, completed, with_source
from fxopt.program import Mode, check_mode
from fxopt.progress import Progress, silent
from fxopt.recommendation import Recommendation, recommend
from fxopt.verify import compose

if TYPE_CHECKING:
    from fxopt.generation import GenerationPlan

UNCOMPILED = (
    "torch.compile's wrapper was taken off, and the model in it transformed; with Lower() at the "
    "end of the list the result is compiled too"
)

NO_CACHE = (
    "QuantizeCache has no cache here: it is for a causal language model that goes on to generate, "
    "transformed without example_inputs or with generation=True"
)


def transform(
    model: nn.Module,
    passes: str | Iterable[Any],
    *,
    example_inputs: Inputs | None = None,
    calibration: Iterable[Inputs] | None = None,
    mode: Mode = "eval",
    verify: bool = True,
    verify_inputs: Sequence[Inputs] = (),
    on_violation: OnViolation = "raise",
    budget: Claim | None = None,
    measure_cost: bool | None = None,
    progress: Progress | None = None,
    recapture: Literal["auto", "error"] | int = "auto",
    generation: bool | None = None,
) -> Optimized:
    """A cheaper module in place of `model`, every step of its making shown to be equivalent.

    `passes` are pass or rule instances or textual specs, run in order; "auto" takes those that
    `fxopt.recommend` gives, and the report says why. `example_inputs` (a tensor,
    a tuple of positionals or a dict of keywords) may be left out where a transformers config tells
    what they are; else the capture waits for the first call. Each pass is judged on the example, on
    another size and on `verify_inputs`, against its predecessor; the whole list once more, on one
    size more, against the eager original, within `budget` (left out: the sum of the claims). A
    broken claim raises `EquivalenceError`, or with `on_violation="revert"` undoes the change at the
    guilty nodes.

    `calibration` is an iterable of inputs, each as `example_inputs` takes them, from which passes
    learn the ranges of values; it is streamed, so its length costs time and no memory. A list or
    DataLoader is iterated once for each pass that learns, and must give the same batches each time;
    a generator is read once and kept in a temporary file. Left out, the example stands in.

    `measure_cost` times original and result and reads their peak memory; left out, it does so when
    the list ends in `Lower`. `progress` is called with a line before each long step.

    `model` is never modified; tensors that no pass touches are shared with it. With `mode="train"`
    dropout and batch statistics stay in the graph and the result trains: `train()` and `eval()`
    switch it. It trains the parameters that it shares with `model`; running statistics are its own.
    `example_inputs` must hold what the loss needs (`labels`), and later calls the same arguments.

    A graph holds for the sizes for which the model's Python code takes the branches of the example.
    A later call for which it takes others is answered by a further program, captured from `model`
    at that call, with the same passes and judged alike: as many as `recapture` says, 8 with "auto".
    With "error" such a call raises an `InputError` that names the relation and the line.

    A causal language model of transformers goes on to generate: `opt.generate(...)` and pipelines
    take the result, over one program that reads many tokens and one that reads one, both rewritten
    by `passes`. `example_inputs`, `verify_inputs` and `calibration` are texts then, `input_ids` and
    `attention_mask`; left out, the model writes some. So does a model with an encoder and a
    decoder, whose source they are (for Whisper `input_features`), with two programs more, which run
    once a source. `generation` left out does so where no `example_inputs` are given; True demands
    it, False captures a single call without a cache.

    Raises `ModelError`, `InputError`, `CalibrationError`, `CaptureError`, `PassError`,
    `EquivalenceError`, `LowerError`: see `fxopt.errors`.
    """
    check_is_module(model)
    given, model = model, uncompiled(model)
    was_compiled = given is not model
    if on_violation not in ("raise", "revert"):
        raise PassError(f"on_violation={on_violation!r}: must be 'raise' or 'revert'")
    check_mode(mode)
    if calibration is not None:
        check_batches(calibration, "calibration=", CalibrationError)
    most = _most_programs(recapture)
    listed = () if _is_auto(passes) else resolve_passes(passes)
    plan, missing = _generation_plan(model, example_inputs, generation, mode)
    rounds_cache = any(isinstance(one, QuantizeCache) for one in listed)
    if rounds_cache and plan is None:
        missing = (*missing, NO_CACHE)
    resized: Sequence[Inputs] = ()
    if plan is not None:
        plan = plan.with_int8_cache() if rounds_cache else plan
        resized = plan.resized() if verify else ()
        model, example_inputs = plan.present(), plan.many()
        verify_inputs = [plan.one(), *(step for one in verify_inputs for step in plan.steps(one))]
        calibration = plan.batches(calibration)
    others = () if plan is None else plan.others()
    advised = _advised(model, passes, example_inputs, calibration, mode)
    resolved = listed if advised is None else resolve_passes(advised.passes)
    schedule = scheduled(resolved, mode)
    choices = Choices()
    judging = Judging(verify, on_violation, budget, progress or silent)
    notes = [*([UNCOMPILED] if was_compiled else []), *missing]
    if advised is not None:
        notes += advised.notes()
        for line in advised.lines():
            judging.progress(line)

    def run_of(
        model: nn.Module, inputs: Inputs | None, batches: Iterable[Inputs] | None, further: bool
    ) -> Run:
        more: Sequence[Inputs] = verify_inputs
        smaller = resized
        if plan is not None and isinstance(inputs, Mapping):
            more, smaller = (list(plan.alike(inputs, one)) for one in (more, resized))
            batches = None if batches is None else plan.alike(inputs, batches)
        return captured(
            model,
            inputs,
            mode,
            judging,
            more=more,
            resized=smaller,
            calibration=batches,
            notes=notes,
            further=further,
            choices=choices,
        )

    def result_of(run: Run, cost: bool | None) -> PipelineResult:
        result = completed(run, schedule, judging, cost)
        result = with_source(result, run.model, further, most)
        if plan is not None and result.source is not None:
            return replace(result, source=replace(result.source, model=plan.step))
        return result

    def further(model: nn.Module, inputs: Inputs) -> PipelineResult:
        with callers_modes_off(), fork_rng():
            return result_of(run_of(model, inputs, _again(calibration), True), False)

    def build(inputs: Inputs | None) -> PipelineResult:
        with callers_modes_off(), fork_rng():
            run = run_of(model, inputs, calibration, False)
            if run.elsewhere and most == 1:
                raise run.elsewhere[0][1]
            result = result_of(run, measure_cost)
            inputs_of_others = (*(one for one, _ in run.elsewhere), *others)
            return replace(result, further=tuple(further(model, one) for one in inputs_of_others))

    def build_at_first_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> PipelineResult:
        if not kwargs:
            return build(args)
        return build(bind(forward_signature(model), args, kwargs))

    base, more = (Optimized, {}) if plan is None else _generating(plan)
    optimized = make_optimized(model, build_at_first_call, base, more)
    try:
        optimized.install(build(example_inputs))
    except NotCapturedError:
        if example_inputs is not None:
            raise
    if plan is not None and verify:
        _prove_generation(plan, optimized, judging)
    return optimized


def _generating(plan: GenerationPlan) -> tuple[type[Optimized], dict[str, Any]]:
    """The class of modules that generate, which needs transformers, and what they carry."""
    from fxopt.optimized.generating import POSITIONS
    from fxopt.optimized.generators import generator_of

    return generator_of(plan), {POSITIONS: plan.positions}


def _prove_generation(plan: GenerationPlan, optimized: Any, judging: Judging) -> None:
    """Judge the steps one after the other against the original, and say so in the report."""
    from fxopt.generation import is_int8, teacher_forced

    judging.progress("reading text token by token")
    claim = optimized.claim
    if claim is not None and judging.budget is None:
        claim = compose((Close(), claim))  # steps add up in another order than the whole text
    if is_int8(plan.shapes):  # on the whole text a module with such a cache rounds nothing
        original: Any = plan.model()
        known = original.claim
        claim = None if claim is None or known is None else compose((known, claim))
    optimized.note(str(teacher_forced(plan, optimized, claim)))


def _generation_plan(
    model: nn.Module, prompts: Inputs | None, wanted: bool | None, mode: Mode
) -> tuple[GenerationPlan | None, tuple[str, ...]]:
    """How `model` is read step by step, if it is; else why not, where nobody asked."""
    can = generates(model)
    if wanted is True and mode == "train":
        raise PassError("generation=True is for mode='eval': what trains is called once a batch")
    if wanted is True and not can:
        raise PassError(
            "generation=True needs a model of transformers that generates, and "
            f"{type(model).__name__} doesn't: leave it out"
        )
    if wanted is False or not can or mode == "train" or (wanted is None and prompts is not None):
        return None, ()
    from fxopt.generation import generation_plan  # it needs transformers

    try:
        return generation_plan(model, prompts), ()
    except ModelError as error:
        if wanted:
            raise
        return None, (f"this module doesn't generate: {error}",)


def _is_auto(passes: object) -> bool:
    return isinstance(passes, str) and passes.strip() == AUTO


def _advised(
    model: nn.Module,
    passes: object,
    example_inputs: Inputs | None,
    calibration: Iterable[Inputs] | None,
    mode: Mode,
) -> Recommendation | None:
    """What `passes="auto"` stands for; None for any other list."""
    if not _is_auto(passes):
        return None
    if isinstance(model, Optimized):
        raise PassError(
            'passes="auto" chooses for a model as it was written, and this one is transformed '
            "already: give the original, or the passes that are to be added"
        )
    return recommend(model, example_inputs, calibrated=calibration is not None, mode=mode)


def _most_programs(recapture: object) -> int:
    """How many programs a module may hold in all."""
    if recapture in ("auto", "error"):
        return MOST_PROGRAMS if recapture == "auto" else 1
    if type(recapture) is not int or recapture < 1:
        raise PassError(
            f"recapture={recapture!r}: must be 'auto', 'error' or how many programs there may be"
        )
    return recapture


def _again(calibration: Iterable[Inputs] | None) -> Iterable[Inputs] | None:
    """The calibration inputs where they can be iterated a second time."""
    once = calibration is not None and iter(calibration) is calibration
    return None if once else calibration
