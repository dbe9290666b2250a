"""The capture: torch.export (non-strict) with dynamic sizes, brought into the one dialect."""

from __future__ import annotations

import inspect
import io
import keyword
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxopt.calls import CACHE_NAMES, Inputs, forward_signature, unbind
from fxopt.capture.attributes import attributes_kept, left_alone
from fxopt.capture.dialect import to_program
from fxopt.capture.failures import capture_error, first_line, user_line
from fxopt.capture.inputs import derive_inputs, normalize_inputs, zeros_when_left_out
from fxopt.capture.model_checks import check_model, in_mode, uncompiled
from fxopt.capture.questions import recorded
from fxopt.capture.returned_places import returns_written, with_returned_places
from fxopt.capture.size_guards import admits, guards_of
from fxopt.capture.surroundings import callers_device, callers_modes_off
from fxopt.capture.trace_inputs import copied_inputs, distinct_tensors, double_batch, dynamic_shapes
from fxopt.data_sizes import observe_sizes
from fxopt.errors import InputError
from fxopt.guards import Guard
from fxopt.program import Mode, Program
from fxopt.sharing import Labels, observed
from fxopt.signature import gathered


def capture(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    mode: Mode = "eval",
    empty: bool = False,
    learns: bool = False,
) -> Program:
    """The graph of `model` on inputs like `example_inputs`, with every size dynamic that can be.

    `example_inputs` left out: derived from the model's transformers config. Parameters and buffers
    are the model's own tensors; tied ones stay tied. The model's mode flags are restored. Inputs
    without entries, which show little, are taken where they may be `empty`. A program in train mode
    learns; one in eval mode that is the evaluation of such a program `learns` too, by its inputs.

    Raises `ModelError` for a model that can't be captured at all, `InputError` for inputs that the
    model itself rejects, `NotCapturedError` when no inputs are given and none can be derived, and
    `CaptureError` for a construct that can't become a graph.
    """
    model = uncompiled(model)
    check_model(model)
    with callers_modes_off():
        return _captured(model, example_inputs, mode, empty, learns or mode == "train")


def _captured(
    model: nn.Module,
    example_inputs: Inputs | None,
    mode: Mode,
    empty: bool,
    learns: bool,
) -> Program:
    signature = forward_signature(model)
    named = normalize_inputs(
        signature, derive_inputs(model) if example_inputs is None else example_inputs, empty
    )
    notes: list[str] = []
    added: frozenset[str] = frozenset()
    if _would_return_cache(model, named):
        named["use_cache"], added = False, frozenset({"use_cache"})
        notes.append("captured with use_cache=False: the key/value cache is not an output")
    _check_devices(model, named)
    with attributes_kept(model), in_mode(model, mode), callers_device():
        exported, guards = _export(model, named, learns)
    program = to_program(exported, model, signature, copied_inputs(named), mode, learns)
    if returns_written(program):
        program = with_returned_places(program, *_eager_memory(model, program))
    notes += [*_fixed_size_notes(program), *observe_sizes(program)]
    zeros = zeros_when_left_out(model, named)
    convention = replace(program.signature, zeros=zeros, guards=guards, added=added)
    return replace(program, signature=convention, notes=tuple(notes))


def _export(
    model: nn.Module, named: Mapping[str, Any], learns: bool
) -> tuple[ExportedProgram, tuple[Guard, ...]]:
    """Export on `named`; a batch of 1 is doubled, since a size of 1 can't be traced as dynamic."""
    doubled = double_batch(named)
    if doubled is not None:
        try:
            exported, guards = _export_dynamic(model, doubled, learns)
        except Exception:
            pass  # not a batch after all: capture it as it is, with the axis fixed to 1
        else:
            leaves = pytree.tree_leaves(dict(named))
            shapes = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor)]
            if admits(exported, guards, shapes):
                return exported, guards
    try:
        return _export_dynamic(model, named, learns)
    except InputError:
        raise
    except Exception as error:
        _blame_inputs(model, named)
        raise capture_error(model, error) from error


def _export_dynamic(
    model: nn.Module, named: Mapping[str, Any], learns: bool
) -> tuple[ExportedProgram, tuple[Guard, ...]]:
    args, kwargs = unbind(forward_signature(model), distinct_tensors(named))
    with (
        _named_keywords(model, named) as signature,
        _silent_failure(),
        torch.set_grad_enabled(learns),
        recorded() as questions,
    ):
        shapes = dynamic_shapes(dict(signature.bind(*args, **kwargs).arguments))
        exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    return exported, guards_of(exported, questions)


@contextmanager
def _named_keywords(model: nn.Module, named: Mapping[str, Any]) -> Iterator[inspect.Signature]:
    """Show what lands in `**kwargs` as parameters of their own; the model's forward is put back.

    torch.export takes no dynamic_shapes for collected keywords: it looks for them inside the
    collector at first and beside it later, and no form passes both.
    """
    signature = forward_signature(model)
    known = signature.parameters
    collected = [name for name in named if name not in known]
    for name in collected:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise InputError(
                f"{name!r} can't be the name of a captured argument, since Python takes it for no "
                "name; let forward take it under another"
            )
    if not collected:
        yield signature
        return
    own, original = model.__dict__.get("forward"), model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    parameters = [p for p in known.values() if p.kind is not p.VAR_KEYWORD]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in collected]
    signature = signature.replace(parameters=parameters)
    forward.__signature__ = signature  # type: ignore[attr-defined]
    model.forward = forward
    try:
        yield signature
    finally:
        del model.forward
        if own is not None:
            model.forward = own


@contextmanager
def _silent_failure() -> Iterator[None]:
    """Keep torch from printing the partial graph of a trace that fails."""
    written = io.StringIO()
    with redirect_stderr(written):
        yield
    sys.stderr.write(written.getvalue())


def _would_return_cache(model: nn.Module, named: Mapping[str, Any]) -> bool:
    config = getattr(model, "config", None)
    writes = getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", True)
    if not _uses_cache(config) or writes is False:
        return False
    takes_cache = not forward_signature(model).parameters.keys().isdisjoint(CACHE_NAMES)
    return takes_cache and named.keys().isdisjoint(("use_cache", *CACHE_NAMES))


def _uses_cache(config: Any) -> bool:
    """Whether a transformers config, or that of the text model in it, asks for a cache."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    return any(getattr(one, "use_cache", False) for one in (config, text))


def _check_devices(model: nn.Module, named: Mapping[str, Any]) -> None:
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    for leaf in pytree.tree_leaves(dict(named)):
        if isinstance(leaf, Tensor) and len(devices) == 1 and leaf.device not in devices:
            (device,) = devices
            raise InputError(
                f"an example input is on {leaf.device}, but the model is on {device}. Move the "
                f"inputs with .to('{device}') or the model with .to('{leaf.device}')."
            )


def _blame_inputs(model: nn.Module, named: Mapping[str, Any]) -> None:
    """Raise `InputError` when the eager model can't take the inputs either."""
    args, kwargs = unbind(forward_signature(model), copied_inputs(named))
    try:
        with torch.no_grad(), left_alone(model):
            model(*args, **kwargs)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} itself rejects the example inputs: "
            f"{type(error).__name__}: {first_line(error)} (at {user_line(error)}). Give inputs "
            "that the model accepts."
        ) from error


def _eager_memory(model: nn.Module, program: Program) -> tuple[Labels, list[bool]]:
    """Which memory the outputs of an eager call on the example are in, and which of them are all
    of an input or of a state tensor, as it is."""
    inputs = [tensor.clone() for tensor in program.example]
    args, kwargs = program.signature.arguments(inputs)
    with in_mode(model, program.mode), left_alone(model), torch.no_grad():
        leaves = pytree.tree_leaves(model(*args, **kwargs))
        outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    known = [*inputs, *(one for one in program.state.values() if isinstance(one, Tensor))]
    whole = [any(map(output.is_set_to, known)) for output in outputs]
    return observed(outputs, inputs, program.state), whole


def _fixed_size_notes(program: Program) -> list[str]:
    """What calls must keep: axes of 1, which can't be traced as dynamic, and those fixed by code.

    A loop over time steps and a reshape to numbers fix sizes. So does a weight, which is no news.
    """
    notes = [
        f"{tensor.path} axis {axis} is fixed to 1; an example longer than 1 there keeps it dynamic"
        for tensor in program.signature.tensors
        for axis, size in enumerate(tensor.sizes)
        if size == 1
    ]
    widths = {0, 1, *(size for tensor in program.state.values() for size in tensor.shape)}
    fixed_sizes: list[tuple[str, str]] = []
    for tensor in program.signature.tensors:
        sizes = enumerate(tensor.sizes)
        fixed = [(axis, size) for axis, size in sizes if isinstance(size, int)]
        axes = [f"{size} on axis {axis}" for axis, size in fixed if size not in widths]
        if axes:
            fixed_sizes.append((tensor.path, ", ".join(axes)))
    notes += [
        f"the model fixes the size of {path} to {axes}: a call with another needs a program of its "
        "own"
        for path, axes in gathered(fixed_sizes)
    ]
    return notes
