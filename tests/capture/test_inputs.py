"""Example inputs: the user's in one form, or derived from a config that tells all."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fxopt.capture import derive_inputs, normalize_inputs
from fxopt.errors import InputError, NotCapturedError
from tests.architectures import TRANSFORMERS
from tests.seq2seq import SEQ2SEQ

_SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


def _forward(x: Tensor, y: Tensor | None = None, flag: bool = False) -> None: ...


SIGNATURE = inspect.signature(_forward)
X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (X, ["x"]),
        ((X,), ["x"]),
        ([X, X], ["x", "y"]),
        ((X, None), ["x"]),
        ({"y": X, "x": X}, ["x", "y"]),
        ((X, None, False), ["x"]),
        ((X, None, True), ["x", "flag"]),
    ],
)
def test_inputs_are_named_in_the_order_of_the_signature(given: Any, names: list[str]) -> None:
    assert list(normalize_inputs(SIGNATURE, given)) == names


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {X},
            "example_inputs must be a tensor, a tuple of positional arguments or a dict of keyword "
            "arguments, not set",
        ),
        (((3,),), "example_inputs hold no tensor; give at least one"),
        (
            (torch.ones(2, 0),),
            "example input x has shape (2, 0) and so no entries; capture and judgement need at "
            "least one row. The result accepts empty batches.",
        ),
    ],
)
def test_what_cannot_steer_a_capture_is_refused(given: Any, text: str) -> None:
    with pytest.raises(InputError) as caught:
        normalize_inputs(SIGNATURE, given)
    assert str(caught.value) == text


def test_inputs_that_the_signature_does_not_take_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        normalize_inputs(SIGNATURE, {"z": X})
    text = str(caught.value)
    assert text.startswith("the inputs don't fit forward(x")
    assert text.endswith("Give a tuple of positional arguments or a dict of keyword arguments.")


def _bert() -> nn.Module:
    return transformers.BertModel(
        transformers.BertConfig(vocab_size=30, max_position_embeddings=12, **_SMALL)
    )


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=30, num_key_value_heads=1, **_SMALL)
    )


def _vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **_SMALL))


def test_text_models_get_ids_in_the_vocabulary_and_a_mask_with_padding() -> None:
    for model, length in ((_bert(), 12), (_llama(), 16)):
        inputs = derive_inputs(model)
        ids, mask, *types = inputs.values()
        assert list(inputs)[:2] == ["input_ids", "attention_mask"]
        assert all(int(one.max()) == 0 and one.shape == ids.shape for one in types)
        assert len(types) == ("token_type_ids" in inspect.signature(model.forward).parameters)
        assert ids.shape == mask.shape == (2, length)
        assert ids.dtype == mask.dtype == torch.int64
        assert int(ids.min()) >= 0
        assert int(ids.max()) < 30
        assert mask[0].all()
        assert not mask[1].all()
        assert mask[1, 0]


def test_vision_models_get_images_of_the_configs_size_and_the_models_dtype() -> None:
    inputs = derive_inputs(_vit().to(torch.bfloat16))
    assert list(inputs) == ["pixel_values"]
    assert inputs["pixel_values"].shape == (2, 3, 16, 16)
    assert inputs["pixel_values"].dtype == torch.bfloat16


def test_audio_encoders_get_features_of_the_configs_length() -> None:
    inputs = derive_inputs(SEQ2SEQ["whisper"]().model.encoder)
    assert list(inputs) == ["input_features"]
    assert inputs["input_features"].shape == (2, 4, 20)


def test_derived_inputs_are_the_same_every_time_and_leave_the_generator_alone() -> None:
    model = _bert()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, second = derive_inputs(model), derive_inputs(model)
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", [*TRANSFORMERS, *SEQ2SEQ])
def test_every_architecture_takes_what_is_derived_from_its_config(name: str) -> None:
    model = SEQ2SEQ[name]().eval() if name in SEQ2SEQ else TRANSFORMERS[name]().model
    inputs = derive_inputs(model)
    with torch.no_grad():
        found = model(**inputs)
    tensors = [value for value in found.values() if isinstance(value, Tensor)]
    assert tensors[0].isfinite().all()
    assert len(tensors[0]) == 2
    written = inputs.get("decoder_input_ids")
    assert (written is not None) == (name in SEQ2SEQ)
    if written is not None:
        read = next(iter(inputs.values()))
        assert written.shape[1] != read.shape[1], "one size would be taken for the other"
        assert tensors[0].shape[1] == written.shape[1]


@pytest.mark.parametrize(("name", "start"), [("t5", 0), ("bart", 2), ("whisper", 2)])
def test_a_decoder_is_started_by_its_own_token(name: str, start: int) -> None:
    ids = derive_inputs(SEQ2SEQ[name]())["decoder_input_ids"]
    assert (ids[:, 0] == start).all()
    assert (ids[:, 1:] >= 3).all()


class ConfigWithoutInputs(nn.Module):
    config = transformers.BertConfig()
    main_input_name = "graph_nodes"

    def forward(self, graph_nodes: Tensor) -> Tensor:
        return graph_nodes


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(2, 2), ConfigWithoutInputs], ids=["plain", "odd"]
)
def test_a_shape_is_never_guessed(make: Any) -> None:
    model = make()
    with pytest.raises(NotCapturedError) as caught:
        derive_inputs(model)
    assert str(caught.value) == (
        f"no example inputs can be derived from {type(model).__name__}: it has no transformers "
        "config that says what its inputs are. Pass example_inputs=(...) or call the result once; "
        "the capture then uses the inputs of that call."
    )
