"""A user's own passes in textual lists: registered in a process, or offered by a package."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import fxopt
from fxopt import Pass, Plan, Program, pass_registry
from fxopt.errors import PassError
from fxopt.pass_list import resolve_passes, scheduled
from fxopt.pass_registry import PASSES, find_pass, listed_passes


@pytest.fixture(autouse=True)
def _nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_registry, "_registered", {})


class Idle(Pass):
    """Changes nothing."""

    def plan(self, program: Program) -> Plan:
        return Plan(repr(self))

    def apply(self, program: Program, plan: Plan) -> Program:
        return program


@dataclass(frozen=True, repr=False)
class Halve(Idle):
    times: int = 1
    name: ClassVar[str] = "halve"


def test_a_registered_pass_is_named_in_lists_and_scheduled_where_it_is_needed() -> None:
    assert fxopt.register_pass(Halve) is Halve
    assert resolve_passes("halve{times=2}, canonicalize") == (Halve(2), fxopt.Canonicalize())
    assert listed_passes().passes["halve"] is Halve
    assert "halve" not in PASSES
    opt = fxopt.transform(torch.nn.Linear(2, 2), "halve", example_inputs=(torch.ones(1, 2),))
    assert opt.report.steps[-1].spec == "Halve()"

    @dataclass(frozen=True, repr=False)
    class After(Idle):
        name: ClassVar[str] = "after"

        def needs(self, mode: str) -> tuple[str, ...]:
            return ("halve",)

    assert [one.pass_ for one in scheduled([After()], "eval").rewrites] == [Halve(), After()]


def test_it_is_a_decorator_and_a_class_defined_anew_takes_its_former_place() -> None:
    def cell() -> type[Pass]:
        @fxopt.register_pass
        @dataclass(frozen=True, repr=False)
        class Mine(Idle):
            name: ClassVar[str] = "mine"

        return Mine

    first, second = cell(), cell()
    assert first is not second
    assert find_pass("mine") is second


class Unfrozen(Idle):
    name: ClassVar[str] = "unfrozen"


@dataclass(repr=False)
class Mutable(Idle):
    name: ClassVar[str] = "mutable"


@dataclass(frozen=True, repr=False)
class Undecorated(Idle):
    name: ClassVar[str] = "undecorated"


class Heir(Undecorated):
    name: ClassVar[str] = "heir"


@dataclass(frozen=True, repr=False)
class Nameless(Idle):
    times: int = 1


@dataclass(frozen=True, repr=False)
class Spaced(Idle):
    name: ClassVar[str] = "two words"


@dataclass(frozen=True, repr=False)
class NameAsOption(Idle):
    name: str = "mine"  # type: ignore[misc]


@dataclass(frozen=True, repr=False)
class Planless(Pass):
    name: ClassVar[str] = "planless"


@dataclass(frozen=True, repr=False)
class Int8(Idle):
    name: ClassVar[str] = "int8-linear"


@dataclass(frozen=True, repr=False)
class OtherHalve(Idle):
    name: ClassVar[str] = "halve"


@dataclass(frozen=True, repr=False)
class Auto(Idle):
    name: ClassVar[str] = "auto"


FREEZE = (
    "is no frozen dataclass, so that its options aren't known: put "
    "@dataclass(frozen=True, repr=False) on it, below @register_pass"
)
NAME = (
    "has no name that a textual list can give: write "
    'name: ClassVar[str] = "my-pass" in it, of letters, digits, - and _'
)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (3, "register_pass takes a class derived from fxopt.Pass, not 3"),
        (dict, "register_pass takes a class derived from fxopt.Pass, not <class 'dict'>"),
        (Halve(), "register_pass takes a class, not an instance: register_pass(Halve)"),
        (Planless, "Planless lacks apply and plan: a pass plans, then applies its plan"),
        (Unfrozen, f"Unfrozen {FREEZE}"),
        (Mutable, f"Mutable {FREEZE}"),
        (Heir, f"Heir {FREEZE}"),
        (Nameless, f"Nameless {NAME}"),
        (Spaced, f"Spaced {NAME}"),
        (NameAsOption, f"NameAsOption {NAME}"),
        (
            Int8,
            "Int8 can't be called 'int8-linear', as "
            "fxopt.passes.quantization.int8_linear.Int8Linear is: give it another name",
        ),
        (
            Auto,
            "Auto can't be called 'auto', which stands for a recommended list: give it another "
            "name",
        ),
        (
            OtherHalve,
            f"OtherHalve can't be called 'halve', as {__name__}.Halve is: give it another name",
        ),
    ],
)
def test_what_cannot_be_registered_changes_nothing(kind: Any, text: str) -> None:
    fxopt.register_pass(Halve)
    before = dict(listed_passes().passes)
    with pytest.raises(PassError) as caught:
        fxopt.register_pass(kind)
    assert str(caught.value) == text
    assert dict(listed_passes().passes) == before


PLUGIN = """
    from dataclasses import dataclass
    from typing import ClassVar

    import fxopt

    @dataclass(frozen=True, repr=False)
    class Plugged(fxopt.Pass):
        "Does nothing, from a package."

        times: int = 1
        name: ClassVar[str] = "plugged"

        def plan(self, program):
            return fxopt.Plan(repr(self))

        def apply(self, program, plan):
            return program
"""


def install(folder: Path, package: str, points: dict[str, str], source: str = PLUGIN) -> None:
    """A package as pip leaves it: a module, and what its metadata says."""
    module = package.replace("-", "_")
    (folder / f"{module}.py").write_text(textwrap.dedent(source))
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[fxopt.passes]", *lines]))


def test_a_package_offers_passes_as_entry_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "plug-one", {"plugged": "plug_one:Plugged"})
    monkeypatch.syspath_prepend(tmp_path)
    (pass_,) = resolve_passes("plugged{times=3}")
    assert repr(pass_) == "Plugged(times=3)"
    assert listed_passes().passes["plugged"] is type(pass_)
    with pytest.raises(PassError, match=r"unknown pass 'pluged'; did you mean 'plugged'\? Known: "):
        resolve_passes("pluged")


def test_entry_points_are_not_read_for_a_pass_that_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(**_: str) -> Any:
        raise AssertionError("entry points were read")

    monkeypatch.setattr(pass_registry, "entry_points", read)
    fxopt.register_pass(Halve)
    assert len(resolve_passes("halve, int8-linear{mode=static}, lower")) == 3


@pytest.mark.parametrize(
    ("points", "text"),
    [
        (
            {"plugged": "plug_bad:Missing"},
            "pass 'plugged' of plug-bad (plug_bad:Missing) can't be loaded: AttributeError: "
            "module 'plug_bad' has no attribute 'Missing'",
        ),
        (
            {"other": "plug_bad:Plugged"},
            "pass 'other' of plug-bad (plug_bad:Plugged): its class is called 'plugged': the two "
            "names must be one",
        ),
        (
            {"plugged": "plug_bad:dataclass"},
            "pass 'plugged' of plug-bad (plug_bad:dataclass): register_pass takes a class derived "
            "from fxopt.Pass, not <function dataclass at",
        ),
    ],
)
def test_a_package_that_offers_no_pass_is_named_and_keeps_no_other_from_being_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: dict[str, str], text: str
) -> None:
    install(tmp_path, "plug-bad", points)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "plug_bad", raising=False)
    (name,) = points
    with pytest.raises(PassError) as caught:
        resolve_passes(name)
    assert str(caught.value).startswith(text)
    listed = listed_passes()
    assert listed.failed[name].startswith(text)
    assert list(listed.passes) == list(PASSES)


def test_a_name_that_two_packages_offer_is_told_with_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "plug-left", {"plugged": "plug_left:Plugged"})
    install(tmp_path, "plug-right", {"plugged": "plug_right:Plugged"})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PassError) as caught:
        resolve_passes("plugged")
    told = str(caught.value)
    assert told.startswith("pass 'plugged' is offered by plug-")
    assert "plug-left (plug_left:Plugged)" in told
    assert "plug-right (plug_right:Plugged)" in told
    assert told.endswith(": uninstall one of them")
