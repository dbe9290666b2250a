"""Bad usage and input, exit codes of real processes, the help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fxopt.cli import app, preparing
from tests.cli.command import SIZES, process, refused


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ("optimize", "no/such/folder"),
            "error: no/such/folder doesn't exist. MODEL is a local folder that holds config.json "
            "and weights, or a .gguf file; nothing is downloaded.",
        ),
        (
            ("inspect", "model.gguf"),
            "error: model.gguf doesn't exist. MODEL is a local folder that holds config.json and "
            "weights, or a .gguf file; nothing is downloaded.",
        ),
        (
            ("optimize", "BERT", "-p", "int8-linaer"),
            "error: unknown pass 'int8-linaer'; did you mean 'int8-linear'? Known: ",
        ),
        (("optimize", "BERT", "-p", ""), "error: passes is empty, so there is nothing to do."),
        (
            ("optimize", "BERT", "-p", "lower, prepack"),
            "error: Prepack() comes after Lower(), but lowering ends a list",
        ),
        (
            ("optimize", "BERT", "-p", "canonicalize", "--on-violation", "ignore"),
            "error: on_violation='ignore': must be 'raise' or 'revert'",
        ),
        (
            ("optimize", "BERT", "-p", "canonicalize", "--report", "report.pdf"),
            "Invalid value for '--report': end 'report.pdf' in .html, .json, .txt",
        ),
        (("bench", "BERT", "--length", "1"), "Invalid value for '--length'"),
        (
            ("bench", "BERT", "-p", "a=canonicalize", "-p", "a = prepack"),
            "error: two pass lists are called 'a': name them apart, as NAME=LIST",
        ),
        (
            ("compare", "BERT", "-p", "original=canonicalize"),
            "error: 'original' is what the model is called as it was given: choose another name",
        ),
        (("compare", "BERT", "-p", "int8=int8-linaer"), "error: unknown pass 'int8-linaer'"),
        (
            ("compare", "BERT", "--out", "page.pdf"),
            "Invalid value for '--out': end 'page.pdf' in .html, .json, .txt",
        ),
        (("bench", "BERT", "--watts", "0"), "Invalid value for '--watts'"),
        (
            ("search", "BERT", "--metric", "accuracy"),
            "error: unknown metric 'accuracy': write cosine, top1, perplexity, or FILE.py:FUNCTION "
            "for a function of a model and its data that returns a number",
        ),
        (
            ("search", "BERT", "--metric", "no.py:score"),
            "error: --metric: no.py doesn't exist; give a Python file and its function",
        ),
        (("search", "BERT", "--objective", "speed"), "error: "),
        (("search", "BERT", "--tolerance=-1"), "error: tolerance=-1.0: give how much of the"),
        (("optimise",), "No such command 'optimise'"),
    ],
)
def test_bad_usage_or_input_exits_with_two(
    bert: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: tuple[str, ...], text: str
) -> None:
    given = [bert if argument == "BERT" else argument for argument in arguments]
    if given[0] in ("optimize", "search"):
        given += SIZES
    code, printed = refused(monkeypatch, capsys, *given)
    assert code == 2
    assert text in printed
    assert "capturing" not in printed


def test_calibration_texts_need_a_tokenizer(
    bert: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for command in ("optimize", "inspect", "bench", "compare", "search"):
        given = [command, bert, "-p", "canonicalize", *SIZES, "--calibration", "texts.txt"]
        code, printed = refused(monkeypatch, capsys, *given)
        assert code == 2
        assert f"error: {bert} has no tokenizer (no tokenizer_config.json)" in printed


@pytest.mark.parametrize("command", ["compare", "search"])
def test_texts_to_judge_on_must_be_there(
    command: str, reader: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    given = [command, reader, "-p", "canonicalize", *SIZES, "--data", "no.txt"]
    code, printed = refused(monkeypatch, capsys, *given)
    assert code == 2
    assert "texts from no.txt: No such file or directory" in printed


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("def other(model, data): ...", "has no function 'score'"),
        ("1 / 0", "failed with ZeroDivisionError: division by zero"),
        ("def score(model, data): return 'good'", "could not convert string to float: 'good'"),
    ],
)
def test_a_metric_of_a_file_that_is_of_no_use(
    content: str,
    text: str,
    bert: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    file = tmp_path / "metric.py"
    file.write_text(content)
    given = ["search", bert, *SIZES, "--metric", f"{file}:score"]
    code, printed = refused(monkeypatch, capsys, *given)
    assert code == 2
    assert "error: --metric: " in printed
    assert text in printed


def test_a_metric_that_does_not_apply(
    bert: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code, printed = refused(monkeypatch, capsys, "search", bert, *SIZES, "--metric", "perplexity")
    assert code == 2
    assert "error: --metric perplexity doesn't apply to the outputs of this model" in printed


def test_ctrl_c_before_anything_was_measured(
    bert: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing, "load_model", interrupted)
    for command in ("optimize", "inspect", "bench", "compare", "search"):
        code, printed = refused(monkeypatch, capsys, command, bert)
        assert code == 130
        assert "interrupted: nothing was measured" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
def test_cuda_where_there_is_none(bert: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    code, printed = refused(monkeypatch, capsys, "inspect", bert, "--device", "cuda")
    assert code == 2
    assert "error: device 'cuda' was asked for, but this machine" in printed
    assert "Use --device cpu" in printed


def test_no_arguments_show_the_help() -> None:
    result = CliRunner().invoke(app, [])
    for command in ("optimize", "inspect", "bench", "compare", "search"):
        assert command in result.output


def test_a_real_process_exits_with_zero_and_prints_json_only(bert: str) -> None:
    done = process("inspect", bert, *SIZES, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "BertModel"


def test_a_real_process_exits_with_one_when_a_claim_fails(bert: str) -> None:
    passes = "int8-linear{claim=sqnr(90), where=always}"
    done = process("optimize", bert, "-p", passes, *SIZES, "--json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "broke its claim" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_real_process_exits_with_two_on_bad_input() -> None:
    done = process("optimize", "no/such/folder")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "error: no/such/folder doesn't exist." in done.stderr
    assert "Traceback" not in done.stderr
