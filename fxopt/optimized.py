"""Optimized: the module that takes the original's place.

Same signature, same output type, same state names for what no pass touched. It holds the program
as a graph module whose parameters are its own, so `state_dict`, `.to` and `torch.compile` see them.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxopt.errors import ModelError, NotCapturedError, SaveError
from fxopt.graph_text import GraphText
from fxopt.lower import Lower
from fxopt.program import Program, materialize
from fxopt.report import Report, Step
from fxopt.saving import load as read
from fxopt.saving import save
from fxopt.signature import forward_signature
from fxopt.spec import parse_passes

_CARRIED_FROM_CLASS = ("main_input_name", "base_model_prefix", "input_modalities")


@dataclass(frozen=True)
class OptimizedStep:
    """One step as it was taken: its record and the graph after it."""

    record: Step
    graph: GraphText

    def __str__(self) -> str:
        return f"{self.record.spec}: {self.record.measured}"


@dataclass(frozen=True)
class Outcome:
    """What a finished pipeline hands to the module: program, record, and how to run it."""

    program: Program
    report: Report
    steps: tuple[OptimizedStep, ...]
    lowering: Lower | None = None
    compiled: Callable[..., Any] | None = None
    module: fx.GraphModule | None = None


class Optimized(nn.Module):
    """An optimised model. Call it as you called the original.

    `graph` is the printable rewritten graph, `report` what was done and measured, `steps` the
    record and graph of each step, `program` the program itself. A program captured in eval mode
    is for inference: it runs without recording gradients.
    """

    def __init__(
        self, carried: dict[str, Any], build: Callable[..., Outcome] | None = None
    ) -> None:
        super().__init__()
        object.__setattr__(self, "_carried", carried)
        object.__setattr__(self, "_build", build)
        object.__setattr__(self, "_outcome", None)
        self.training = False

    @property
    def is_captured(self) -> bool:
        """Whether the graph exists; without example inputs it does after the first call."""
        return self._outcome is not None

    @property
    def graph(self) -> GraphText:
        """The rewritten graph: `print(opt.graph)`, `opt.graph.diff(opt.steps[0].graph)`."""
        return GraphText(self._done().program.outline())

    @property
    def program(self) -> Program:
        """The rewritten program over this module's present tensors."""
        outcome = self._done()
        assert outcome.module is not None
        state = {name: _attribute(outcome.module, name) for name in outcome.program.state}
        return replace(outcome.program, state=state)

    @property
    def report(self) -> Report:
        """What every pass did, refused, claimed and measured."""
        return self._done().report

    @property
    def steps(self) -> tuple[OptimizedStep, ...]:
        """Every step with its graph, capture first."""
        return self._done().steps

    @property
    def lowering(self) -> Lower | None:
        """How the program was lowered; None if it runs as it is."""
        return self._done().lowering

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next((t.device for t in self._tensors()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point tensor of the state."""
        floating = (t.dtype for t in self._tensors() if t.is_floating_point())
        return next(floating, torch.get_default_dtype())

    def install(self, outcome: Outcome) -> None:
        """Take over a finished pipeline; called once by `transform` and `load`."""
        module = outcome.module or graph_module(outcome.program)
        object.__setattr__(self, "_outcome", replace(outcome, module=module))
        object.__setattr__(self, "_build", None)  # it holds the original model
        # One set of tables for both: whatever moves or replaces a tensor here moves it there.
        self._parameters = module._parameters
        self._buffers = module._buffers
        self._modules = module._modules
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        self.training = outcome.program.mode == "train"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs for the model's arguments, in the model's own output type.

        Raises `InputError` when the arguments don't fit what was captured.
        """
        if self._outcome is None:
            self.install(self._build(args, kwargs))
        outcome = self._outcome
        signature = outcome.program.signature
        run = outcome.compiled or outcome.module
        leaves = signature.flatten(args, kwargs)
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return signature.unflatten(run(*leaves))

    def save(self, folder: str | Path) -> None:
        """Write program, tensors and report to `folder`; `fxopt.load(folder)` reads them back.

        Holds no code and no pickle. Raises `SaveError` where something can't be saved.
        """
        outcome = self._done()
        lowering = outcome.lowering.spec if outcome.lowering is not None else None
        report = outcome.report.to_json()
        config: Any = getattr(self, "config", None)
        known = json.loads(config.to_json_string()) if hasattr(config, "to_json_string") else None
        save(self.program, folder, lowering=lowering, report_json=report, config=known)

    def train(self, mode: bool = True) -> Optimized:
        """Only a program captured with mode="train" can train. Raises `ModelError` otherwise."""
        if mode and self._outcome is not None and self._outcome.program.mode == "eval":
            raise ModelError(
                "this program was captured in eval mode and can't train: its dropout is gone "
                "and its "
                'norms are folded. Use fxopt.transform(model, ..., mode="train").'
            )
        return super().train(mode)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            carried = self.__dict__.get("_carried", {})
            if name in carried:
                return carried[name]
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimized:
        outcome = self._done()
        state = {name: copy.deepcopy(tensor, memo) for name, tensor in self.program.state.items()}
        program = replace(outcome.program, state=state)
        twin = type(self)(dict(self._carried))
        memo[id(self)] = twin
        twin.install(relowered(replace(outcome, program=program, module=None, compiled=None)))
        return twin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Optimized:
        outcome = self._done()
        probe = fn(torch.empty(0, dtype=torch.float32, device=self.device))
        if probe.dtype != torch.float32:
            raise ModelError(
                "the graph was captured and judged in its own dtype; convert the original model "
                "first and transform it again"
            )
        before = self.device
        if probe.device != before:
            self._unshare()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.device != before:
            program = replace(outcome.program, state=self.program.state).on_device(self.device)
            self.install(relowered(replace(outcome, program=program, module=None, compiled=None)))
        return self

    def _unshare(self) -> None:
        """Parameters of its own over the same memory: moving them must not move the model's."""
        own: dict[nn.Parameter, nn.Parameter] = {}
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    twin = nn.Parameter(parameter.detach(), parameter.requires_grad)
                    module._parameters[name] = own.setdefault(parameter, twin)

    def _done(self) -> Outcome:
        outcome: Outcome | None = self._outcome
        if outcome is None:
            raise NotCapturedError(
                "the graph doesn't exist yet: no example_inputs were given and none could be "
                "derived. Call the module once; the capture uses the inputs of that call."
            )
        return outcome

    def _tensors(self) -> Sequence[Tensor]:
        return [*self.parameters(), *self.buffers()]


def load(folder: str | Path, *, namespaces: Collection[str] = ()) -> Optimized:
    """The module that `Optimized.save` wrote; lowered as it was, at its first call.

    Nothing found in the folder is executed; `namespaces` are those of a user's own operators that
    the graph may call. Raises `SaveError` for a damaged, truncated, hostile or foreign folder.
    """
    saved = read(folder, namespaces=namespaces)
    if saved.report_json is None:
        raise SaveError(f"{folder} holds no report; save the module with its save method")
    lowering = None
    for pass_ in parse_passes(saved.lowering or ""):
        if not isinstance(pass_, Lower):
            raise SaveError(f"{folder} names {pass_!r} as its lowering; only Lower can be one")
        lowering = pass_
    program = saved.program
    carried = {} if saved.config is None else {"config": _config(saved.config, folder)}
    twin = optimized_like(program.name, program.signature.forward, carried)
    outcome = Outcome(program, Report.from_json(saved.report_json), (), lowering)
    twin.install(relowered(outcome))
    return twin


def _config(saved: Mapping[str, Any], folder: str | Path) -> Any:
    """The transformers config of a saved model; its class is one that transformers registers."""
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[saved["model_type"]].from_dict(dict(saved))
    except Exception as error:  # the file may be hostile: any value may stand anywhere
        raise SaveError(
            f"{folder} holds a model config that transformers can't read: {error!s:.200}"
        ) from error


def make_optimized(model: nn.Module, build: Callable[..., Outcome] | None = None) -> Optimized:
    """An empty `Optimized` with the attributes and the forward signature of `model`."""
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
    return optimized_like(type(model).__name__, forward_signature(model), carried, build)


def optimized_like(
    name: str,
    signature: inspect.Signature,
    carried: dict[str, Any],
    build: Callable[..., Outcome] | None = None,
) -> Optimized:
    """An empty `Optimized` named after `name` whose `forward` shows `signature`."""

    def forward(self: Optimized, *args: Any, **kwargs: Any) -> Any:
        return Optimized.forward(self, *args, **kwargs)

    forward.__signature__ = _with_self(signature)  # type: ignore[attr-defined]
    forward.__doc__ = Optimized.forward.__doc__
    kind: type[Optimized] = type(
        f"Optimized{name.removeprefix('Optimized')}", (Optimized,), {"forward": forward}
    )
    return kind(carried, build)


def graph_module(program: Program) -> fx.GraphModule:
    """The program as a graph module over its own tensors, tied names tied.

    State that a call writes is copied, so that calling the result leaves the model as it is.
    """
    graph = fx.Graph()
    results = graph.graph_copy(program.graph, {})
    graph.output(results)
    state = {name: materialize(tensor) for name, tensor in program.state.items()}
    state.update({name: state[name].detach().clone() for name in program.written})
    module = fx.GraphModule(state, graph, class_name=program.name)
    for name, tensor in state.items():
        owner, leaf = _owner(module, name)
        if isinstance(tensor, nn.Parameter):
            owner._parameters[leaf] = tensor
        else:
            owner.register_buffer(leaf, tensor, persistent=name not in program.non_persistent)
    for alias, name in program.aliases.items():
        _alias(module, alias, name)
    return module


def relowered(outcome: Outcome) -> Outcome:
    """`outcome` with a fresh module, compiled again the way it was (at its first call)."""
    module = graph_module(outcome.program)
    compiled = None
    if outcome.lowering is not None:
        with torch.set_grad_enabled(outcome.program.mode == "train"):
            compiled = outcome.lowering.compile(module)
    return replace(outcome, module=module, compiled=compiled)


def _with_self(signature: inspect.Signature) -> inspect.Signature:
    receiver = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].kind is not inspect.Parameter.POSITIONAL_ONLY:
        receiver = receiver.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return signature.replace(parameters=[receiver, *parameters])


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _attribute(module: nn.Module, name: str) -> Tensor:
    owner, leaf = _owner(module, name)
    tensor = getattr(owner, leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def _alias(module: nn.Module, alias: str, name: str) -> None:
    """Let `alias` name the same tensor as `name`, in containers made where they are missing."""
    path, _, leaf = alias.rpartition(".")
    owner = module
    for part in path.split(".") if path else []:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    tensor = _attribute(module, name)
    if isinstance(tensor, nn.Parameter):
        owner._parameters[leaf] = tensor
    elif not hasattr(owner, leaf):
        owner.register_buffer(leaf, tensor)
