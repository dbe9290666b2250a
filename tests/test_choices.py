"""Choices are given back for equal values alone, and the programs of a model share them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxopt
from fxopt.choices import Choices
from fxopt.errors import CalibrationError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_choice_holds_for_the_values_that_it_was_made_for(dtype: torch.dtype) -> None:
    choices, values = Choices(), torch.arange(12).view(3, 4).to(dtype)
    assert choices.known("a", [values]) is None
    choices.note("a", [values], 7)
    assert choices.known("a", [values.clone()]) == 7
    assert choices.known("a", [values.t().contiguous().t()]) == 7
    assert choices.known("b", [values]) is None
    assert choices.known("a", [values + 1]) is None
    assert choices.known("a", [values.view(4, 3)]) is None
    assert choices.known("a", [values, values]) is None


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def integers(program: Any) -> dict[str, torch.Tensor]:
    return {name: one for name, one in program.state.items() if one.dtype == torch.uint8}


@pytest.mark.parametrize("weights", ["weighted", "gptq", "awq", "awq-gptq"])
def test_both_programs_of_a_model_that_generates_read_one_weight(weights: Any) -> None:
    torch.manual_seed(1)
    texts = [{"input_ids": torch.randint(0, 64, (4, 30))} for _ in range(8)]
    passes = [fxopt.Canonicalize(), fxopt.Int4Linear(scheme="affine", weights=weights)]
    opt = fxopt.transform(llama(), passes, calibration=texts, measure_cost=False)
    (one,) = opt._programs.members
    first, second = integers(opt.program), integers(one.program)
    assert len(first) == 15
    assert first.keys() == second.keys()
    assert all(second[name] is tensor for name, tensor in first.items())
    assert one.shared == set(one.program.state)
    prompt = torch.randint(0, 64, (1, 6))
    assert opt.generate(prompt, max_new_tokens=4, do_sample=False).shape == (1, 10)


def test_without_choices_the_program_of_one_token_has_nothing_to_learn_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Choices, "known", lambda *args: None)
    torch.manual_seed(1)
    texts = [{"input_ids": torch.randint(0, 64, (4, 30))} for _ in range(8)]
    passes = [fxopt.Canonicalize(), fxopt.Int4Linear(scheme="affine", weights="gptq")]
    with pytest.raises(CalibrationError, match="input_ids has size 30 on axis 1, but the model fi"):
        fxopt.transform(llama(), passes, calibration=texts, measure_cost=False)
