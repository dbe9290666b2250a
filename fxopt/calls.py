"""The inputs of a call: as one value, as {argument name: value}, and batches of them."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxopt.errors import FxoptError, InputError

Inputs: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""A tensor, a tuple (or list) of positional arguments or a dict of keyword arguments."""

CACHE_NAMES = ("past_key_values", "cache")
"""What models of transformers call the cache that they take; the second since 5.24."""

FORMS = "a tensor, a tuple of positional arguments or a dict of keyword arguments"


def spread(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The (args, kwargs) of the call; what is none of the forms is its one argument."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}


def check_inputs(inputs: object, what: str, error: type[FxoptError]) -> None:
    """Raise `error`, which calls the inputs `what`, unless they have one of the forms."""
    if not isinstance(inputs, (Tensor, Mapping, tuple, list)):
        raise error(f"{what} must be {FORMS}, not {type(inputs).__name__}")


def check_batches(
    source: object,
    what: str,
    error: type[FxoptError],
    kinds: str = "a list, a DataLoader, a generator",
) -> None:
    """Raise `error` unless `source` is an iterable of inputs, such as `kinds`, rather than one."""
    given = type(source).__name__
    if isinstance(source, (Tensor, Mapping)):
        raise error(
            f"{what} is one input (a {given}), not an iterable of inputs. Give a list of them: "
            "[inputs]"
        )
    if isinstance(source, (str, bytes)) or not isinstance(source, Iterable):
        raise error(f"{what} must be an iterable of inputs ({kinds}), not {given}")


def generates(model: object) -> bool:
    """Whether transformers' `generate` calls `model`, token by token."""
    can_generate = getattr(model, "can_generate", None)
    return bool(callable(can_generate) and can_generate())


def forward_signature(model: nn.Module) -> inspect.Signature:
    """The signature of `model.forward` without annotations that need the model's module."""
    return inspect.signature(model.forward)


def bind(
    signature: inspect.Signature,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    spelled_out: Collection[str] = (),
) -> dict[str, Any]:
    """A call as {argument name: value}, `None` dropped, and defaults that aren't `spelled_out`.

    Keywords that land in `**kwargs` keep their own names; what lands in `*args` stays a tuple under
    its parameter's name. Raises `InputError` where the call doesn't fit the signature.
    """
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the inputs don't fit forward{signature}: {error}. Give a tuple of positional "
            "arguments or a dict of keyword arguments."
        ) from error
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update({key: inner for key, inner in value.items() if inner is not None})
        elif value is not None and (
            name in spelled_out or not _is_default(value, parameter.default)
        ):
            named[name] = value
    return named


def unbind(
    signature: inspect.Signature, named: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The (args, kwargs) that call `forward` with what `bind` returned."""
    known = {name: value for name, value in named.items() if name in signature.parameters}
    extra = {name: value for name, value in named.items() if name not in signature.parameters}
    bound = inspect.BoundArguments(signature, dict(known))
    return tuple(bound.args), {**bound.kwargs, **extra}


def describe_leaves(named: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Each leaf of {argument name: value} with a readable path such as `inputs[0]` or `mask`."""
    paths, _ = pytree.tree_flatten_with_path(dict(named))
    return [(path_text(path), leaf) for path, leaf in paths]


def path_text(path: Sequence[Any]) -> str:
    """`inputs[0]` for the path of a leaf."""
    first, *rest = path
    return str(first.key) + "".join(str(key) for key in rest)


def _is_default(value: Any, default: Any) -> bool:
    if isinstance(value, Tensor) or default is inspect.Parameter.empty:
        return False
    if isinstance(value, (bool, int, float, str)):
        return type(value) is type(default) and value == default
    return value is default
