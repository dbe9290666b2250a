"""What the steps of encoder-decoders are tried on, and that faults of the source are seen."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import fxopt.optimized.generating as generating
import fxopt.optimized.seq2seq as seq2seq
from fxopt.claim import Close
from fxopt.errors import EquivalenceError, InputError, ModelError
from fxopt.generation import Seq2SeqPlan, generation_plan, teacher_forced
from fxopt.generation.seq2seq_plan import source_of
from tests.architectures import randomize
from tests.generation.language_models import VOCAB, text
from tests.generation.seq2seq_models import FAMILIES, seq2seq_model, shared, source
from tests.seq2seq import vision_encoder_decoder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_writes_the_same_text_about_the_same_source(family: str) -> None:
    first, second = (generation_plan(seq2seq_model(family)) for _ in range(2))
    assert isinstance(first, Seq2SeqPlan)
    assert torch.equal(first.text, second.text)
    assert first.text.shape == (2, 24)
    assert not torch.equal(first.text[0], first.text[1])
    assert all(torch.equal(one, second.source[name]) for name, one in first.source.items())


@pytest.mark.parametrize(
    ("kind", "like"),
    [
        ("MBart", "BART"),
        ("Pegasus", "BART"),
        ("Blenderbot", "BART"),
        ("PLBart", "BART"),
        ("MT5", "T5"),
        ("UMT5", "T5"),
        ("LongT5", "T5"),
    ],
)
def test_relatives_are_read_step_by_step(kind: str, like: str) -> None:
    config = getattr(transformers, f"{kind}Config")(**FAMILIES[like][2])
    model = randomize(getattr(transformers, f"{kind}ForConditionalGeneration")(config))
    assert generation_plan(model).text.shape == (2, 24)


def test_few_positions_make_short_text() -> None:
    model = seq2seq_model("BART", max_position_embeddings=12)
    plan = generation_plan(model)
    assert plan.text.shape == (2, 8)
    assert plan.room() == 12
    assert teacher_forced(plan, model, Close()).positions == 24
    assert generation_plan(seq2seq_model("T5")).room() is None


def test_the_inputs_of_all_programs() -> None:
    model = seq2seq_model("Marian")
    plan = generation_plan(model, source("Marian", 3, 10))
    many, one, encoded, crossed = plan.steps(None)
    assert many["input_ids"].shape == (3, 18)
    assert one["input_ids"].shape == (3, 1)
    assert torch.equal(encoded["source_seen"], source("Marian", 3, 10)["attention_mask"].bool())
    wanted = model.get_encoder()(**source("Marian", 3, 10)).last_hidden_state
    torch.testing.assert_close(crossed["hidden"], wanted)
    assert torch.equal(many["cross_seen"], encoded["source_seen"])
    assert len(many["cross_keys"]) == 3
    kept = list(plan.alike(crossed, [many, one, encoded, crossed]))
    assert kept == [crossed]


def test_one_row_becomes_two() -> None:
    plan = generation_plan(seq2seq_model("T5"), source("T5", 1, 8))
    assert plan.text.shape == (2, 24)
    assert plan.source["input_ids"].shape == (2, 8)


def test_what_was_written_may_be_given() -> None:
    written = text(2, 7)
    call = {**source("BART"), "decoder_input_ids": written}
    model = seq2seq_model("BART")
    assert torch.equal(generation_plan(model, call).text, written)
    with pytest.raises(InputError, match="the text has 2 tokens"):
        generation_plan(model, {**call, "decoder_input_ids": written[:, :2]})


def test_calibration_sources_are_read_as_often_as_they_are_asked_for() -> None:
    model = seq2seq_model("BART")
    plan = generation_plan(model)
    batches = plan.batches(iter([source("BART", 2, 5), text(3, 6)]))
    assert batches is not None
    for _ in range(2):
        names = [next(iter(one)) for one in batches]
        assert names == ["input_ids", "source", "hidden"] * 2


@pytest.mark.parametrize(
    "given",
    [
        {"inputs_embeds": torch.zeros(1, 2, 3)},
        {**source("T5"), "labels": text(2, 4)},
        {"input_ids": text(1, 4)[0]},
        "text",
    ],
)
def test_what_is_no_source_is_refused(given: Any) -> None:
    message = r"generates from input_ids and, .* With generation=False"
    with pytest.raises(InputError, match=message):
        source_of(seq2seq_model("T5"), given)


def test_kinds_of_models_that_are_refused_with_the_reason() -> None:
    seeing = vision_encoder_decoder().eval()
    with pytest.raises(ModelError, match="reads pixel_values: of the models with an encoder"):
        generation_plan(seeing)

    class Own(transformers.BartForConditionalGeneration):  # type: ignore[misc]
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return None

    model = Own(transformers.BartConfig(**FAMILIES["BART"][2])).eval()
    with pytest.raises(ModelError, match="Own has an encoder, a decoder and a generate of its own"):
        generation_plan(model)


def test_positions_that_depend_on_tokens_are_refused() -> None:
    config = transformers.M2M100Config(**FAMILIES["BART"][2])
    model = transformers.M2M100ForConditionalGeneration(config).eval()
    message = "M2M100ForConditionalGeneration doesn't attend through the attention interface"
    with pytest.raises(ModelError, match=message):
        generation_plan(model)


def test_a_plan_does_not_keep_the_model() -> None:
    model = seq2seq_model("BART")
    plan = generation_plan(model)
    del model
    gc.collect()
    with pytest.raises(ModelError, match="the model of this plan is gone"):
        plan.many()


def test_a_decoder_that_reads_ahead_is_no_step() -> None:
    model = seq2seq_model("BART")
    layer = model.model.decoder.layers[0]
    inner = layer.fc2.forward
    layer.fc2.forward = lambda x: inner(x) + x.mean(1, keepdim=True)[..., :32]
    with pytest.raises(ModelError, match="computes something else step by step"):
        generation_plan(model)


def _all_seen(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: torch.ones_like(original(*given))


def _late(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, given, seen, held: original(self, given, seen, held) + (held > 0)


def _rolled(original: Callable[..., Any]) -> Callable[..., Any]:
    def source(self: Any, cache: Any, *given: Any) -> Any:
        hidden, keys, values = original(self, cache, *given)
        return hidden, keys, tuple(one.roll(1, 2) for one in values)

    return source


FAULTS = {
    "mask of the source": (seq2seq, "_mask_of", _all_seen),
    "values of the source": (seq2seq.Seq2SeqGenerating, "_source", _rolled),
    "position": (generating.Generating, "_positions", _late),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_slot_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt = shared("BART")
    plan = generation_plan(model)
    assert teacher_forced(plan, opt, Close()).agreed == 72
    where, what, broken = FAULTS[name]
    monkeypatch.setattr(where, what, broken(getattr(where, what)))
    with pytest.raises(EquivalenceError, match="read token by token, the result broke its claim"):
        teacher_forced(plan, opt, Close())


def test_ids_are_of_the_vocabulary() -> None:
    plan = generation_plan(seq2seq_model("T5"))
    assert plan.text.min() >= 0
    assert plan.text.max() < VOCAB
