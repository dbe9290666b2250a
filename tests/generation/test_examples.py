"""What steps are tried on: text that a model writes, and texts of users as steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.errors import InputError
from fxopt.generation import generation_plan
from fxopt.generation.examples import StepBatches, step_inputs, text_of
from fxopt.generation.prefix import positions_of
from fxopt.pipeline import Judging, captured
from tests.generation.language_models import VOCAB, language_model, original, text


def test_a_model_writes_the_same_text_each_time() -> None:
    model = language_model("Llama")
    first, second = generation_plan(model).text, generation_plan(language_model("Llama")).text
    assert torch.equal(first, second)
    assert first.shape == (2, 24)
    assert not torch.equal(first[0], first[1])
    assert first.min() >= 0
    assert first.max() < VOCAB
    assert (first[:, 0] == model.config.bos_token_id).all()


def test_both_kinds_of_step_read_the_end_of_the_text() -> None:
    model = language_model("Llama")
    plan = generation_plan(model)
    many, one = plan.many(), plan.one()
    assert torch.equal(many["input_ids"], plan.text[:, 6:])
    assert many["keys"][0].shape == (6, 2, 2, 8)
    assert torch.equal(one["input_ids"], plan.text[:, -1:])
    assert one["keys"][0].shape == (23, 2, 2, 8)
    assert one["position_ids"].tolist() == [[23], [23]]


def test_padding_is_in_the_steps_of_padded_text() -> None:
    prompts = {"input_ids": text(2, 9), "attention_mask": torch.ones(2, 9).long()}
    prompts["attention_mask"][0, :4] = 0
    model = language_model("Llama")
    plan = generation_plan(model, prompts)
    many = plan.many()
    assert many["past_seen"][0].tolist() == [False] * 4 + [True] * 2
    assert many["position_ids"][0].tolist() == [2, 3, 4]


@given(
    st.integers(1, 3), st.integers(3, 12), st.integers(0, 6), st.sampled_from(["Llama", "Gemma3"])
)
def test_steps_of_other_sizes_read_text(rows: int, length: int, padding: int, name: str) -> None:
    model = original(name)
    prompts = {"input_ids": text(rows, length), "attention_mask": torch.ones(rows, length).long()}
    prompts["attention_mask"][0, : min(padding, length - 2)] = 0
    plan = generation_plan(model, prompts)
    own = model(
        input_ids=plan.text,
        attention_mask=plan.seen.long(),
        position_ids=positions_of(plan.seen),
        use_cache=False,
    ).logits
    first = plan.resized()[0]
    logits = plan.present()(**first)[0]
    read = first["input_ids"].shape[1]
    assert logits.shape[1] == read
    visible = plan.seen[:1, -read:]
    torch.testing.assert_close(logits[visible], own[:1, -read:][visible], rtol=1e-3, atol=1e-4)
    for step in plan.resized():
        ids, keys = step["input_ids"], step["keys"][0]
        assert keys.shape[1] == ids.shape[0] in (1, len(plan.text) + 1)
        assert step["past_seen"].shape == (ids.shape[0], keys.shape[0])
        whole = "".join(f" {token} " for token in plan.text.flatten().tolist())
        assert all("".join(f" {token} " for token in row.tolist()) in whole for row in ids)


def test_each_program_is_judged_on_text_of_other_sizes() -> None:
    model = language_model("Llama")
    plan = generation_plan(model)
    many, resized = plan.many(), plan.resized()
    run = captured(plan.present(), many, "eval", Judging(), resized=resized)
    tried = [trial.inputs[0] for trial in (*run.trials, *run.last_trials)]
    assert [tuple(ids.shape) for ids in tried] == [(2, 18), (1, 21), (3, 5)]
    assert all(
        torch.equal(*pair)
        for pair in zip(
            tried, (many["input_ids"], *(r["input_ids"] for r in resized[:2])), strict=True
        )
    )
    one = captured(plan.present(), plan.one(), "eval", Judging(), resized=resized, further=True)
    shapes = [tuple(trial.inputs[5].shape) for trial in (*one.trials, *one.last_trials)]
    assert [shape[:2] for shape in shapes] == [(23, 2), (20, 1), (15, 3)]


def test_calibration_texts_are_read_as_often_as_they_are_asked_for() -> None:
    plan = generation_plan(language_model("Llama"))
    batches = StepBatches(plan.shapes, [{"input_ids": text(1, 5)}, text(2, 3)])
    for _ in range(2):
        shapes = [tuple(step["input_ids"].shape) for step in batches]
        assert shapes == [(1, 5), (2, 3)]
    (first, _) = batches
    assert first["past_seen"].tolist() == [[False, False]]
    assert not first["keys"][0].any()


def test_positions_count_what_is_seen() -> None:
    seen = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    assert positions_of(seen).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    plan = generation_plan(language_model("Llama"))
    inputs = step_inputs(plan.shapes, text(2, 4), seen, keep=1)
    assert inputs["keep"].tolist() == [0]
    assert inputs["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    "given",
    [
        {"inputs_embeds": torch.zeros(1, 2, 3)},
        {"input_ids": text(1, 4), "labels": text(1, 4)},
        {"input_ids": text(1, 4)[0]},
        {"input_ids": torch.zeros(1, 4)},
        "text",
    ],
)
def test_what_is_no_text_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match=r"input_ids \[batch, length\] .* With generation=False"):
        text_of(given)
