"""Writing beside peers: types of GGUF files, turns, and what is made of the times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as drawn
from typer.testing import CliRunner

from benchmarks import writing_peers
from benchmarks.recorded import read_results
from benchmarks.systems.gguf_files import _kind, rewritten, weight_bytes
from benchmarks.systems.k_quants import q4_k, q6_k
from benchmarks.systems.torch_writers import Stepping
from benchmarks.systems.writing import Source, WritingSystem, Written
from benchmarks.writing_peers import Job, equal_beginning, figures_of, measured, prepared
from fxopt.timing import summarize
from tests.generation.language_models import shared

gguf = pytest.importorskip("gguf", reason="needs gguf")
numpy = pytest.importorskip("numpy")

_ROWS = drawn.arrays(
    "float32", (2, 512), elements=st.floats(-64, 64, width=32), fill=st.floats(-1, 1, width=32)
)


@given(rows=_ROWS)
@pytest.mark.parametrize(("rounded", "kind", "steps"), [(q4_k, "Q4_K", 15), (q6_k, "Q6_K", 31)])
def test_k_quants_are_read_back_within_a_level(rows, rounded, kind: str, steps: int) -> None:  # type: ignore[no-untyped-def]
    """Of 4 bits a block of 32 has 16 levels over its range, of 6 bits 32 to each side."""
    found = gguf.dequantize(rounded(rows), gguf.GGMLQuantizationType[kind])
    size = 32 if kind == "Q4_K" else 16
    blocks, back = rows.reshape(-1, size), found.reshape(-1, size)
    reach = numpy.abs(rows.reshape(-1, 256)).max(-1).repeat(256 // size)
    spans = numpy.maximum(blocks.max(-1), 0) - numpy.minimum(blocks.min(-1), 0)
    # A level, what the scales of a block of 256 lose by being whole numbers, and the whole of
    # values so small that half precision has no scale for them.
    smallest = numpy.finfo("float16").smallest_subnormal * (63 * 15 if kind == "Q4_K" else 128 * 32)
    allowed = spans / steps + 4 * reach / 63 + smallest
    assert (numpy.abs(back - blocks).max(-1) <= allowed).all()


@pytest.mark.parametrize(("rounded", "kind"), [(q4_k, "Q4_K"), (q6_k, "Q6_K")])
@pytest.mark.parametrize("constant", [0.0, -0.01])
def test_constant_parts_of_a_block_leave_the_others_their_scales(  # type: ignore[no-untyped-def]
    rounded, kind: str, constant: float
) -> None:
    rows = numpy.full((1, 256), constant, "float32")
    rows[0, :32] = numpy.linspace(-0.01, 0.01, 32)
    found = gguf.dequantize(rounded(rows), gguf.GGMLQuantizationType[kind])
    assert numpy.abs(found - rows).max() < 1e-3


@pytest.mark.parametrize(("rounded", "kind", "least"), [(q4_k, "Q4_K", 22.0), (q6_k, "Q6_K", 34.0)])
def test_k_quants_are_as_good_as_those_of_llamacpp(rounded, kind: str, least: float) -> None:  # type: ignore[no-untyped-def]
    rows = numpy.random.default_rng(0).standard_normal((16, 512)).astype("float32")
    found = gguf.dequantize(rounded(rows), gguf.GGMLQuantizationType[kind])
    ratio = numpy.linalg.norm(rows) / numpy.linalg.norm(rows - found)
    assert 20 * numpy.log10(ratio) > least


@pytest.mark.parametrize(
    ("weights", "name", "columns", "kind"),
    [
        ("Q4_0", "token_embd.weight", 576, "Q8_0"),
        ("Q4_0", "blk.3.attn_q.weight", 576, "Q4_0"),
        ("Q4_K_M", "token_embd.weight", 576, "Q8_0"),
        ("Q4_K_M", "token_embd.weight", 512, "Q6_K"),
        ("Q4_K_M", "blk.0.ffn_down.weight", 1536, "Q6_K"),
        ("Q4_K_M", "blk.4.ffn_down.weight", 1536, "Q4_K"),
        ("Q4_K_M", "blk.0.attn_v.weight", 576, "Q8_0"),
        ("Q4_K_M", "blk.29.attn_q.weight", 576, "Q5_0"),
        ("Q8_0", "blk.29.attn_q.weight", 576, "Q8_0"),
    ],
)
def test_mixtures_are_those_of_llamacpp(weights: str, name: str, columns: int, kind: str) -> None:
    assert _kind(weights, name, columns, 30).name == kind


@pytest.mark.parametrize("weights", ["Q4_0", "Q4_K_M"])
def test_a_mixture_holds_the_same_weights(weights: str, tmp_path: Path) -> None:
    numbers = numpy.random.default_rng(0)
    source = tmp_path / "source.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    q4_1 = gguf.GGMLQuantizationType.Q4_1
    for name, columns in (("token_embd", 64), ("blk.0.ffn_down", 256), ("blk.1.attn_q", 64)):
        weight = numbers.standard_normal((4, columns)).astype("float32")
        writer.add_tensor(f"{name}.weight", gguf.quantize(weight, q4_1), raw_dtype=q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    target = rewritten(source, tmp_path / "target.gguf", weights)
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(target)
    for old, new in zip(before.tensors, after.tensors, strict=True):
        a, b = (gguf.dequantize(one.data, one.tensor_type) for one in (old, new))
        assert numpy.linalg.norm(a - b) <= 0.1 * numpy.linalg.norm(a)
    assert weight_bytes(target) == sum(int(tensor.n_bytes) for tensor in after.tensors)


@dataclass
class Told:
    """A writer whose times are told, and that keeps what it was asked."""

    step: float
    asked: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    weight_bytes: int | None = 4_000_000
    settings: str = "made up"

    def write(self, prompt: Sequence[int], new: int) -> Written:
        self.asked.append((tuple(prompt), new))
        return Written(tuple(range(new)), 10 * self.step, self.step + 0.1 * len(self.asked))


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing_peers, "_PAUSE_SECONDS", 0.0)


def test_every_writer_writes_once_a_round_behind_the_same_prompt() -> None:
    writers = {"a": Told(1.0), "b": Told(2.0)}
    found = measured(writers, Job(12, 3), list(range(20)), 3, whole=True)
    for name, writer in writers.items():
        assert len(found.step[name]) == 3  # the first round isn't kept
        assert writer.asked == [(tuple(range(8)), 2), (tuple(range(12)), 3)] * 4
        assert found.tokens[name] == (0, 1, 2)
        assert found.first[name] == [10 * writer.step] * 3
    assert not found.whole


def test_figures_hold_ratios_round_by_round_and_shares_of_the_bandwidth() -> None:
    writers = {"fxopt fp32": Told(1.0), "transformers fp32": Told(4.0)}
    jobs = {
        job: measured(writers, job, list(range(20)), 3, whole=False)
        for job in (Job(4, 2), Job(16, 2))
    }
    figures = figures_of(writers, jobs, summarize([10.0, 10.0]))
    row = figures["systems"]["fxopt fp32"]
    assert figures["jobs"] == ["4x2", "16x2"]
    assert row["tokens_of_the_original"] == 2
    assert row["share_of_read_bandwidth"] == round(4_000_000 / row["median_ms"] / 1e6 / 10, 3)
    assert row["step_ms_behind_16"] > row["median_ms"]
    steps = [a / b for a, b in zip(*(jobs[Job(4, 2)].step[name] for name in writers), strict=True)]
    pair = figures["ratios"]["fxopt fp32 / transformers fp32"]
    assert pair["median"] == round(sorted(steps)[1], 3)
    assert "fxopt fp32 behind 16 / transformers fp32 behind 16" in figures["ratios"]


def test_steps_of_a_model_are_those_of_its_generate() -> None:
    model, opt = shared("Llama")
    prompt = [5, 9, 11]
    written = [Stepping(one, "").write(prompt, 6).tokens for one in (model, opt)]
    ids = torch.tensor([prompt])
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6)
    assert written == [tuple(whole[0, 3:].tolist())] * 2
    assert Stepping(opt, "").weight_bytes == opt.programs[-1].parameter_bytes()


def test_what_is_missing_or_fails_is_left_out_with_a_word() -> None:
    def fails(source: Source) -> Told:
        raise RuntimeError("no such file\nand more")

    systems = [
        WritingSystem("a", lambda source: Told(1.0)),
        WritingSystem("b", lambda source: Told(1.0), ("no_package_of_this_name",)),
        WritingSystem("c", fails),
    ]
    said: list[str] = []
    writers, skipped = prepared(systems, SimpleNamespace(), said.append)  # type: ignore[arg-type]
    assert list(writers) == ["a"]
    assert skipped == {"b": "needs no_package_of_this_name", "c": "RuntimeError: no such file"}
    assert said[-1] == "c is left out: RuntimeError: no such file"


@given(same=st.integers(0, 5), more=st.integers(0, 3))
def test_tokens_are_equal_up_to_the_first_that_differs(same: int, more: int) -> None:
    one, other = [*range(same), *[1] * more], [*range(same), *[2] * more]
    assert equal_beginning(one, other) == same


def test_a_run_prints_a_table_and_writes_a_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    systems = (
        WritingSystem("fxopt fp32", lambda source: Told(1.0)),
        WritingSystem("transformers fp32", lambda source: Told(4.0)),
        WritingSystem("slow", lambda source: Told(4.0), slow=True),
        WritingSystem("absent", lambda source: Told(4.0), ("no_package_of_this_name",)),
    )
    language = SimpleNamespace(model=None, evaluation=[torch.arange(600)[None]])
    monkeypatch.setattr(writing_peers, "SYSTEMS", systems)
    monkeypatch.setattr(writing_peers, "_RESULTS", tmp_path)
    monkeypatch.setattr(writing_peers, "_language", lambda *given: (language, None))
    monkeypatch.setattr(writing_peers, "_SWEPT", 1 << 20)
    options = ["--folder", str(tmp_path / "kept"), "--jobs", "4x3,9x2", "--rounds", "3", "--record"]
    answer = CliRunner().invoke(writing_peers.app, options)
    assert answer.exit_code == 0, answer.output
    assert "transformers fp32" in answer.output
    (result,) = read_results(tmp_path / "smollm2_writing_beside_peers.json")
    assert list(result.times()) == ["fxopt fp32", "transformers fp32"]
    assert result.more["left_out"] == {"absent": "needs no_package_of_this_name"}
    assert result.ratios["fxopt fp32 / transformers fp32"].median < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "32"], "--jobs: invalid literal"),
        (["--jobs", "32x1"], "a prompt has 1 token or more, and 2 or more are written"),
        (["--quick", "--record"], "leave out --record"),
    ],
)
def test_options_that_make_no_sense_are_told(
    options: list[str], message: str, tmp_path: Path
) -> None:
    answer = CliRunner().invoke(writing_peers.app, [*options, "--folder", str(tmp_path)])
    assert answer.exit_code == 2
    words = " ".join(part for part in answer.output.split() if part not in "│╭╮╰╯─")
    assert message in words
