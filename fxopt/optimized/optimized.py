"""Optimized: the module that takes the original's place.

Same signature, same output type, same state names for what no pass touched. It holds the program
as a graph module whose parameters are its own, so `state_dict`, `.to` and `torch.compile` see them.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fxopt.analyses.channels import Channels, channels
from fxopt.calls import bind, forward_signature, spread
from fxopt.errors import InputError, ModelError, NotCapturedError
from fxopt.eval_graph import evaluation_mode
from fxopt.graph_modules import attribute, graph_module, hold, share_tables
from fxopt.graph_text import GraphText
from fxopt.lower import Lowering
from fxopt.optimized.configs import saved_config
from fxopt.optimized.execution import Execution
from fxopt.optimized.members import Member, present_tensors
from fxopt.optimized.origins import Origins
from fxopt.optimized.pickling import Pickled, pickled
from fxopt.optimized.pipeline_result import OptimizedStep, PipelineResult
from fxopt.optimized.programs import Programs, beside
from fxopt.program import Mode, Program
from fxopt.report import Report
from fxopt.saving import save

_CARRIED_FROM_CLASS = (
    "main_input_name",
    "base_model_prefix",
    "input_modalities",
    "_keys_to_ignore_on_save",  # transformers.Trainer reads it when it resumes
)

_MOST_EVALUATIONS = 8
"""Sets of arguments, beside the example's, that a module is evaluated with: each is a capture."""


class Optimized(nn.Module):
    """An optimised model. Call it as you called the original.

    `graph` is the printable rewritten graph, `report` what was done and measured, `steps` the
    record and graph of each step, `program` the program itself. A program captured in eval mode
    is for inference: it runs without recording gradients.

    One captured with mode="train" trains. `train()` and `eval()` switch between the graph as it was
    captured and its evaluation graph, which computes what the original computes in eval mode; both
    run over the same tensors. In evaluation a call may leave out arguments that the training graph
    takes, such as labels: the original is captured for it then. `graph`, `program` and `save` are
    those of the present mode, so that `fxopt.transform(opt.eval(), ...)` goes on from the trained
    model. Parameters that no pass touched are the original's own: training this module trains the
    original, but for buffers that a call writes (running statistics), which are copies.
    `model.load_state_dict(opt.state_dict())` brings all of it back where no pass replaced a
    weight. Move the module to its device before an optimizer is made over its parameters: there it
    gets parameters of its own.
    """

    def __init__(
        self, carried: dict[str, Any], build: Callable[..., PipelineResult] | None = None
    ) -> None:
        super().__init__()
        object.__setattr__(self, "_carried", carried)
        object.__setattr__(self, "_build", build)
        object.__setattr__(self, "_outcome", None)
        object.__setattr__(self, "_execution", None)
        object.__setattr__(self, "_evaluations", {})
        object.__setattr__(self, "_programs", None)
        object.__setattr__(self, "_wanted", None)  # what train() and eval() asked for last
        self.training = False

    @property
    def is_captured(self) -> bool:
        """Whether the graph exists; without example inputs it does after the first call."""
        return self._outcome is not None

    @property
    def graph(self) -> GraphText:
        """The rewritten graph: `print(opt.graph)`, `opt.graph.diff(opt.steps[0].graph)`."""
        return GraphText(self._in_mode(self._done().program).outline())

    @property
    def program(self) -> Program:
        """The rewritten program over this module's present tensors."""
        return self._in_mode(self._present())

    @property
    def channels(self) -> Channels:
        """Which axes of the parameters are the same channels: what can be cut, and what can't."""
        return channels(self.program)

    @property
    def report(self) -> Report:
        """What every pass did, refused, claimed and measured; which calls each program takes."""
        report = self._done().report
        further = [one.outcome.report.domains for one in self._programs.valid()]
        return replace(report, domains=sum(further, report.domains)) if further else report

    @property
    def steps(self) -> tuple[OptimizedStep, ...]:
        """Every step with its graph, capture first."""
        return self._done().steps

    @property
    def lowering(self) -> Lowering | None:
        """How the program was lowered; None if it runs as it is."""
        return self._done().lowering

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        tensors = itertools.chain(self.parameters(), self.buffers())
        return next((t.device for t in tensors), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point tensor of the state."""
        floating = (t.dtype for t in self._tensors() if t.is_floating_point())
        return next(floating, torch.get_default_dtype())

    @property
    def origins(self) -> Origins | None:
        """The tensors of the original that passes derived others from; None where there are none.

        `origins.check()` raises `ModelError` where one of them was changed since.
        """
        return self._outcome.origins if self._outcome is not None else None

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss takes `num_items_in_batch`; transformers.Trainer asks before it calls.

        It does if the example inputs held it, whatever else the original's `**kwargs` takes.
        """
        return "num_items_in_batch" in self._done().program.signature.names

    def install(self, outcome: PipelineResult) -> None:
        """Take over a finished pipeline; called once by `transform` and `load`."""
        module = outcome.module or graph_module(outcome.program)
        evaluation = outcome.evaluation.program
        if evaluation is not None:
            hold(module, evaluation)
        execution = Execution(
            outcome.program, module, outcome.lowering, outcome.compiled, evaluation
        )
        outcome = replace(outcome, module=module)
        object.__setattr__(self, "_outcome", outcome)
        object.__setattr__(self, "_programs", Programs(outcome))
        object.__setattr__(self, "_execution", execution)
        object.__setattr__(self, "_evaluations", {})  # of other arguments, by their names
        object.__setattr__(self, "_build", None)  # it holds the original model
        if outcome.config is not None:
            self._carried["config"] = outcome.config
        # One set of tables for both: whatever moves or replaces a tensor here moves it there.
        share_tables(self, module)
        self.training = outcome.program.mode == "train" and self._wanted is not False
        for one in outcome.further:
            self._programs.add(one)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs for the model's arguments, in the model's own output type.

        A call for which the model takes another branch is answered by another program, captured at
        the first such call. Raises `InputError` when the arguments fit none and none can be made,
        and `ModelError` when a tensor of the original from which passes derived others was changed
        in place since.
        """
        if self._outcome is None:
            self.install(self._build(args, kwargs))
        self._check_origins()
        return self._answer(args, kwargs)

    def _answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The outputs, once it is known that the original hasn't changed."""
        execution, mode = self._execution, self._mode
        if mode != execution.program.mode:
            self._check_evaluation()
            execution = self._execution_for(args, kwargs)
        signature = execution.signature(mode)
        try:
            leaves = signature.flatten(args, kwargs)
        except InputError as refused:
            return self._programs.run(mode, args, kwargs, refused)
        return signature.unflatten(execution.run(mode, leaves))

    def _execution_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Execution:
        """The evaluation of a call's arguments: that of the example's, or one captured for it."""
        execution: Execution = self._execution
        signature, make = execution.signature("eval"), self._done().evaluation.make
        if make is None:
            return execution
        given = bind(signature.forward, args, kwargs, spelled_out=signature.names)
        names = frozenset(given) | frozenset(signature.constants) | frozenset(signature.zeros)
        if names == set(signature.names):
            return execution
        others: dict[frozenset[str], Execution] = self._evaluations
        if names not in others:
            if len(others) == _MOST_EVALUATIONS:
                raise InputError(
                    f"this module was evaluated with {_MOST_EVALUATIONS} other sets of arguments "
                    f"already; ({', '.join(given)}) is one too many. Call it in fewer ways."
                )
            found = make(args, kwargs, self._present())
            hold(execution.modules[execution.program.mode], found)
            others[names] = execution.evaluating(found)
        return others[names]

    @property
    def programs(self) -> tuple[Program, ...]:
        """All programs over their present tensors: the first, then those of other branches."""
        further = [one.in_mode(self._mode) for one in self._programs.valid()]
        return (self.program, *further)

    def program_for(self, inputs: Any) -> Program:
        """The one of `programs` that answers a call with `inputs`, or the first.

        They are a tensor, a tuple of positionals or a dict of keywords.
        """
        call = spread(inputs)
        found = next((one for one in self._programs.valid() if one.answers(*call)), None)
        return self.program if found is None else found.in_mode(self._mode)

    def save(self, folder: str | Path) -> None:
        """Write programs, tensors and report to `folder`; `fxopt.load(folder)` reads them back.

        The program is that of the present mode: saved in evaluation mode it is for inference alone.
        Holds no code and no pickle. Raises `SaveError` where something can't be saved, before
        `folder` is changed. A config that transformers doesn't register is left out.
        """
        outcome = self._done()
        lowering = outcome.lowering.spec if outcome.lowering is not None else None
        report = self.report.to_json()
        config = saved_config(getattr(self, "config", None))
        save(
            self.program,
            folder,
            lowering=lowering,
            report_json=report,
            config=config,
            further=[one.in_mode(self._mode) for one in self._saved_members()],
            evaluation=self._apart() if self.training else None,
            generation=self._generation(),
        )

    def train(self, mode: bool = True) -> Optimized:
        """Switch to the training graph, or with `False`, as `eval()` does, to the evaluation graph.

        Only a program captured with mode="train" can train. Raises `ModelError` otherwise.
        """
        captured_in = self._outcome.program.mode if self._outcome is not None else None
        if mode and captured_in == "eval":
            raise ModelError(
                "this program was captured in eval mode and can't train: its dropout is gone "
                "and its "
                'norms are folded. Use fxopt.transform(model, ..., mode="train").'
            )
        if not mode and captured_in == "train":
            self._check_evaluation()
            self._execution.module("eval")  # derived here: a tracer of forward couldn't
        object.__setattr__(self, "_wanted", mode)
        return super().train(mode)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse what transformers.Trainer may ask for: raises `ModelError`."""
        raise ModelError(
            "a captured graph can't switch gradient checkpointing on: its module boundaries are "
            "gone. Train with gradient_checkpointing=False; Lower() recomputes what is cheap."
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            carried = self.__dict__.get("_carried", {})
            if name in carried:
                return carried[name]
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimized:
        program = self._present()
        state = {name: copy.deepcopy(tensor, memo) for name, tensor in program.state.items()}
        evaluation = self._done().evaluation.program
        if evaluation is not None:
            own = self._over_present(evaluation)
            kept = {name: copy.deepcopy(tensor, memo) for name, tensor in own.state.items()}
            evaluation = replace(own, state=kept)
        twin = type(self)(dict(self._carried))
        memo[id(self)] = twin
        object.__setattr__(twin, "_wanted", self.training)
        renewed = self._renewed(replace(program, state=state), evaluation)
        twin.install(replace(renewed, origins=None))
        members = self._programs.valid()
        programs = beside(twin._outcome, members, lambda tensor: copy.deepcopy(tensor, memo))
        object.__setattr__(twin, "_programs", programs)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        programs = [self._present(), *(one.program for one in self._saved_members())]
        outcome = replace(self._done(), report=self.report)
        made = pickled(programs, self._apart(), outcome, self._carried, self.training)
        return _unpickled, (made, type(self).__base__)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Optimized:
        self._done()
        probe = fn(torch.empty(0, dtype=torch.float32, device=self.device))
        if probe.dtype != torch.float32:
            raise ModelError(
                "the graph was captured and judged in its own dtype; convert the original model "
                "first and transform it again"
            )
        before, members = self.device, self._programs.valid()
        if probe.device != before:
            self._unshare()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.device != before:
            evaluation = self._done().evaluation.program
            if evaluation is not None:
                evaluation = self._over_present(evaluation).on_device(self.device)
            moved = self._renewed(self._present().on_device(self.device), evaluation)
            self.install(replace(moved, origins=None))
        device = self.device if self.device != before else None
        object.__setattr__(self, "_programs", beside(self._outcome, members, fn, device))
        return self

    def _unshare(self) -> None:
        """Parameters of its own over the same memory: moving them must not move the model's."""
        own: dict[nn.Parameter, nn.Parameter] = {}
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    twin = nn.Parameter(parameter.detach(), parameter.requires_grad)
                    twin.grad = None if parameter.grad is None else parameter.grad.detach()
                    module._parameters[name] = own.setdefault(parameter, twin)

    def _renewed(self, program: Program, evaluation: Program | None) -> PipelineResult:
        """The outcome with these programs, to be compiled again at its first call."""
        evaluated = replace(self._done().evaluation, program=evaluation)
        return replace(
            self._done(),
            program=program,
            module=None,
            compiled=None,
            evaluation=evaluated,
            further=(),
        )

    @property
    def _mode(self) -> Mode:
        return "train" if self.training else "eval"

    def _in_mode(self, program: Program) -> Program:
        if self.training:
            return program
        self._check_evaluation()
        evaluation = self._done().evaluation.program
        return evaluation_mode(program) if evaluation is None else self._over_present(evaluation)

    def _check_evaluation(self) -> None:
        missing = self._done().evaluation.missing
        if missing:
            raise ModelError(f"this module has no evaluation mode: {missing}")

    def _apart(self) -> Program | str | None:
        """The evaluation program where it doesn't follow from the training program, or why there is
        none."""
        evaluation = self._done().evaluation
        if evaluation.program is None:
            return evaluation.missing or None
        return self._over_present(evaluation.program)

    def _present(self) -> Program:
        """The program as it was captured, over the tensors that this module holds by now."""
        outcome = self._done()
        self._check_origins()
        return replace(outcome.program, state=present_tensors(outcome))

    def _over_present(self, program: Program) -> Program:
        module = self._done().module
        assert module is not None
        state = {name: attribute(module, name) for name in program.state}
        return replace(program, state=state)

    def _generation(self) -> dict[str, Any] | None:
        """How this module generates, as JSON; None where it answers single calls."""
        return None

    def _saved_members(self) -> list[Member]:
        """The further programs that are whole in what is saved of them."""
        return [one for one in self._programs.valid() if one.follows or not self.training]

    def _check_origins(self) -> None:
        """Raise `ModelError` where the original has changed under what was derived from it."""
        origins = self._outcome.origins
        watches = origins is not None and not torch.compiler.is_compiling()
        if watches and not torch._C._len_torch_dispatch_stack():
            origins.check()

    def _done(self) -> PipelineResult:
        outcome: PipelineResult | None = self._outcome
        if outcome is None:
            raise NotCapturedError(
                "the graph doesn't exist yet: no example_inputs were given and none could be "
                "derived. Call the module once; the capture uses the inputs of that call."
            )
        return outcome

    def _tensors(self) -> Iterator[Tensor]:
        """Parameters and buffers, found as they are asked for: `generate` asks at each token."""
        return itertools.chain(self.parameters(), self.buffers())


def evaluation_of(optimized: Optimized, inputs: Any = None) -> Program:
    """What a training `optimized` computes in evaluation for calls like `inputs`.

    Those are a tensor, a tuple of positionals or a dict of keywords; left out, those of the example
    that it was captured with.
    """
    execution: Execution = optimized._execution
    if inputs is not None:
        execution = optimized._execution_for(*spread(inputs))
    return optimized._over_present(execution.evaluated())


def make_optimized(
    model: nn.Module,
    build: Callable[..., PipelineResult] | None = None,
    base: type[Optimized] = Optimized,
    more: Mapping[str, Any] | None = None,
) -> Optimized:
    """An empty `Optimized`, or `base`, with the attributes of `model`, and `more`, and its
    forward signature."""
    carried = {
        name: value
        for name, value in vars(model).items()
        if not name.startswith("_")
        and not isinstance(value, (nn.Module, Tensor))
        and name != "training"
    }
    for name in _CARRIED_FROM_CLASS:
        if hasattr(type(model), name):
            carried.setdefault(name, getattr(type(model), name))
    if isinstance(model, Optimized):
        carried = dict(model._carried)
    carried.update(more or {})
    return optimized_like(type(model).__name__, forward_signature(model), carried, build, base)


def _unpickled(made: Pickled, base: type[Optimized] = Optimized) -> Optimized:
    outcome = made.outcome()
    program = outcome.program
    carried = dict(made.carried)
    twin = optimized_like(program.name, program.signature.forward, carried, base=base)
    twin.install(outcome)
    return twin.train(made.training)


def optimized_like(
    name: str,
    signature: inspect.Signature,
    carried: dict[str, Any],
    build: Callable[..., PipelineResult] | None = None,
    base: type[Optimized] = Optimized,
) -> Optimized:
    """An empty `Optimized` named after `name` whose `forward` shows `signature`.

    It is of the class `base`; one with a forward of its own keeps it.
    """

    def forward(self: Optimized, *args: Any, **kwargs: Any) -> Any:
        return Optimized.forward(self, *args, **kwargs)

    forward.__signature__ = _with_self(signature)  # type: ignore[attr-defined]
    forward.__doc__ = Optimized.forward.__doc__
    members = {"forward": forward} if base.forward is Optimized.forward else {}
    kind: type[Optimized] = type(f"Optimized{name.removeprefix('Optimized')}", (base,), members)
    return kind(carried, build)


def _with_self(signature: inspect.Signature) -> inspect.Signature:
    receiver = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].kind is not inspect.Parameter.POSITIONAL_ONLY:
        receiver = receiver.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return signature.replace(parameters=[receiver, *parameters])
