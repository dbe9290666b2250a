"""The further programs of one module, each for calls that the first wasn't captured for.

A call of other sizes, for which the model's Python code takes another branch, needs another graph.
It is captured from the original model at the first such call, goes through the same passes and is
judged like the first; later calls find it here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxopt.calls import bind
from fxopt.capture import callers_modes_off
from fxopt.errors import FxoptError, InputError, OutsideError
from fxopt.optimized.members import (
    Member,
    member,
    own_what_is_written,
    present_tensors,
    shareable,
    stamp,
)
from fxopt.optimized.pipeline_result import PipelineResult
from fxopt.optimized.source import Source
from fxopt.program import Mode
from fxopt.recipe import materialize

_ONE_AT_A_TIME = threading.RLock()
"""Held while a model is captured for a call: two threads must not trace one model at once."""


class Programs:
    """All programs of one module but the `first`; more are captured when calls need them."""

    def __init__(self, first: PipelineResult, members: Sequence[Member] = ()) -> None:
        self.first = first
        self.members = list(members)
        self._latest: Member | None = None
        self._by_kind: dict[str, Member] = {}

    def run_again(self, kind: str, kwargs: Mapping[str, Any]) -> tuple[Any] | None:
        """The outputs, of the further program that answered the last call of this `kind`.

        None where it doesn't answer this call, or where no further program did.
        """
        self._latest = None
        known = self._by_kind.get(kind)
        if known is None or not self._is_valid(known):
            return None
        try:
            return (known.run("eval", (), kwargs),)
        except InputError:
            return None

    def note(self, kind: str) -> None:
        """Remember the further program that has just answered a call of this `kind`."""
        if self._latest is not None:
            self._by_kind[kind] = self._latest

    def run(
        self, mode: Mode, args: Sequence[Any], kwargs: Mapping[str, Any], refused: InputError
    ) -> Any:
        """The outputs for a call that the first program refused with the error `refused`.

        Raises `InputError` where no program answers it and none can be captured for it.
        """
        self._latest = self.answering(args, kwargs, refused)
        return self._latest.run(mode, args, kwargs)

    def answering(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], refused: InputError
    ) -> Member:
        """The program for a call that the first one refused, captured now if there is none.

        One is captured for what is outside of a program that takes these arguments.
        """
        found = self._find(args, kwargs)
        if found is not None:
            return found
        refusals = (refused, *(one.refusal(args, kwargs) for one in self.members))
        outside = next((one for one in refusals if isinstance(one, OutsideError)), None)
        if outside is None:
            raise refused
        if torch.compiler.is_compiling() or torch.compiler.is_exporting():
            raise outside  # a tracer of this call can't start another
        with _ONE_AT_A_TIME:
            return self._find(args, kwargs) or self._captured(args, kwargs, outside)

    def add(self, outcome: PipelineResult) -> Member:
        """Take in a program that was made of the same model."""
        own_what_is_written(outcome, self.first)
        present = present_tensors(self.first)
        new = member(outcome, present, shareable(outcome, self.first, present))
        self.members.append(new)
        return new

    def valid(self) -> list[Member]:
        """The further programs that are right beside the first one's present tensors."""
        present = stamp(present_tensors(self.first))
        return [one for one in self.members if one.stamp in (None, present)]

    def _find(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Member | None:
        found = next((one for one in self.members if one.answers(args, kwargs)), None)
        if found is None or self._is_valid(found):
            return found
        self.members.remove(found)  # its own weights were made beside others
        return None

    def _is_valid(self, one: Member) -> bool:
        """Whether its weights are right beside the first program's present ones."""
        return one.stamp is None or one.stamp == stamp(present_tensors(self.first))

    def _captured(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], outside: OutsideError
    ) -> Member:
        source = self._source(outside)
        model = source.model()
        assert model is not None
        device = next((tensor.device for tensor in model.parameters()), None)

        def given(leaf: Any) -> Any:
            return leaf.detach().clone().to(device) if isinstance(leaf, Tensor) else leaf

        with callers_modes_off():
            named = bind(self.first.program.signature.forward, args, kwargs)
            try:
                outcome = source.build(model, pytree.tree_map(given, named))
            except FxoptError as error:
                raise InputError(f"{outside} No program can be captured for it: {error}") from error
        new = self.add(_on_device(outcome, self._device(device)))
        if not new.answers(args, kwargs):
            self.members.remove(new)
            raise outside
        return new

    def _device(self, default: torch.device | None) -> torch.device | None:
        return next((t.device for t in present_tensors(self.first).values()), default)

    def _source(self, outside: OutsideError) -> Source[PipelineResult]:
        """Where a further program can come from; raises `InputError` where none can."""
        source = self.first.source
        if source is None or source.most <= 1:
            raise outside
        obstacle = source.obstacle(present_tensors(self.first))
        if obstacle is None and 1 + len(self.members) >= source.most:
            obstacle = (
                f"{source.most} programs are held already. Let calls come in fewer sizes, or allow "
                "more with transform(..., recapture=<how many>)"
            )
        if obstacle is not None:
            _refuse(outside, obstacle)
        return source


def beside(
    first: PipelineResult,
    members: Sequence[Member],
    change: Callable[[Tensor], Tensor],
    device: torch.device | None = None,
) -> Programs:
    """`members` beside a `first` program whose tensors were changed, their own ones by `change`.

    `device` is where the tensors are now, if they were moved.
    """
    programs = Programs(first)
    present = present_tensors(first)
    for one in members:
        if not one.follows:
            continue  # tensors of its evaluation aren't changed here: it is captured anew
        state = {
            name: tensor if name in one.shared else _like(tensor, change(materialize(tensor)))
            for name, tensor in one.program.state.items()
        }
        outcome = one.outcome
        if device is not None or any(
            state[name] is not t for name, t in outcome.program.state.items()
        ):
            outcome = replace(outcome, module=None, compiled=None)
        program = replace(outcome.program, state=state)
        program = program if device is None else program.on_device(device)
        programs.members.append(member(replace(outcome, program=program), present, one.shared))
    return programs


def _on_device(outcome: PipelineResult, device: torch.device | None) -> PipelineResult:
    """A program that was captured where the original is, for a module that was moved."""
    tensors = {name: materialize(t) for name, t in outcome.program.state.items()}
    if device is None or all(tensor.device == device for tensor in tensors.values()):
        return outcome
    moved = {name: _like(tensor, tensor.to(device)) for name, tensor in tensors.items()}
    program = replace(outcome.program, state=moved).on_device(device)
    return replace(outcome, program=program, module=None, compiled=None)


def _like(old: Any, new: Tensor) -> Tensor:
    """`new` as the kind of tensor that `old` is."""
    kept = not isinstance(old, nn.Parameter) or isinstance(new, nn.Parameter)
    return new if kept else nn.Parameter(new, old.requires_grad)


def _refuse(outside: OutsideError, obstacle: str) -> NoReturn:
    raise InputError(f"{outside} No program can be captured for it: {obstacle}.") from outside
