"""The inputs of a call as one value, and the batches that a user gives of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from fxopt.errors import FxoptError

Inputs: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""A tensor, a tuple (or list) of positional arguments or a dict of keyword arguments."""

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
