"""What an option takes, in Python and as the text of a list: one class for each kind of option."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


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
            if not isinstance(value, str) and str(value).lower() == text.lower():
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
        try:
            items = (given,) if is_one else tuple(given)
            taken = tuple(map(self.item.take, items))
        except (TypeError, UnfitError):  # a tensor without dimensions says that it is iterable
            raise self.unfit() from None
        if len(taken) < self.least:
            raise self.unfit()
        return taken

    def read(self, text: str) -> tuple[Any, ...]:
        return self.take([self.item.read(part) for part in text.split("|")] if text else ())


@dataclass(frozen=True)
class Paths(Several):
    """What chooses module paths; a plan warns of each glob that chooses none."""


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
