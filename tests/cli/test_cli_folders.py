"""Real folders: models of two halves, and places that can't be written, found before the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fxopt
from fxopt.errors import SaveError
from tests.cli.command import SIZES, refused, run
from tests.seq2seq import SEQ2SEQ


@pytest.mark.parametrize(("name", "first"), [("t5", "input_ids"), ("whisper", "input_features")])
def test_an_encoder_with_a_decoder_is_inspected(name: str, first: str, tmp_path: Path) -> None:
    SEQ2SEQ[name]().save_pretrained(tmp_path)
    shown = json.loads(run("inspect", str(tmp_path), *SIZES, "--json").stdout)
    names = [text.split(":")[0] for text in shown["inputs"]]
    assert names[0] == first
    assert names[-1] == "decoder_input_ids"


def test_what_of_the_folder_is_left_out_is_printed(bert: str, tmp_path: Path) -> None:
    for file in Path(bert).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    printed = run("inspect", str(tmp_path), *SIZES).stderr
    assert "warning: 16 weights of" in printed
    assert "have no place in BertModel: encoder.layer.1." in printed


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with something of the user's."""
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("x")
    return folder


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("optimize", "--out", "FOREIGN"), "--out: "),
        (("optimize", "--out", "FOREIGN/chapter.tex/program"), "--out: "),
        (("optimize", "--report", "FOREIGN/no/report.html"), "--report "),
        (("optimize", "--report", "FOREIGN/chapter.tex/report.txt"), "--report "),
        (("compare", "--out", "FOREIGN/no/page.html"), "--out "),
    ],
)
def test_where_nothing_can_be_written_is_said_before_the_work(
    arguments: tuple[str, ...],
    text: str,
    bert: str,
    foreign: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    command, *options = (argument.replace("FOREIGN", str(foreign)) for argument in arguments)
    code, printed = refused(monkeypatch, capsys, command, bert, *SIZES, *options)
    assert code == 2
    assert f"error: {text}" in printed
    assert "loading" not in printed
    assert [path.name for path in foreign.iterdir()] == ["chapter.tex"]
    assert [path.name for path in foreign.parent.iterdir()] == ["thesis"]


def test_a_program_that_cannot_be_saved_leaves_the_report(
    bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, folder: Any) -> None:
        raise SaveError("no space left on device")

    monkeypatch.setattr(fxopt.Optimized, "save", full)
    out, report = tmp_path / "program", tmp_path / "report.json"
    options = ["-p", "canonicalize", "--out", str(out), "--report", str(report)]
    result = run("optimize", bert, *SIZES, *options, code=1)
    assert isinstance(result.exception, SaveError)
    assert "canonicalize" in result.stdout
    assert f"report saved to {report}" in result.stdout
    assert "program saved to" not in result.stdout
    assert json.loads(report.read_text())


def test_a_metric_that_raises_is_named(
    bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = tmp_path / "metric.py"
    file.write_text("def score(model, data): return {}['f1']")
    given = ["search", bert, *SIZES, "--metric", f"{file}:score"]
    code, printed = refused(monkeypatch, capsys, *given)
    assert code == 2
    assert "error: metric= raised KeyError: 'f1'" in printed
