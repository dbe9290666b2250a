"""The options of passes: what each pass declares, what it takes, and the text of every refusal."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import pytest
import torch
from syrupy.assertion import SnapshotAssertion

import fxopt
from fxopt import pass_registry
from fxopt.capture import capture
from fxopt.claim import Claim, Close, Exact, Sqnr
from fxopt.device import Device
from fxopt.errors import PassError
from fxopt.pass_list import PASSES, parse_passes
from fxopt.program import Program
from fxopt.rewriting import Pass, Plan
from fxopt.rewriting.options import follows

NAMES = {**vars(fxopt), "torch": torch}


@pytest.mark.parametrize("name", sorted(PASSES))
def test_a_pass_keeps_its_name_its_options_and_their_defaults(
    name: str, snapshot: SnapshotAssertion
) -> None:
    """A public interface: what is recorded here, users have written down in lists and scripts."""
    kind = PASSES[name]
    built = kind()
    options = [
        f"{field.name} = {field.default!r} -> {getattr(built, field.name)!r}"
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
    ]
    assert "\n".join([f"{built!r} {built.spec} {built.stage.name}", *options]) == snapshot


CHANGED: dict[str, Any] = {
    "include": ("*.query",),
    "exclude": ("*.key", "head"),
    "claim": Sqnr(33.0),
    "budget": Sqnr(41.0),
    "tied": True,
    "force": True,
    "strict": True,
    "prepack": False,
    "executor": False,
    "dynamic": True,
    "fallback": "eager",
    "device": "cpu:avx512_bf16",
    "dtype": torch.float16,
    "policy": ("*.head:high",),
    "gain": 0.25,
    "channels": 3,
    "alpha": 0.75,
    "target_flops": 0.5,
    "target_params": 0.5,
    "scope": ("heads", "*.3"),
    "ranking": "global",
    "round_to": 8,
    "seed": 3,
    "again": True,
    "reconstruct": True,
    "activations": "affine",
    "observer": "mse",
    "weights": "gptq",
    "max_layers": 0,
    "where": "always",
    "range": 7,
    "weight_only": True,
}
OWN: dict[tuple[str, str], Any] = {
    ("autocast", "mode"): "half",
    ("int8-linear", "mode"): "static",
    ("lower", "mode"): "max-autotune",
    ("smooth-quant", "mode"): "static",
    ("int4-linear", "group"): 64,
    ("int4-linear", "scheme"): "affine",
    ("int4-linear", "activations"): "int8",
    ("prune-channels", "importance"): "taylor",
    ("prune-channels", "ratio"): 0.125,
    ("sparsify24", "importance"): "wanda",
    ("split-outliers", "ratio"): 3.5,
}
TOGETHER: dict[tuple[str, str], dict[str, Any]] = {
    ("int8-linear", "group"): {"group": 32, "mode": "weight_only"},
    ("prune-channels", "weighting"): {"weighting": "fisher", "importance": "obs"},
    ("lower", "backend"): {},
    ("half-linear", "lossless"): {"lossless": False, "weight_only": True},
}
"""Options that a pass takes only with others, or that have a single value."""

OPTIONS = [
    (name, field.name)
    for name, kind in sorted(PASSES.items())
    for field in dataclasses.fields(kind)  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_an_option_survives_its_text_and_its_repr(
    name: str, option: str, snapshot: SnapshotAssertion
) -> None:
    value = OWN.get((name, option), CHANGED.get(option))
    given = TOGETHER.get((name, option), {option: value})
    built = PASSES[name](**given)
    assert all(getattr(built, key) == value for key, value in given.items())
    assert parse_passes(built.spec) == (built,)
    assert eval(repr(built), dict(NAMES)) == built
    assert f"{built!r} {built.spec}" == snapshot


@pytest.mark.parametrize(
    ("given", "text", "kept"),
    [
        (fxopt.Int8Linear(include="a.*"), "int8-linear{include=a.*}", ("a.*",)),  # type: ignore[arg-type]
        (fxopt.SmoothQuant(include=["a", "b"]), "smooth-quant{include=a|b}", ("a", "b")),  # type: ignore[arg-type]
        (fxopt.PruneChannels(scope="heads"), "prune-channels{scope=heads}", ("heads",)),  # type: ignore[arg-type]
        (fxopt.HalfLinear(include=()), "half-linear{include=}", ()),
        (fxopt.HalfLinear(dtype="float16"), "half-linear{dtype=torch.float16}", torch.float16),  # type: ignore[arg-type]
        (fxopt.HalfLinear(dtype=torch.bfloat16), "half-linear{dtype=bfloat16}", torch.bfloat16),
        (fxopt.Autocast(policy={"*.head": "high"}), "autocast{policy=*.head:high}", None),  # type: ignore[arg-type]
        (fxopt.Autocast(device=Device.parse("cpu:none")), "autocast{device=cpu:none}", "cpu:none"),  # type: ignore[arg-type]
        (fxopt.SmoothQuant(alpha="auto"), "smooth-quant{alpha=auto}", "auto"),
        (fxopt.SmoothQuant(alpha=1), "smooth-quant{alpha=1}", 1),
        (fxopt.Int8Linear(range=8), "int8-linear{range=8}", 8),
        (fxopt.Int8Linear(claim=Close(None, 1e-3)), "int8-linear{claim=close(none|1e-3)}", None),
        (fxopt.Int8Linear(claim=Exact()), "int8-linear{claim=exact}", Exact()),
        (fxopt.Int8Linear(budget=None), "int8-linear{budget=NONE, claim=none}", None),
        (fxopt.Lower(dynamic=False), "lower{ dynamic = FALSE }", False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_given_in_python_and_as_text_is_one_pass(given: Pass, text: str, kept: Any) -> None:
    assert parse_passes(text) == (given,)
    assert kept is None or kept in [getattr(given, f.name) for f in dataclasses.fields(given)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "claim"),
    [
        ({}, Sqnr(16.0)),
        ({"mode": "static"}, Sqnr(10.0)),
        ({"mode": "weight_only"}, Sqnr(26.0)),
        ({"budget": Sqnr(20.0)}, Sqnr(17.0)),
        ({"budget": Sqnr(2.0)}, Sqnr(1.0)),
        ({"budget": Sqnr(2.0), "claim": Close()}, Close()),
    ],
)
def test_a_claim_left_out_follows_from_the_other_options(
    options: dict[str, Any], claim: Any
) -> None:
    assert fxopt.Int8Linear(**options).claim == claim
    assert fxopt.Int8Linear(**options, activations=None).activations == (
        "affine" if options.get("mode") == "static" else "symmetric"
    )


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        (
            fxopt.PruneChannels,
            {"ratio": 1.0},
            "PruneChannels(ratio=1.0): give a share between 0 and 1, both excluded, or None",
        ),
        (
            fxopt.PruneChannels,
            {"ratio": 0.5, "target_params": 0.25},
            "PruneChannels(ratio=0.5, target_params=0.25): give one of ratio, target_flops, "
            "target_params: each of them says how much is cut",
        ),
        (
            fxopt.PruneChannels,
            {"round_to": True},
            "PruneChannels(round_to=True): give a whole number from 1 on",
        ),
        (
            fxopt.PruneChannels,
            {"scope": ()},
            "PruneChannels(scope=()): give kinds (ffn, heads, queries, head_dim, residual, "
            "channels) or globs over the groups' names",
        ),
        (
            fxopt.PruneChannels,
            {"weighting": "fisher"},
            "PruneChannels(weighting='fisher', importance='l2', reconstruct=False): give "
            'importance="obs" or reconstruct=True, which look at the calibration\'s rows that '
            "weighting weighs",
        ),
        (fxopt.PruneChannels, {"seed": 0.5}, "PruneChannels(seed=0.5): give a whole number"),
        (
            fxopt.PruneChannels,
            {"ranking": "all"},
            'PruneChannels(ranking=\'all\'): give "local" (within each group) or "global" (over '
            "all groups)",
        ),
        (fxopt.PruneChannels, {"again": 1}, "PruneChannels(again=1): give True or False"),
        (fxopt.Int8Linear, {"tied": "yes"}, "Int8Linear(tied='yes'): give True or False"),
        (
            fxopt.Canonicalize,
            {"claim": 30},
            "Canonicalize(claim=30): give a claim: Exact(), Close() or Sqnr(30.0)",
        ),
        (
            fxopt.Canonicalize,
            {"claim": None},
            "Canonicalize(claim=None): give a claim: Exact(), Close() or Sqnr(30.0)",
        ),
        (
            fxopt.Float8Linear,
            {"include": 3},
            "Float8Linear(include=3): give globs over module paths",
        ),
        (
            fxopt.SplitOutliers,
            {"ratio": math.inf},
            "SplitOutliers(ratio=inf): give a number above 1",
        ),
        (
            fxopt.SplitOutliers,
            {"ratio": math.nan},
            "SplitOutliers(ratio=nan): give a number above 1",
        ),
        (
            fxopt.HalfLinear,
            {"device": torch.device("cpu")},
            "HalfLinear(device=device(type='cpu')): give a description such as \"cuda:8.0\" or "
            '"cpu:avx512_bf16", or None for the device that the model is on',
        ),
        (
            fxopt.Autocast,
            {"policy": "head"},
            "Autocast(policy='head'): give globs over module paths or operators and their sides, "
            "each one of 'low', 'high', 'either': {'*.classifier': 'high'}",
        ),
    ],
)
def test_what_an_option_does_not_take_is_refused_with_what_to_give(
    kind: type[Pass], options: dict[str, Any], text: str
) -> None:
    with pytest.raises(PassError) as caught:
        kind(**options)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "int8-linear{group=big}",
            "Int8Linear(group='big'): give a whole number from 1 on, or None",
        ),
        ("int8-linear{max_layers=1.5}", "Int8Linear(max_layers='1.5'): give a whole number from 0"),
        ("int8-linear{tied=1}", "Int8Linear(tied='1'): give True or False"),
        ("int8-linear{range=6}", "Int8Linear(range='6'): give one of 'auto', 7, 8"),
        ("int8-linear{mode=ststic}", "Int8Linear(mode='ststic'): give one of 'dynamic', 'static'"),
        ("int8-linear{budget=close}", "Int8Linear(budget='close'): write sqnr(30)"),
        ("canonicalize{claim=none}", "Canonicalize(claim='none'): write exact, close, close(1e-4)"),
        ("smooth-quant{alpha=best}", "SmoothQuant(alpha='best'): give a number from 0 to 1, or 'a"),
        ("autocast{policy=head}", "Autocast(policy='head'): give globs over module paths or opera"),
        ("half-linear{dtype=int8}", "HalfLinear(dtype='int8'): give \"auto\", torch.bfloat16 or"),
        ("half-linear{device=tpu}", "HalfLinear(device='tpu'): no device is called 'tpu'"),
        ("own{table=x}", "own has no option 'table'; it takes count, weights, where, path"),
        ("own", "own needs count: write own{count=...}"),
        ("own{count=3, path=x}", "Own(path='x'): give an instance of Path to the pass in Python: "),
    ],
)
def test_a_text_that_an_option_cannot_read_is_refused_with_what_to_give(
    text: str, message: str, own: type[Pass]
) -> None:
    with pytest.raises(PassError) as caught:
        parse_passes(text)
    assert str(caught.value).startswith(message)


ODD = [None, True, 0, -1, 7.5, math.nan, math.inf, "x", "", b"x", (), (3,), [None], {"a": 1}]
ODD += [object(), len, int, torch.tensor(1.0), torch.ones(2), torch.int8, Exact(), Sqnr(9.0)]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_whatever_is_given_is_taken_for_good_or_refused_by_name(name: str, option: str) -> None:
    kind = PASSES[name]
    for value in ODD:
        try:
            built = kind(**{option: value})
        except PassError as error:
            assert str(error).startswith(f"{kind.__name__}({option}={value!r}")  # noqa: PT017
            assert ": " in str(error).partition(f"={value!r}")[2]  # noqa: PT017
            continue
        assert kind(**{option: getattr(built, option)}) == built
        if not isinstance(getattr(built, option), tuple) or not any(
            callable(item) for item in getattr(built, option)
        ):
            assert eval(repr(built), dict(NAMES)) == built


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_whatever_text_an_option_has_is_read_for_good_or_refused_by_name(
    name: str, option: str
) -> None:
    for text in ("", "none", "true", "0", "-1", "7.5", "nan", "inf", "x", "a|b", "sqnr(9)", "|"):
        try:
            (built,) = parse_passes(f"{name}{{{option}={text}}}")
        except PassError as error:
            assert str(error).startswith(f"{PASSES[name].__name__}({option}=")  # noqa: PT017
        else:
            assert parse_passes(built.spec) == (built,)


class Sized(Protocol):
    def size(self) -> int: ...


@dataclass(frozen=True, repr=False)
class Loose(fxopt.Canonicalize):
    """Annotations that isinstance can't check."""

    sized: Sized | None = None
    numbers: list[int] | None = None
    odd: [int] = None  # type: ignore[valid-type]


def test_what_is_no_class_is_not_checked() -> None:
    assert Loose(sized=3, numbers="x", odd=5).odd == 5  # type: ignore[arg-type]


@dataclass(frozen=True)
class OwnPlan(Plan):
    scale: float = 1.0


@dataclass(frozen=True, repr=False)
class Own(Pass[OwnPlan]):
    """A user's pass.

    It has options of its own.
    """

    count: int
    weights: tuple[float, ...] = (1.0,)
    where: Literal["here", "there"] = "here"
    path: Path | None = None
    claim: Claim = follows()
    name: ClassVar[str] = "own"

    def default_claim(self) -> Claim:
        return Exact() if self.where == "here" else Close()

    def plan(self, program: Program) -> OwnPlan:
        return OwnPlan(repr(self))

    def apply(self, program: Program, plan: OwnPlan) -> Program:
        return program


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> type[Pass]:
    monkeypatch.setattr(pass_registry, "_registered", {})
    return fxopt.register_pass(Own)


def test_the_annotations_of_a_users_pass_declare_its_options(own: type[Pass]) -> None:
    assert parse_passes("own{count=3, weights=1|0.5, where=there}") == (
        Own(3, weights=[1.0, 0.5], where="there"),  # type: ignore[arg-type]
    )
    assert Own(3).claim == Exact()
    assert Own(3, where="there", path=Path("x")).claim == Close()
    assert repr(Own(3, where="there")) == "Own(count=3, where='there')"
    with pytest.raises(PassError) as caught:
        Own(3, weights="x")  # type: ignore[arg-type]
    assert str(caught.value) == "Own(weights='x'): give one or several, each a number"


def test_a_type_that_is_not_to_be_found_leaves_its_own_option_unchecked() -> None:
    @dataclass(frozen=True, repr=False)
    class Partial(Own):
        table: Elsewhere = None  # type: ignore[name-defined]  # noqa: F821

    assert Partial(3, table=5).table == 5
    with pytest.raises(PassError, match=r"^Partial\(count='x'\): give a whole number$"):
        Partial("x")  # type: ignore[arg-type]


MODEL = torch.nn.Linear(4, 4)
PLANNED = [fxopt.Int8Linear, fxopt.Int4Linear, fxopt.HalfLinear, fxopt.Autocast, fxopt.FoldPruned]
PLANNED += [fxopt.PruneChannels, fxopt.Sparsify24, fxopt.SmoothQuant, fxopt.SplitOutliers]
PLANNED += [fxopt.ShiftChannels]


@pytest.mark.parametrize("kind", PLANNED)
def test_the_plan_of_another_pass_is_refused(kind: type[Pass]) -> None:
    program = capture(MODEL, (torch.ones(2, 4),))
    pass_, other = kind(), Own(1)
    for act in (pass_.apply, pass_.oracle):
        if act == pass_.oracle and kind is not fxopt.PruneChannels:
            continue
        with pytest.raises(PassError) as caught:
            act(program, other.plan(program))
        assert str(caught.value) == (
            f"{kind.__name__}() can't apply this OwnPlan: give the {kind.plan_type.__name__} that "
            "its own plan() made"
        )
    with pytest.raises(PassError, match=r"can't apply this Plan: give the OwnPlan that"):
        other.apply(program, fxopt.Canonicalize().plan(program))
