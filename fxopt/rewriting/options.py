"""The options of a pass: its fields, as their annotations declare them.

They are checked once, when a pass is built; a textual list is read by the same annotations. What an
annotation can say is in `fxopt.rewriting.option_annotations`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Container, Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from fxopt.errors import FxoptError, PassError
from fxopt.rewriting.option_annotations import option_type, spelled
from fxopt.rewriting.option_types import OptionType, UnfitError


@dataclass(frozen=True)
class Option:
    """One option of a pass; `follows` tells that others decide where it is left out.

    `default` is what the field says, `dataclasses.MISSING` where the option must be given.
    """

    name: str
    type: OptionType
    default: Any = MISSING
    follows: bool = False


@dataclass(frozen=True)
class Conflict:
    """Options, each valid by itself, that don't go together; `text` says what to give."""

    options: tuple[str, ...]
    text: str


def follows() -> Any:
    """The default of an option that others decide where it is left out or None.

    What `default_NAME()` of the pass returns is taken then: `claim: Claim = follows()` beside
    `def default_claim(self) -> Claim`.
    """
    return dataclasses.field(default=None)


@functools.cache
def declared(kind: type) -> tuple[Option, ...]:
    """The options of a pass class, in the order of its fields."""
    hints = _hints(kind)
    return tuple(
        _option(kind, field, hints.get(field.name, object))
        for field in dataclasses.fields(kind)
        if field.init
    )


def settle(pass_: Any) -> None:
    """Bring the options of a new pass to what their annotations declare, the following ones last.

    Raises `PassError` for a value that an option doesn't take.
    """
    kind: Any = type(pass_)
    left_out = []
    for option in declared(kind):
        given = getattr(pass_, option.name)
        if given is None and option.follows:
            left_out.append(option)
        else:
            _put(pass_, option, given)
    for option in left_out:
        _put(pass_, option, getattr(pass_, f"default_{option.name}")())


def read_options(kind: type, texts: Mapping[str, str]) -> dict[str, Any]:
    """The values that a textual list gives to options, which `kind` must have.

    Raises `PassError` for a text that an option can't read.
    """
    by_name = {option.name: option for option in declared(kind)}
    return {name: _read(kind, by_name[name], text) for name, text in texts.items()}


def missing_options(kind: type, given: Container[str]) -> list[str]:
    """The options that must be given and aren't."""
    return [o.name for o in declared(kind) if o.default is MISSING and o.name not in given]


def fault(owner: str, given: Mapping[str, Any], text: str) -> PassError:
    """The one form of an error about options: `Owner(option=value): give ...`."""
    options = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return PassError(f"{owner}({options}): {text}")


def changed_options(pass_: Any) -> dict[str, Any]:
    """The options of a pass that leaving them out would change."""
    values = {field.name: getattr(pass_, field.name) for field in dataclasses.fields(pass_)}
    changed = {}
    for name, value in values.items():
        others = {key: other for key, other in values.items() if key != name}
        try:
            omitted = getattr(type(pass_)(**others), name)
        except (TypeError, FxoptError):
            omitted = MISSING
        if omitted != value:
            changed[name] = value
    return changed


def spell_options(pass_: Any) -> str:
    """The changed options as a textual list gives them: `mode=static, claim=sqnr(30.0)`."""
    changed = changed_options(pass_).items()
    return ", ".join(f"{name}={spelled(value)}" for name, value in changed)


def _option(kind: type, field: dataclasses.Field[Any], hint: Any) -> Option:
    default = field.default
    if default is MISSING and field.default_factory is not MISSING:
        default = field.default_factory()
    follows_others = default is None and hasattr(kind, f"default_{field.name}")
    return Option(field.name, option_type(hint), default, follows_others)


def _put(pass_: Any, option: Option, given: Any) -> None:
    if given is None and option.default is None and not option.follows:
        return
    try:
        taken = option.type.take(given)
    except UnfitError as error:
        raise fault(type(pass_).__name__, {option.name: given}, str(error)) from None
    object.__setattr__(pass_, option.name, taken)


def _read(kind: type, option: Option, text: str) -> Any:
    if option.default is None and text.lower() == "none":
        return None
    try:
        return option.type.read(text)
    except UnfitError as error:
        raise fault(kind.__name__, {option.name: text}, str(error)) from None


def _hints(kind: type) -> dict[str, Any]:
    """The annotations of a class and its bases as types; `object` where a name isn't to be found.

    Read one by one: a type imported for the type checker alone leaves its own option unchecked.
    """
    hints: dict[str, Any] = {}
    for owner in reversed(kind.__mro__):
        scope = {**vars(owner), **vars(sys.modules.get(owner.__module__, owner))}
        for name, annotation in inspect.get_annotations(owner).items():
            hints[name] = _evaluated(annotation, scope)
    return hints


def _evaluated(annotation: Any, scope: dict[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, scope)
    except (NameError, AttributeError, TypeError):
        return object
