"""Pass lists and their textual specs: what parses, to what, and what is refused with which text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxopt
from fxopt.claim import Claim, Close, Exact, Sqnr
from fxopt.errors import FxoptError, PassError
from fxopt.pass_list import PASSES, parse_passes, resolve_passes
from fxopt.program import Program
from fxopt.rewriting import Pass, Plan, Rule, SingleRule, hole, op

_POSITIVE = st.floats(1e-12, 1e6, allow_nan=False, allow_infinity=False)
_GLOBS = st.lists(st.text("abz019_.*?[]-", min_size=1, max_size=8), min_size=0, max_size=3).map(
    tuple
)
_CLAIMS: st.SearchStrategy[Claim] = st.one_of(
    st.just(Exact()),
    st.builds(Close, st.none() | _POSITIVE, _POSITIVE),
    st.builds(Sqnr, _POSITIVE),
)
_OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "claim": _CLAIMS,
    "include": _GLOBS,
    "exclude": _GLOBS,
    "tied": st.booleans(),
    "strict": st.booleans(),
    "dynamic": st.sampled_from([None, True, False]),
    "fallback": st.sampled_from([None, "eager"]),
    "backend": st.just("inductor"),
    "force": st.booleans(),
    "dtype": st.sampled_from(["auto", torch.bfloat16, torch.float16]),
    "policy": st.sampled_from([(), ("*.head:high",), ("*.head:high", "aten.gelu:low")]),
    "device": st.sampled_from([None, "cpu", "cuda:8.0", "cpu:amx_bf16+avx512_bf16"]),
    "channels": st.integers(1, 99),
    "scope": st.sampled_from([("ffn",), ("ffn", "heads"), ("*.layer.0.*",)]),
    "ranking": st.sampled_from(["local", "global"]),
    "round_to": st.integers(1, 64),
    "reconstruct": st.booleans(),
    "prepack": st.booleans(),
    "executor": st.booleans(),
    "scheme": st.sampled_from(["symmetric", "affine"]),
    "weight_only": st.booleans(),
    "lossless": st.booleans(),
    "weighting": st.just("uniform"),
    "seed": st.integers(0, 9),
    "gain": st.floats(0.01, 0.99),
    "again": st.booleans(),
    "alpha": st.just("auto") | st.floats(0.0, 1.0),
    "observer": st.sampled_from(["minmax", "percentile", "mse"]),
    "budget": st.none() | st.builds(Sqnr, _POSITIVE),
    "max_layers": st.none() | st.integers(0, 99),
    "where": st.sampled_from(["faster", "always"]),
    "range": st.sampled_from(["auto", 7, 8]),
}
_IMPORTANCES = {
    "sparsify24": st.sampled_from(["magnitude", "wanda", "sparsegpt"]),
    "prune-channels": st.sampled_from(["l1", "l2", "group_l2", "taylor", "obs", "random"]),
}
_RATIOS = {"split-outliers": st.floats(1.5, 1e6), "prune-channels": st.floats(0.01, 0.99)}
_GROUPS = {"int8-linear": st.none(), "int4-linear": st.sampled_from([None, 32, 128])}
_ACTIVATIONS = {
    "int8-linear": st.sampled_from(["symmetric", "affine"]),
    "int4-linear": st.sampled_from(["float", "int8"]),
}
_WEIGHTS = {
    "int8-linear": st.sampled_from(["nearest", "gptq"]),
    "int4-linear": st.sampled_from(["nearest", "hqq", "weighted", "gptq", "awq", "awq-gptq"]),
}
_MODES = {
    "autocast": st.sampled_from(["mixed", "full", "half"]),
    "int8-linear": st.sampled_from(["dynamic", "static", "weight_only"]),
    "lower": st.sampled_from([None, "default", "reduce-overhead", "max-autotune"]),
    "smooth-quant": st.sampled_from(["dynamic", "static"]),
}


def options_of(kind: type[Pass]) -> st.SearchStrategy[dict[str, Any]]:
    """Any values for any of the options of a pass."""
    fields = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    own = {
        "mode": _MODES,
        "group": _GROUPS,
        "importance": _IMPORTANCES,
        "ratio": _RATIOS,
        "weights": _WEIGHTS,
        "activations": _ACTIVATIONS,
    }
    known = {**_OPTIONS, **{name: of.get(kind.name, st.nothing()) for name, of in own.items()}}
    drawn = {name: known[name] for name in fields if not name.startswith("target_")}
    return st.fixed_dictionaries({}, optional=drawn).filter(agree)


def agree(options: dict[str, Any]) -> bool:
    """Whether these options go together, where the test of each pass says that some don't."""
    fits_zero_points = options.get("weights") in ("hqq", "weighted")
    without = fits_zero_points and options.get("scheme", "symmetric") == "symmetric"
    if options.get("weight_only"):
        return not options.get("force") and options.get("device") is None
    return not without and options.get("lossless", True)


passes = st.sampled_from(sorted(PASSES)).flatmap(
    lambda name: options_of(PASSES[name]).map(lambda options: PASSES[name](**options))
)


@given(passes)
def test_every_pass_survives_its_textual_form(pass_: Pass) -> None:
    assert parse_passes(pass_.spec) == (pass_,)
    assert eval(repr(pass_), {**vars(fxopt), "torch": torch}) == pass_


@given(st.lists(passes, min_size=1, max_size=4))
def test_a_list_of_specs_is_a_list_of_passes(drawn: list[Pass]) -> None:
    assert parse_passes(", ".join(pass_.spec for pass_ in drawn)) == tuple(drawn)
    assert parse_passes(" ,".join(f"  {pass_.spec}" for pass_ in drawn)) == tuple(drawn)


@given(st.text(max_size=30) | st.text("int8-linear{}=,|()canonicalize", max_size=40))
def test_any_text_parses_or_is_refused_on_purpose(text: str) -> None:
    try:
        parsed = parse_passes(text)
    except FxoptError as error:
        assert str(error)  # noqa: PT017
    else:
        assert all(isinstance(pass_, Pass) for pass_ in parsed)


@pytest.mark.parametrize("name", sorted(PASSES))
def test_every_registered_pass_has_its_own_name_and_no_needed_option(name: str) -> None:
    (pass_,) = parse_passes(name)
    assert type(pass_) is PASSES[name]
    assert pass_.name == name
    assert pass_ == PASSES[name]()
    assert repr(pass_) == f"{PASSES[name].__name__}()"
    assert pass_.spec == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        pass_.claim = Exact()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int8-linear{mode=weight_only}", fxopt.Int8Linear(mode="weight_only")),
        (
            "int8-linear{ mode = weight_only , tied=TRUE }",
            fxopt.Int8Linear("weight_only", tied=True),
        ),
        ("int8-linear{exclude=head|*.down}", fxopt.Int8Linear(exclude=("head", "*.down"))),
        ("int8-linear{claim=sqnr(30)}", fxopt.Int8Linear(claim=Sqnr(30.0))),
        ("int8-linear{claim=exact}", fxopt.Int8Linear(claim=Exact())),
        ("int8-linear{claim=close}", fxopt.Int8Linear(claim=Close())),
        ("int8-linear{claim=close(1e-3)}", fxopt.Int8Linear(claim=Close(1e-3))),
        ("int8-linear{claim=close(none|1e-3)}", fxopt.Int8Linear(claim=Close(None, 1e-3))),
        ("int8-linear{}", fxopt.Int8Linear()),
        (
            "int8-linear{mode=static, activations=symmetric, observer=minmax, weights=gptq}",
            fxopt.Int8Linear("static", activations="symmetric", observer="minmax", weights="gptq"),
        ),
        (
            "int8-linear{budget=sqnr(30), max_layers=3, where=always}",
            fxopt.Int8Linear(budget=Sqnr(30.0), max_layers=3, where="always"),
        ),
        ("int8-linear{mode=weight_only, group=32}", fxopt.Int8Linear("weight_only", group=32)),
        ("sparsify24{importance=wanda}", fxopt.Sparsify24("wanda")),
        ("sparsify24{device=cuda:8.0, tied=true}", fxopt.Sparsify24(device="cuda:8.0", tied=True)),
        (
            "prune-channels{target_flops=0.5, scope=ffn|heads, importance=obs, reconstruct=true}",
            fxopt.PruneChannels(
                target_flops=0.5, scope=("ffn", "heads"), importance="obs", reconstruct=True
            ),
        ),
        ("half-attention{force=true}", fxopt.HalfAttention(force=True)),
        ("lower{strict=true, dynamic=none}", fxopt.Lower(strict=True)),
    ],
)
def test_a_spec_is_the_pass_it_spells(text: str, expected: Pass) -> None:
    assert parse_passes(text) == (expected,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "int8-linaer",
            f"unknown pass 'int8-linaer'; did you mean 'int8-linear'? Known: {', '.join(PASSES)}",
        ),
        ("Canonicalise", "unknown pass 'Canonicalise'; did you mean 'canonicalize'? Known: "),
        ("quux", "unknown pass 'quux'. Known: canonicalize, "),
        ("lower{speed=3}", "lower has no option 'speed'; it takes "),
        ("canonicalize{x}", "canonicalize has no option 'x'; it takes claim"),
        (
            "canonicalize lower",
            "can't read the pass spec 'canonicalize lower' from 'lower' on: passes are separated "
            "by commas",
        ),
        ("lower{", "can't read the pass spec 'lower{' from '{' on: passes are separated by commas"),
        (
            "canonicalize, {x=1}",
            "can't read the pass spec 'canonicalize, {x=1}' from ' {x=1}' on: write "
            "name{option=value, ...}, name, ...",
        ),
        (
            "int8-linear{claim=nice}",
            "Int8Linear(claim='nice'): write exact, close, close(1e-4) or sqnr(30)",
        ),
        ("int8-linear{claim=sqnr(a)}", "Int8Linear(claim='sqnr(a)'): could not convert string"),
        ("int8-linear{claim=sqnr}", "Int8Linear(claim='sqnr'): "),
        ("int8-linear{claim=exact(1)}", "Int8Linear(claim='exact(1)'): "),
        (
            "int8-linear{claim=sqnr(-3)}",
            "Int8Linear(claim='sqnr(-3)'): Sqnr(-3.0): the floor must be a finite number of dB",
        ),
        ("int8-linear{mode=4bit}", "Int8Linear(mode='4bit'): give one of 'dynamic', "),
        ("lower{mode=fast}", "Lower(mode='fast'): give one of 'default', "),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(PassError) as caught:
        resolve_passes(text)
    assert str(caught.value).startswith(message)


class Twice(Rule):
    """x + x = 2 x"""

    pattern = op(torch.ops.aten.add.Tensor, hole("x"), hole("x"))


@dataclass(frozen=True, repr=False)
class Nothing(Pass):
    """Changes nothing."""

    name: ClassVar[str] = "nothing"

    def plan(self, program: Program) -> Plan:
        return Plan(repr(self))

    def apply(self, program: Program, plan: Plan) -> Program:
        return program


class LooksLikeAPass:
    def plan(self) -> None: ...

    def apply(self) -> None: ...


def test_instances_rules_and_specs_mix() -> None:
    rule = Twice()
    resolved = resolve_passes([Nothing(), rule, "canonicalize, fuse-linears", fxopt.Prepack()])
    assert resolved == (
        Nothing(),
        SingleRule(rule),
        fxopt.Canonicalize(),
        fxopt.FuseLinears(),
        fxopt.Prepack(),
    )


@pytest.mark.parametrize(
    "single", [Nothing(), "canonicalize", Twice()], ids=["pass", "spec", "rule"]
)
def test_one_pass_needs_no_list(single: Any) -> None:
    assert len(resolve_passes(single)) == 1


def test_a_generator_of_passes_is_taken() -> None:
    assert resolve_passes(pass_ for pass_ in (Nothing(), Nothing())) == (Nothing(), Nothing())


@pytest.mark.parametrize("empty", [[], (), "", "  ", [""]])
def test_an_empty_list_is_refused(empty: Any) -> None:
    with pytest.raises(PassError) as caught:
        resolve_passes(empty)
    assert str(caught.value) == (
        "passes is empty, so there is nothing to do. Give at least one, for example "
        "[fxopt.Canonicalize(), fxopt.Lower()], or use fxopt inspect to see a model's graph."
    )


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (3, "passes must be a list of passes, not int"),
        (None, "passes must be a list of passes, not NoneType"),
        ([fxopt.Int8Linear], "Int8Linear is a class; pass an instance: Int8Linear()"),
        ([Twice], "Twice is a class; pass an instance: Twice()"),
        (fxopt.Lower, "Lower is a class; pass an instance: Lower()"),
        (
            [LooksLikeAPass()],
            "LooksLikeAPass has plan and apply but isn't a fxopt.Pass; derive it from fxopt.Pass, "
            "which gives it a name, a stage and a claim",
        ),
        (
            [len],
            "<built-in function len> is no pass: give instances of fxopt.Pass or fxopt.Rule, or a "
            'spec such as "int8-linear{mode=dynamic}"',
        ),
    ],
)
def test_what_is_no_pass_is_refused(given_: Any, message: str) -> None:
    with pytest.raises(PassError) as caught:
        resolve_passes(given_)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (
            "lower, canonicalize",
            "Canonicalize() comes after Lower(), but lowering ends a list: move Canonicalize() "
            "before it",
        ),
        (
            "lower, lower",
            "Lower() comes after Lower(), but lowering ends a list: move Lower() before it",
        ),
        (
            "int8-linear{mode=weight_only}, fuse-conv-batch-norm",
            "FuseConvBatchNorm() (structure) comes after Int8Linear(mode='weight_only') "
            "(numerics), which would keep it from seeing what it rewrites: move "
            "FuseConvBatchNorm() before Int8Linear(mode='weight_only')",
        ),
        ("prepack, int8-linear", "Int8Linear() (numerics) comes after Prepack() (kernels), which"),
        (
            "prepack, canonicalize, fuse-linears",
            "FuseLinears() (structure) comes after Prepack() (kernels), which",
        ),
    ],
)
def test_an_order_that_cannot_work_names_both_passes(order: str, message: str) -> None:
    with pytest.raises(PassError) as caught:
        resolve_passes(order)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "order",
    [
        "canonicalize, fuse-linears, fuse-conv-batch-norm, int8-linear, canonicalize, lower",
        "fuse-conv-batch-norm, fuse-linears",
        "int8-linear, int8-linear{mode=weight_only}, select-kernels, canonicalize, lower",
    ],
)
def test_orders_that_work_are_kept_as_given(order: str) -> None:
    assert ", ".join(pass_.spec for pass_ in resolve_passes(order)) == order
