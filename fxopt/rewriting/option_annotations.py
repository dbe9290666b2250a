"""What an annotation says that an option takes, and the kinds of option that fxopt's passes have.

    Literal["nearest", "gptq"]                     one of the values
    bool, str                                      as they are; a bool is no number
    Annotated[int, Bounds(least=1)] | None         a number within bounds, or None
    Globs, tuple[float, ...]                       one or several; one becomes a tuple
    Claim, Sqnr                                    a claim: in text sqnr(30), close(none|1e-3)

An `OptionType` among an annotation's metadata stands for all of it, and `Give` says better what to
give. Any other class is checked with isinstance, and has no text.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

from fxopt.claim import Claim, Close, Exact, Sqnr
from fxopt.device import Device
from fxopt.errors import PassError
from fxopt.rewriting.option_types import (
    AnyOf,
    Bounds,
    Choices,
    Flag,
    Instance,
    Named,
    Number,
    OptionType,
    Paths,
    Several,
    Text,
    UnfitError,
)

_PLAIN: Mapping[Any, OptionType] = {
    bool: Flag(),
    str: Text(),
    int: Number(whole=True),
    float: Number(whole=False),
}


@dataclass(frozen=True)
class Give:
    """Metadata of an annotation: what an error says to give, in place of what the type says."""

    named: str


@dataclass(frozen=True)
class ClaimOf(OptionType):
    """A claim of one of `kinds`."""

    kinds: tuple[type[Exact] | type[Close] | type[Sqnr], ...]

    @property
    def expected(self) -> str:
        if self.kinds == (Sqnr,):
            return "decibels, as Sqnr(30.0)"
        forms = {Exact: "Exact()", Close: "Close()", Sqnr: "Sqnr(30.0)"}
        return "a claim: " + _either([forms[kind] for kind in self.kinds])

    @property
    def spelling(self) -> str:
        forms = {Exact: ("exact",), Close: ("close", "close(1e-4)"), Sqnr: ("sqnr(30)",)}
        return " | ".join(form for kind in self.kinds for form in forms[kind])

    def take(self, given: Any) -> Claim:
        if not isinstance(given, self.kinds):
            raise self.unfit()
        return given

    def read(self, text: str) -> Claim:
        wanted = "write " + _either(self.spelling.split(" | "))
        match = re.fullmatch(r"(?P<kind>\w+)(?:\((?P<numbers>[^()]*)\))?", text)
        kinds: dict[str, Any] = {kind.__name__.lower(): kind for kind in self.kinds}
        if match is None or match["kind"] not in kinds:
            raise UnfitError(wanted)
        numbers = match["numbers"].split("|") if match["numbers"] else []
        try:
            claim: Claim = kinds[match["kind"]](*map(_number_or_none, numbers))
        except (TypeError, ValueError) as error:
            raise UnfitError(f"{error}; {wanted}") from None
        return claim


@dataclass(frozen=True)
class DeviceName(OptionType):
    """A `Device` or its description, kept as its description; or None."""

    @property
    def expected(self) -> str:
        return (
            'a description such as "cuda:8.0" or "cpu:avx512_bf16", or None for the device that '
            "the model is on"
        )

    @property
    def spelling(self) -> str:
        return "a description such as cuda:8.0 or cpu:avx512_bf16 | none"

    def take(self, given: Any) -> str | None:
        if given is None:
            return None
        if not isinstance(given, (str, Device)):
            raise self.unfit()
        text = given.spec if isinstance(given, Device) else given
        try:
            Device.parse(text)
        except PassError as error:
            raise UnfitError(str(error)) from None
        return text

    def read(self, text: str) -> str | None:
        return self.take(None if text.lower() == "none" else text)


def option_type(hint: Any) -> OptionType:
    """What an annotation says that an option takes."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _annotated(hint)
    if origin is Literal:
        return Choices(get_args(hint))
    if origin in (Union, types.UnionType):
        return _any_of(get_args(hint))
    if origin is tuple and get_args(hint)[1:] == (...,):
        return Several(option_type(get_args(hint)[0]))
    if hint is None or hint is types.NoneType:
        return Choices((None,))
    if hint in (Exact, Close, Sqnr):
        return ClaimOf((hint,))
    if not _is_checkable(hint):
        return Instance(object)
    return _PLAIN.get(hint) or Instance(hint)


def _is_checkable(hint: Any) -> bool:
    """Whether isinstance can tell: not for a protocol, a typed dictionary, `list[int]`."""
    try:
        isinstance(None, hint)
    except TypeError:
        return False
    return True


def spelled(value: Any) -> str:
    """An option's value as a textual list gives it: `a|b` for a tuple, `sqnr(30.0)` for a claim."""
    if isinstance(value, tuple):
        return "|".join(map(spelled, value))
    if isinstance(value, (Exact, Close, Sqnr)):
        numbers = "|".join(str(number) for number in vars(value).values())
        return type(value).__name__.lower() + (f"({numbers})" if numbers else "")
    return str(value)


def _annotated(hint: Any) -> OptionType:
    inner, *metadata = get_args(hint)
    found: OptionType | None = None
    for datum in metadata:
        if isinstance(datum, Give):
            found = Named(found or option_type(inner), datum.named)
        elif isinstance(datum, OptionType):
            found = datum
        elif isinstance(datum, Bounds):
            found = Number(inner is int, datum)
    return found or option_type(inner)


def _any_of(hints: Sequence[Any]) -> OptionType:
    claims = tuple(hint for hint in hints if hint in (Exact, Close, Sqnr))
    others = [option_type(hint) for hint in hints if hint not in claims]
    members = ([ClaimOf(claims)] if claims else []) + others
    if all(isinstance(member, Choices) for member in members):
        return Choices(tuple(value for member in members for value in member.choices))
    return members[0] if len(members) == 1 else AnyOf(tuple(members))


def _number_or_none(text: str) -> float | None:
    return None if text.strip().lower() == "none" else float(text)


def _either(forms: Sequence[str]) -> str:
    *first, last = forms
    return f"{', '.join(first)} or {last}" if first else last


Globs: TypeAlias = Annotated[tuple[str, ...], Paths(Text(), "globs over module paths")]
"""One glob over module paths, or several."""

DeviceOption: TypeAlias = Annotated[str | None, DeviceName()]
"""The description of a device, or None for the one that the model is on."""
