"""What steps are tried on: text that a model writes, and texts of users as steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxopt.errors import InputError
from fxopt.generation import generation_plan
from fxopt.generation.examples import StepBatches, step_inputs, text_of
from fxopt.generation.prefix import positions_of
from tests.generation.language_models import VOCAB, language_model, text


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
