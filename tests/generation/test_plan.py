"""The plan of a decoder: what it calls alike, what it refuses, what may be read again."""

from __future__ import annotations

import pytest
import torch

from fxopt.errors import InputError, ModelError
from fxopt.generation import generation_plan
from fxopt.generation.plan import again, check_length, stumbling_refused
from tests.generation.language_models import language_model, text


def test_an_iterator_is_kept_and_what_is_iterable_stays_as_it_is() -> None:
    batches = [1, 2]
    assert again(batches) is batches
    assert again(iter(batches)) == batches


def test_what_a_model_stumbles_over_is_the_reason() -> None:
    model = torch.nn.Linear(1, 1)
    message = "Linear doesn't attend through the attention interface .* ValueError: why"
    with pytest.raises(ModelError, match=message), stumbling_refused(model):
        raise ValueError("why")
    for error in (InputError("told"), ModelError("told")):
        with pytest.raises(type(error), match=r"^told$"), stumbling_refused(model):
            raise error


def test_text_of_which_nothing_is_read_behind_others() -> None:
    check_length(text(1, 3))
    with pytest.raises(InputError, match="the text has 2 tokens"):
        check_length(text(1, 2))


def test_a_decoder_has_one_set_of_arguments() -> None:
    model = language_model("Llama")
    plan = generation_plan(model)
    assert plan.others() == ()
    assert plan.room() is None
    given = list(plan.steps(None))
    assert plan.alike(given[0], given) is given
    call = plan.call(plan.text, plan.seen, 20)
    assert call["input_ids"].shape == call["position_ids"].shape == (2, 4)
    assert call["attention_mask"].shape == (2, 24)


def test_steps_of_other_sizes_have_the_prefix_that_their_steps_take() -> None:
    model = language_model("Llama")
    plan = generation_plan(model).with_int8_cache()
    for inputs in plan.resized():
        assert inputs["keys"][0].dtype == torch.int8
        assert inputs["key_scales"][0].shape == inputs["keys"][0].shape[:3]
