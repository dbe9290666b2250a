"""What an option takes: one class for each kind of annotation, and the text that a list gives it.

    Literal["nearest", "gptq"]                     one of the values
    bool, str                                      as they are; a bool is no number
    Annotated[int, Bounds(least=1)] | None         a number within bounds, or None
    Annotated[tuple[str, ...], ...] = Globs        one or several; one becomes a tuple
    Claim, Sqnr                                    a claim: in text sqnr(30), close(none|1e-3)

An `OptionType` among an annotation's metadata stands for all of it, and `Give` says better what to
give. Any other class is checked with isinstance, and has no text.
"""

from __future__ import annotations

import difflib
import math
import re
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

from fxopt.claim import Claim, Close, Exact, Sqnr
from fxopt.device import Device
from fxopt.errors import PassError


class UnfitError(ValueError):
    """What an option doesn't take; the text says what to give instead."""


class OptionType(ABC):
    """What an option takes, and how a textual list gives it."""

    @property
    @abstractmethod
    def expected(self) -> str:
        """What to give, as it follows the word "give" in an error."""

    @property
    def spelling(self) -> str:
        """What to write in a textual list."""
        return self.expected

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values, where they can be listed."""
        return ()

    @abstractmethod
    def take(self, given: Any) -> Any:
        """`given` as the pass will hold it. Raises `UnfitError` for what isn't taken."""

    @abstractmethod
    def read(self, text: str) -> Any:
        """The value that `text` spells. Raises `UnfitError` where it spells none."""

    def unfit(self) -> UnfitError:
        """The error that says what to give."""
        return UnfitError(f"give {self.expected}")


@dataclass(frozen=True)
class Choices(OptionType):
    """One of `values`, each a string, number, bool or None."""

    values: tuple[Any, ...]

    @property
    def expected(self) -> str:
        listed = ", ".join(map(repr, self.values))
        return f"one of {listed}" if len(self.values) > 1 else listed

    @property
    def spelling(self) -> str:
        spellings = (
            value if isinstance(value, str) else str(value).lower() for value in self.values
        )
        return " | ".join(spellings)

    @property
    def choices(self) -> tuple[Any, ...]:
        return self.values

    def take(self, given: Any) -> Any:
        for value in self.values:
            if type(value) is bool or type(given) is bool:
                same = value is given
            else:
                same = isinstance(given, type(value)) and given == value
            if same:
                return value
        names = [value for value in self.values if isinstance(value, str)]
        near = difflib.get_close_matches(str(given), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UnfitError(f"give {self.expected}{hint}")

    def read(self, text: str) -> Any:
        for value in self.values:
            if not isinstance(value, str) and spelled(value).lower() == text.lower():
                return value
        return self.take(text)


@dataclass(frozen=True)
class Flag(OptionType):
    """A bool."""

    @property
    def expected(self) -> str:
        return "True or False"

    @property
    def spelling(self) -> str:
        return "true | false"

    @property
    def choices(self) -> tuple[Any, ...]:
        return (True, False)

    def take(self, given: Any) -> bool:
        if not isinstance(given, bool):
            raise self.unfit()
        return given

    def read(self, text: str) -> bool:
        if text.lower() not in ("true", "false"):
            raise self.unfit()
        return text.lower() == "true"


@dataclass(frozen=True)
class Bounds:
    """The bounds of a number: `least` and `most` belong to it, `above` and `below` don't."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    multiple_of: int = 1

    def hold(self, number: float) -> bool:
        """Whether a number is finite and within."""
        return (
            math.isfinite(number)
            and (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
            and (self.multiple_of == 1 or number % self.multiple_of == 0)
        )

    def __str__(self) -> str:
        if self.above is not None and self.below is not None:
            return f"between {self.above:g} and {self.below:g}, both excluded"
        low = f"from {self.least:g}" if self.least is not None else ""
        low = f"above {self.above:g}" if self.above is not None else low
        high = f"to {self.most:g}" if self.most is not None else ""
        high = f"below {self.below:g}" if self.below is not None else high
        if not high and self.least is not None:
            high = "on"
        divided = f", a multiple of {self.multiple_of}" if self.multiple_of != 1 else ""
        return " ".join(filter(None, (low, high))) + divided


@dataclass(frozen=True)
class Number(OptionType):
    """An int, or with `whole=False` an int or a float, within bounds."""

    whole: bool
    bounds: Bounds | None = None

    @property
    def expected(self) -> str:
        what = "a whole number" if self.whole else "a number"
        return what if self.bounds is None else f"{what} {self.bounds}"

    def take(self, given: Any) -> Any:
        kinds = int if self.whole else (int, float)
        fits = isinstance(given, kinds) and not isinstance(given, bool) and given == given
        if not fits or not (self.bounds is None or self.bounds.hold(given)):
            raise self.unfit()
        return given

    def read(self, text: str) -> Any:
        for convert in (int,) if self.whole else (int, float):
            try:
                return self.take(convert(text))
            except UnfitError:
                raise
            except ValueError:
                continue
        raise self.unfit()


@dataclass(frozen=True)
class Text(OptionType):
    """A string."""

    named: str = "a string"

    @property
    def expected(self) -> str:
        return self.named

    def take(self, given: Any) -> str:
        if not isinstance(given, str):
            raise self.unfit()
        return given

    def read(self, text: str) -> str:
        return text


@dataclass(frozen=True)
class Several(OptionType):
    """A tuple of items, given as one of them or as an iterable of at least `least`.

    `named` says what to give, and `written` what to write in a textual list, where that differs.
    """

    item: OptionType
    named: str = ""
    written: str = ""
    least: int = 0

    @property
    def expected(self) -> str:
        return self.named or f"one or several, each {self.item.expected}"

    @property
    def spelling(self) -> str:
        return f"{self.written or self.named or self.item.spelling}, separated by |"

    def take(self, given: Any) -> tuple[Any, ...]:
        is_one = isinstance(given, (str, bytes)) or not isinstance(given, Iterable)
        items = (given,) if is_one else tuple(given)
        if len(items) < self.least:
            raise self.unfit()
        try:
            return tuple(map(self.item.take, items))
        except UnfitError:
            raise self.unfit() from None

    def read(self, text: str) -> tuple[Any, ...]:
        return self.take([self.item.read(part) for part in text.split("|")] if text else ())


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


@dataclass(frozen=True)
class Instance(OptionType):
    """An instance of a class, or with `object` anything; neither has a text."""

    kind: type

    @property
    def expected(self) -> str:
        return "an object" if self.kind is object else f"an instance of {self.kind.__name__}"

    @property
    def spelling(self) -> str:
        return f"{self.expected}, in Python alone"

    def take(self, given: Any) -> Any:
        if not isinstance(given, self.kind):
            raise self.unfit()
        return given

    def read(self, text: str) -> Any:
        raise UnfitError(
            f"give {self.expected} to the pass in Python: no text of a list stands for one"
        )


@dataclass(frozen=True)
class AnyOf(OptionType):
    """What one of `members` takes; the first that reads a text has it."""

    members: tuple[OptionType, ...]

    @property
    def expected(self) -> str:
        return ", or ".join(member.expected for member in self.members)

    @property
    def spelling(self) -> str:
        return " | ".join(member.spelling for member in self.members)

    @property
    def choices(self) -> tuple[Any, ...]:
        listed = [member.choices for member in self.members]
        return tuple(value for values in listed for value in values) if all(listed) else ()

    def take(self, given: Any) -> Any:
        return self._first(lambda member: member.take(given))

    def read(self, text: str) -> Any:
        return self._first(lambda member: member.read(text))

    def _first(self, attempt: Callable[[OptionType], Any]) -> Any:
        said: list[str] = []
        # What has few texts goes before what takes any.
        for member in sorted(self.members, key=lambda member: isinstance(member, Text)):
            try:
                return attempt(member)
            except UnfitError as error:
                said += [str(error)] if str(error) != str(member.unfit()) else []
        raise UnfitError(said[0]) if said else self.unfit()


@dataclass(frozen=True)
class Give:
    """Metadata of an annotation: what an error says to give, in place of what the type says."""

    named: str


@dataclass(frozen=True)
class Named(OptionType):
    """What `type` takes, with another text for what to give."""

    type: OptionType
    named: str

    @property
    def expected(self) -> str:
        return self.named

    @property
    def spelling(self) -> str:
        return self.type.spelling

    @property
    def choices(self) -> tuple[Any, ...]:
        return self.type.choices

    def take(self, given: Any) -> Any:
        return self._said(lambda: self.type.take(given))

    def read(self, text: str) -> Any:
        return self._said(lambda: self.type.read(text))

    def _said(self, attempt: Callable[[], Any]) -> Any:
        try:
            return attempt()
        except UnfitError:
            raise self.unfit() from None


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
    plain = {bool: Flag(), str: Text(), int: Number(whole=True), float: Number(whole=False)}
    if hint in plain:
        return plain[hint]
    return Instance(hint if isinstance(hint, type) and origin is None else object)


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


Globs: TypeAlias = Annotated[tuple[str, ...], Several(Text(), "globs over module paths")]
"""One glob over module paths, or several."""

DeviceOption: TypeAlias = Annotated[str | None, DeviceName()]
"""The description of a device, or None for the one that the model is on."""
