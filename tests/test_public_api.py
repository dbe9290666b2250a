"""The signature of every public name, as recorded: what a user wrote for it keeps working."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import fxopt
from fxopt import train


def lines() -> Iterator[str]:
    """A line a public name, and one for each public method of a class."""
    for room, names in ((fxopt, fxopt.__all__), (train, train.__all__)):
        for name in sorted(names):
            value: Any = getattr(room, name)
            prefix = f"{room.__name__}.{name}"
            if inspect.isclass(value):
                yield f"class {prefix}{_signature(value)}"
                yield from _members(prefix, value)
            elif callable(value):
                yield f"{prefix}{_signature(value)}"
            else:
                yield f"{prefix}: {type(value).__name__}"


def _members(prefix: str, kind: type) -> Iterator[str]:
    for name in sorted(vars(kind)):
        value = getattr(kind, name)
        if name.startswith("_") or name == "plan_type":
            continue
        if callable(value):
            yield f"  {prefix}.{name}{_signature(value)}"
        else:
            yield f"  {prefix}.{name}"


def _signature(value: Any) -> str:
    """Names, kinds and defaults of the parameters; annotations may be written otherwise."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return "(...)"
    bare = [one.replace(annotation=one.empty) for one in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=signature.empty))
    return text if " at 0x" not in text else "(...)"


def test_public_names_are_as_recorded(snapshot: Any) -> None:
    assert "\n".join(lines()) == snapshot
