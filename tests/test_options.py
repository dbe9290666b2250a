"""The options of passes: what each pass declares, what it takes, and the text of every refusal."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from syrupy.assertion import SnapshotAssertion

import fxopt
from fxopt.claim import Close, Exact, Sqnr
from fxopt.device import Device
from fxopt.pass_list import PASSES, parse_passes
from fxopt.rewriting import Pass

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
}
OWN: dict[tuple[str, str], Any] = {
    ("autocast", "mode"): "half",
    ("int8-linear", "mode"): "static",
    ("lower", "mode"): "max-autotune",
    ("smooth-quant", "mode"): "static",
    ("int4-linear", "group"): 64,
    ("prune-channels", "importance"): "taylor",
    ("prune-channels", "ratio"): 0.125,
    ("sparsify24", "importance"): "wanda",
    ("split-outliers", "ratio"): 3.5,
}
TOGETHER: dict[tuple[str, str], dict[str, Any]] = {
    ("int8-linear", "group"): {"group": 32, "mode": "weight_only"},
    ("prune-channels", "weighting"): {"weighting": "fisher", "importance": "obs"},
    ("lower", "backend"): {},
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
