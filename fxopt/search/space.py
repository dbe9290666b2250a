"""Space: the lists of passes that a search chooses from, as slots of alternatives.

A list is made by taking one alternative of each slot, in order; the empty alternative leaves the
slot out. Alternatives are textual specs, so a space prints, is stored with a study, and every list
out of it can be pasted into `transform`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fxopt.errors import PassError, SearchError
from fxopt.pass_list import parse_passes

Point = Mapping[str, str]
"""The alternative taken of each slot, by the slot's name."""


@dataclass(frozen=True)
class Slot:
    """Alternatives of which a list takes one; `only_with` names a slot without whose passes this
    one is left out, since it would prepare for nothing."""

    name: str
    choices: tuple[str, ...]
    only_with: str | None = None

    def __str__(self) -> str:
        shown = " | ".join(choice or "(none)" for choice in self.choices)
        condition = f"   if there is {self.only_with}" if self.only_with else ""
        return f"{self.name}: {shown}{condition}"


@dataclass(frozen=True)
class Space:
    """Slots in the order of the list; prints one slot a line.

    Raises `SearchError` for no slot, for two of one name, and for a slot without alternatives or
    with one twice; `PassError` for an alternative that is no pass spec.
    """

    slots: tuple[Slot, ...]

    def __post_init__(self) -> None:
        names = [slot.name for slot in self.slots]
        if not names:
            raise SearchError(
                "the space has no slot: give a list of alternatives for each place of a pass list, "
                'such as [["canonicalize"], ["", "int8-linear{mode=dynamic}"], ["lower"]]'
            )
        for slot in self.slots:
            if names.count(slot.name) > 1:
                raise SearchError(f"two slots of the space are named {slot.name!r}; rename one")
            if not slot.choices or len(set(slot.choices)) < len(slot.choices):
                raise SearchError(
                    f"slot {slot.name!r} of the space has {slot.choices!r} to choose from: give it "
                    'at least one alternative, none of them twice; "" leaves the slot out'
                )
            if slot.only_with is not None and slot.only_with not in names:
                raise SearchError(f"slot {slot.name!r} depends on {slot.only_with!r}, no slot here")
            for choice in slot.choices:
                _check_spec(slot.name, choice)

    @staticmethod
    def of(alternatives: Iterable[Iterable[str]]) -> Space:
        """The space of the given alternatives, slot by slot, each slot named after its passes."""
        slots: list[Slot] = []
        for index, given in enumerate(alternatives, start=1):
            if isinstance(given, str) or not isinstance(given, Iterable):
                raise SearchError(
                    f"slot {index} of space= is {given!r:.60}: give a list of alternatives, such "
                    'as ["", "int8-linear"]'
                )
            choices = tuple(given)
            slots.append(Slot(f"{index}: {_first_name(choices)}", choices))
        return Space(tuple(slots))

    @property
    def size(self) -> int:
        """How many points there are; several may make the same list."""
        return math.prod(len(slot.choices) for slot in self.slots)

    def passes(self, point: Point) -> str:
        """The list of passes that `point` makes, as text."""
        taken = [
            point[slot.name]
            for slot in self.slots
            if point[slot.name] and (slot.only_with is None or point[slot.only_with])
        ]
        return ", ".join(taken)

    def points(self) -> Iterator[dict[str, str]]:
        """Every point, the first alternatives first."""
        names = [slot.name for slot in self.slots]
        for choices in itertools.product(*(slot.choices for slot in self.slots)):
            yield dict(zip(names, choices, strict=True))

    def point(self, **choices: str) -> dict[str, str]:
        """The point of these alternatives by slot, and of the first one of every other slot."""
        return {slot.name: choices.get(slot.name, slot.choices[0]) for slot in self.slots}

    def holds(self, point: Point) -> bool:
        """Whether each slot has the alternative that `point` takes of it."""
        return all(point.get(slot.name) in slot.choices for slot in self.slots)

    def including(self, passes: str) -> tuple[Space, dict[str, str]]:
        """This space with alternatives added until it holds the list `passes`, and its point.

        Each pass goes to the next slot that has its like. Raises `SearchError` for a pass that no
        slot from there on has, `PassError` for what is no list.
        """
        taken: dict[str, list[str]] = {slot.name: [] for slot in self.slots}
        place = 0
        for pass_ in parse_passes(passes):
            homes = [
                index
                for index, slot in enumerate(self.slots)
                if index >= place and pass_.name in _names(slot)
            ]
            if not homes:
                raise SearchError(
                    f"start= has the list {passes!r}, but no slot of the space takes {pass_.spec} "
                    f"there. The space:\n{self}"
                )
            place = homes[0]
            taken[self.slots[place].name].append(pass_.spec)
        slots, point = [], {}
        for slot in self.slots:
            choice = ", ".join(taken[slot.name])
            same = [known for known in slot.choices if _spec(known) == choice]
            point[slot.name] = same[0] if same else choice
            slots.append(slot if same else replace(slot, choices=(*slot.choices, choice)))
        return Space(tuple(slots)), point

    def to_plain(self) -> list[list[Any]]:
        """Lists and strings, as for JSON."""
        return [[slot.name, list(slot.choices), slot.only_with] for slot in self.slots]

    @staticmethod
    def from_plain(plain: Sequence[Sequence[Any]]) -> Space:
        """The space that `to_plain` described."""
        return Space(tuple(Slot(name, tuple(choices), only) for name, choices, only in plain))

    def __str__(self) -> str:
        return "\n".join(map(str, self.slots))


def _check_spec(slot: str, choice: object) -> None:
    if not isinstance(choice, str):
        raise SearchError(
            f"slot {slot!r} of the space holds {choice!r:.60}: alternatives are textual specs, "
            f"such as {getattr(choice, 'spec', 'int8-linear{mode=dynamic}')!r}"
        )
    try:
        parse_passes(choice)
    except PassError as error:
        raise PassError(f"slot {slot!r} of the space: {error}") from error


def _first_name(choices: Sequence[Any]) -> str:
    for choice in choices:
        if isinstance(choice, str) and choice.strip():
            return choice.partition("{")[0].partition(",")[0].strip()
    return "none"


def _names(slot: Slot) -> set[str]:
    return {pass_.name for choice in slot.choices for pass_ in parse_passes(choice)}


def _spec(choice: str) -> str:
    return ", ".join(pass_.spec for pass_ in parse_passes(choice))
