"""`fxopt passes`: every pass with its options, in text and in JSON; a package's among them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fxopt.pass_list import PASSES, parse_passes
from tests.cli.command import run
from tests.test_pass_registry import install

NEEDING_OTHERS = {
    ("prune-channels", "weighting"),
    ("half-linear", "lossless"),
    ("int4-linear", "weights"),
}
"""Options whose other choice needs another option."""


def test_every_pass_is_listed_with_its_options() -> None:
    text = run("passes").stdout
    assert [line.split()[0] for line in text.splitlines() if line[:1].strip()] == list(PASSES)
    assert (
        "int4-linear  (numerics, sqnr(5.0))\n"
        "  Linear layers on int4 weights, two a byte; activations stay as they are, "
        "or become int8.\n"
        "    group        a whole number from 2 on, a multiple of 2 | none  [none]\n"
        "    weights      nearest | hqq | weighted | gptq | awq | awq-gptq  [nearest]\n"
        "    include      globs over module paths, separated by |  [*]\n"
        "    exclude      globs over module paths, separated by |  [empty]\n"
        "    tied         true | false  [false]\n"
        "    claim        exact | close | close(1e-4) | sqnr(30)  "
        "[sqnr(5.0), by the other options]\n"
        "    scheme       symmetric | affine  [symmetric]\n"
        "    activations  float | int8  [float]\n"
    ) in text
    assert max(map(len, text.splitlines())) <= 100


def test_with_json_each_choice_can_be_written_in_a_list() -> None:
    document = json.loads(run("passes", "--json").stdout)
    assert [entry["name"] for entry in document["passes"]] == list(PASSES)
    assert document["failed"] == {}
    for entry in document["passes"]:
        assert entry["description"].endswith("."), entry
        for option in entry["options"]:
            if (entry["name"], option["name"]) in NEEDING_OTHERS:
                continue
            for choice in option["choices"]:
                (pass_,) = parse_passes(f"{entry['name']}{{{option['name']}={choice}}}")
                assert str(getattr(pass_, option["name"])) == str(choice)
    (int8,) = [entry for entry in document["passes"] if entry["name"] == "int8-linear"]
    assert int8["class"] == "fxopt.passes.quantization.int8_linear.Int8Linear"
    assert int8["stage"] == "numerics"
    assert int8["claim"] == "sqnr(16.0)"
    options = {option.pop("name"): option for option in int8["options"]}
    assert options["mode"] == {
        "takes": "dynamic | static | weight_only",
        "choices": ["dynamic", "static", "weight_only"],
        "default": "dynamic",
        "required": False,
        "follows_others": False,
    }
    assert options["include"]["default"] == ["*"]
    assert options["claim"]["follows_others"]


@pytest.mark.parametrize("broken", [False, True])
def test_the_passes_of_packages_are_listed_and_named_in_lists(tmp_path: Path, broken: bool) -> None:
    install(tmp_path, "plug-cli", {"plugged": f"plug_cli:{'Missing' if broken else 'Plugged'}"})
    path = os.pathsep.join([str(tmp_path), *sys.path])

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fxopt", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )

    listed = command("passes")
    assert listed.returncode == 0
    if broken:
        assert listed.stderr.startswith("warning: pass 'plugged' of plug-cli (plug_cli:Missing)")
        assert "plugged" not in listed.stdout
    else:
        last = ["plugged  (any, close)", "  Does nothing, from a package."]
        assert listed.stdout.splitlines()[-3:] == [*last, "    times  a whole number  [1]"]
        wrong = command("bench", "no/such/folder", "--passes", "plugged{times=x}")
        assert wrong.returncode == 2
        assert wrong.stderr == "error: Plugged(times='x'): give a whole number\n"
