"""The oracle: what the eager, unoptimised original answers on real inputs of several sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxopt.capture import attributes_kept, callers_device, in_mode, is_compiled
from fxopt.errors import InputError
from fxopt.interpreter import evaluate, evaluate_all, same_draws
from fxopt.nodes import draws_random
from fxopt.program import Program
from fxopt.recipe import Recipe, materialize
from fxopt.sharing import Labels, observed
from fxopt.verify.sizes import other_sizes, shapes_text

Run = Callable[[Sequence[Tensor]], list[Tensor]]
RunAll = Callable[[Sequence[Sequence[Tensor]]], list[list[Tensor]]]

_NO_OTHER_SIZE = "no other size near the example's is within the program's guards"


@dataclass(frozen=True)
class Trial:
    """One set of input tensors in placeholder order, what it is, and the reference outputs.

    `memory` says which memory the original's outputs are in; None where that can't be told, since
    they were put aside before what the call wrote was put back.
    """

    what: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    memory: Labels | None = None


def trials(
    program: Program,
    reference: Run,
    more: Sequence[Sequence[Tensor]] = (),
    resized: Sequence[Sequence[Tensor]] = (),
) -> tuple[tuple[Trial, ...], tuple[str, ...]]:
    """The trials of `program`: its example, `more`, and inputs of other sizes.

    Those are `resized`, or where there are none the example at two other sizes within the program's
    guards. Sizes that the reference itself rejects are left out and
    named in the second result.
    """
    found = [_given("the example", program, program.example, reference)]
    for index, inputs in enumerate(more):
        found.append(_given(f"verify_inputs[{index}]", program, tuple(inputs), reference))
    skipped = []
    for other in map(tuple, resized) if resized else other_sizes(program):
        if other is None:
            skipped.append(_NO_OTHER_SIZE)
            continue
        shapes = shapes_text(program, other)
        try:
            found.append(_trial(shapes, program, other, reference))
        except Exception as error:  # a forward may refuse a size with an exception of its own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            skipped.append(f"not judged at {shapes}: the original rejects it ({reason})")
    return tuple(found), tuple(dict.fromkeys(skipped))


def _given(what: str, program: Program, inputs: tuple[Tensor, ...], reference: Run) -> Trial:
    try:
        return _trial(what, program, inputs, reference)
    except Exception as error:
        name = "the example inputs" if what == "the example" else what
        reason = (str(error).splitlines() or ["(no message)"])[0]
        raise InputError(
            f"{program.name} itself rejects {name}: {type(error).__name__}: {reason}. Give inputs "
            "that the model accepts."
        ) from error


def _trial(what: str, program: Program, inputs: tuple[Tensor, ...], reference: Run) -> Trial:
    outputs = reference(inputs)
    labels = None if writes(program) else observed(outputs, inputs, program.state)
    return Trial(what, inputs, _frozen(outputs), labels)


def run_model(model: nn.Module, program: Program, changed: set[str] | None = None) -> Run:
    """The eager original as a function of the graph's input tensors; leaves the model as it was.

    The Python attributes that a call changes, and that are put back, are added to `changed`.
    """
    call = call_model(model, program)

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        with model_kept(model, program, inputs, changed) as kept, same_draws():
            outputs = call(inputs)
            # An output may be the very tensor that is about to be put back.
            return [output.clone() for output in outputs] if kept else outputs

    return run


def call_model(model: nn.Module, program: Program) -> Run:
    """A call of the eager original on the graph's input tensors, whatever it writes.

    What torch.compile compiles in it runs eagerly.
    """
    compiled = is_compiled(model)

    def call(inputs: Sequence[Tensor]) -> list[Tensor]:
        args, kwargs = program.signature.arguments(inputs)
        with (
            in_mode(model, program.mode),
            torch.set_grad_enabled(program.mode == "train"),
            callers_device(),
            torch.compiler.set_stance("force_eager") if compiled else nullcontext(),
        ):
            leaves = pytree.tree_leaves(model(*args, **kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    return call


@contextmanager
def model_kept(
    model: nn.Module,
    program: Program,
    inputs: Sequence[Tensor],
    changed: set[str] | None = None,
) -> Iterator[bool]:
    """What calls of the eager original change is put back: state, inputs and Python attributes.

    Of a model that trains that is all its buffers, in case the capture doesn't see one written.
    """
    trains = program.mode == "train"
    buffers = tensors_kept(model.buffers() if trains else ())
    with attributes_kept(model) as names, state_kept(program, inputs) as kept, buffers:
        yield kept or trains
    if changed is not None:
        changed.update(names)


def run_program(program: Program) -> RunAll:
    """The program as a function of several sets of input tensors; changes no buffer."""

    def run(batches: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        if not is_random(program):
            return evaluate_all(program, batches)
        results = []
        for inputs in batches:
            with same_draws():
                results.append(evaluate(program, inputs))
        return results

    return run


def writes(program: Program) -> bool:
    """Whether a call of `program` writes an input or state."""
    return any(node.target is torch.ops.aten.copy_.default for node in program.graph.nodes)


def is_random(program: Program) -> bool:
    """Whether a call of `program` draws random numbers."""
    return any(map(draws_random, program.graph.nodes))


def draws_alike(one: Program, other: Program) -> bool:
    """Whether calls of two programs draw for the same operators and sizes, in order.

    Only then do they draw the same numbers from one seed.
    """
    return _draws(one) == _draws(other)


def _draws(program: Program) -> list[tuple[str, str]]:
    """The random operators of a program, in order, with the sizes of what each makes."""
    found = []
    for node in filter(draws_random, program.graph.nodes):
        values = pytree.tree_leaves(node.meta["val"])
        sizes = [str(tuple(value.shape)) for value in values if isinstance(value, Tensor)]
        found.append((str(node.target), " ".join(sizes)))
    return found


def one_by_one(run: Run) -> RunAll:
    """A function of one set of inputs as a function of several."""
    return lambda batches: [run(inputs) for inputs in batches]


def _frozen(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(output.detach() for output in outputs)


@contextmanager
def state_kept(
    program: Program,
    inputs: Sequence[Tensor] = (),
    state: Mapping[str, Tensor | Recipe] | None = None,
) -> Iterator[bool]:
    """What a run of `program` writes, put back after it; gives whether it writes at all.

    That is inputs, and state under the names of `program.written` (of `state` where it is given,
    a compiled module's own buffers).
    """
    tensors = program.state if state is None else state
    written = [materialize(tensors[name]) for name in program.written if name in tensors]
    for node, tensor in zip(program.placeholders, inputs, strict=False):
        if any(user.target is torch.ops.aten.copy_.default for user in node.users):
            written.append(tensor)
    with tensors_kept(written):
        yield bool(written)


@contextmanager
def tensors_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """What is written to `tensors` inside is put back."""
    written = list(tensors)
    before = [tensor.detach().clone() for tensor in written]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(written, before, strict=True):
                tensor.copy_(value)


def output_names(program: Program) -> list[str]:
    """A readable name for each output tensor, such as `last_hidden_state` or `[0]`."""
    spec = program.signature.out_spec
    filled: list[Any] = list(range(spec.num_leaves))
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(filled, spec))
    names = []
    for path, index in paths:
        if index in program.signature.out_constants:
            continue
        text = "".join(str(key) for key in path)
        names.append(text.removeprefix("['").removesuffix("']").lstrip(".") or "output")
    return names
