"""`fxopt optimize`: what it prints, what it writes, and how it exits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fxopt
from fxopt.cli import destinations, optimizing
from fxopt.report import Report
from tests.cli.command import SIZES, refused, run


def test_optimize_prints_the_report_and_saves_what_it_is_told(bert: str, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.html"
    result = run(
        *("optimize", bert, "--passes", "canonicalize, fuse-linears, int8-linear", *SIZES),
        *("--out", str(out), "--report", str(report)),
    )
    assert "BertModel" in result.stdout
    for text in ("canonicalize", "fuse-linears", "int8-linear", f"program saved to {out}"):
        assert text in result.stdout
    assert f"report saved to {report}" in result.stdout
    assert report.read_text().lower().startswith("<!doctype html>")
    loaded = fxopt.load(out)
    ids = torch.arange(24).view(2, 12)
    output = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    original = transformers.BertModel.from_pretrained(bert).eval()
    expected = original(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert fxopt.Sqnr(15.0).measure(expected, output).holds


@pytest.mark.parametrize("suffix", ["json", "txt"])
def test_the_suffix_says_how_the_report_is_written(bert: str, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"report.{suffix}"
    run("optimize", bert, "-p", "canonicalize", *SIZES, "--report", str(path))
    content = path.read_text()
    if suffix == "json":
        assert Report.from_json(content).model == "BertModel"
    else:
        assert "canonicalize" in content


def test_optimize_with_json_prints_one_document_and_nothing_else(bert: str) -> None:
    result = run("optimize", bert, "-p", "fuse-linears", *SIZES, "--json")
    report = Report.from_json(result.stdout)
    assert [step.name for step in report.steps] == ["capture", "fuse-linears"]
    assert report.steps[1].fired == {"FuseSiblings": 2}
    assert "running FuseLinears()" in result.stderr
    json.loads(result.stdout)


def test_revert_from_the_command_line(bert: str) -> None:
    passes = "int8-linear{claim=sqnr(90)}"
    result = run("optimize", bert, "-p", passes, *SIZES, "--on-violation", "revert", "--json")
    assert Report.from_json(result.stdout).steps[-1].reverted


def test_calibration_texts_reach_the_transformation(
    reader: str, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def spy(model: Any, passes: str, **options: Any) -> Any:
        sizes.extend(batch["input_ids"].shape[0] for batch in options["calibration"])
        return fxopt.transform(model, passes, **options)

    monkeypatch.setattr(optimizing, "transform", spy)
    options = ["-p", "canonicalize", *SIZES, "--calibration", texts]
    result = run("optimize", reader, *options)
    assert sizes == [8, 8, 4]
    assert "calibration= was given, but no pass of the list asked for it" in " ".join(
        result.stdout.split()
    )


def test_a_claim_that_fails_exits_with_one(
    bert: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code, printed = refused(
        monkeypatch, capsys, "optimize", bert, "-p", "int8-linear{claim=sqnr(90)}", *SIZES
    )
    assert code == 1
    assert "claim failed: Int8Linear(claim=Sqnr(db=90.0)) broke its claim" in printed
    assert "guilty node" in printed


@pytest.mark.parametrize("suffix", destinations.SUFFIXES)
def test_every_suffix_that_is_let_through_can_be_written(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"report{suffix}"
    Report("Nothing", 0.0, ()).save(path)
    assert path.exists()
