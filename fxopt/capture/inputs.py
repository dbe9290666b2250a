"""Example inputs: the user's in one form, or derived from a transformers config where it tells all.

Sizes are small, since they only steer the capture and the judge; ids are drawn from the vocabulary
with a fixed seed, so that the same model is captured in the same way every time.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxopt.calls import Inputs, bind, check_inputs, describe_leaves, spread
from fxopt.errors import InputError, NotCapturedError

_TOKEN_TYPES = "token_type_ids"
_BATCH, _LENGTH, _DECODER_LENGTH, _SAMPLES = 2, 16, 12, 4000


def normalize_inputs(
    signature: inspect.Signature, example_inputs: Inputs, empty: bool = False
) -> dict[str, Any]:
    """Example inputs as {name: value}.

    Tensors of inference mode are copied. Raises `InputError` for another container, no tensor
    inside, a tensor that `check_leaf` refuses (without entries only where none may be `empty`), or
    an object that hides tensors.
    """
    check_inputs(example_inputs, "example_inputs", InputError)
    named = bind(signature, *spread(example_inputs))
    leaves = describe_leaves(named)
    for path, leaf in leaves:
        check_leaf(path, leaf, empty)
    if not any(isinstance(leaf, Tensor) for _, leaf in leaves):
        raise InputError("example_inputs hold no tensor; give at least one")
    # Tensors of inference mode can't be saved for a backward.
    return pytree.tree_map(lambda leaf: leaf.clone() if _is_inference(leaf) else leaf, named)  # type: ignore[no-any-return]


def check_leaf(path: str, leaf: object, empty: bool = False) -> None:
    """Raise `InputError` for an input that can't be captured: `path` names it.

    That is a tensor without entries where none may be `empty`, one that isn't dense, and an
    object that holds tensors where torch doesn't see them.
    """
    if not isinstance(leaf, Tensor):
        _check_object(path, leaf)
    elif leaf.layout is not torch.strided or leaf.is_nested:
        what = "nested" if leaf.is_nested else f"of layout {leaf.layout}"
        raise InputError(
            f"example input {path} is {what}, and a graph takes dense tensors alone. Convert it "
            "in a module around the graph, or give it as dense ones."
        )
    elif not leaf.numel() and not empty:
        raise InputError(
            f"example input {path} has shape {tuple(leaf.shape)} and so no entries; capture "
            "and judgement need at least one row. The result accepts empty batches."
        )


def _check_object(path: str, leaf: object) -> None:
    held = getattr(leaf, "__dict__", {})
    if not any(isinstance(part, Tensor) for part in pytree.tree_leaves(dict(held))):
        return
    name = type(leaf).__name__
    way = (
        f"torch.export.register_dataclass({name})"
        if dataclasses.is_dataclass(leaf)
        else f"torch.utils._pytree.register_pytree_node({name}, ..., flatten_with_keys_fn=...)"
    )
    raise InputError(
        f"example input {path} is a {name}, which torch can't look into, so that the tensors in it "
        f"would be constants. Register it once, with {way}, or give its tensors in a tuple or dict."
    )


def _is_inference(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_inference()


def derive_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Example inputs of a transformers text, vision or audio model, encoder, decoder or both.

    Text: `input_ids`, `attention_mask` and, where the model knows token types, `token_type_ids`
    int64[2, 16], the second row padded at its end; vision:
    `pixel_values` float[2, channels, height, width]; audio: `input_features` float[2, mels,
    frames] or `input_values` float[2, samples]. What has an encoder and a decoder gets
    `decoder_input_ids` int64[2, 12] besides, which open with the decoder's start token. Raises
    `NotCapturedError` when the config doesn't say what the inputs are; a shape is never guessed.
    """
    inputs = _encoder_inputs(model)
    if inputs and takes_decoder_ids(model):
        decoder = _decoder_config(model)
        if not hasattr(decoder, "vocab_size"):
            inputs = {}
        else:
            inputs["decoder_input_ids"] = _ids(decoder, (_BATCH, _decoder_length(decoder)), seed=1)
            inputs["decoder_input_ids"][:, 0] = decoder_start(model)
    if not inputs:
        raise NotCapturedError(
            f"no example inputs can be derived from {type(model).__name__}: it has no transformers "
            "config that says what its inputs are. Pass example_inputs=(...) or call the "
            "result once; the capture then uses the inputs of that call."
        )
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def takes_decoder_ids(model: nn.Module) -> bool:
    """Whether `model` has an encoder and a decoder, each with ids or other inputs of its own."""
    config: Any = getattr(model, "config", None)
    names = inspect.signature(model.forward).parameters
    return bool(getattr(config, "is_encoder_decoder", False)) and "decoder_input_ids" in names


def decoder_start(model: nn.Module) -> int:
    """The id that opens what the decoder of `model` writes, as its configs have it."""
    decoder = _decoder_config(model)
    configs = (model.config, getattr(model, "generation_config", None), decoder)
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        for config in configs:
            found = getattr(config, name, None)
            if isinstance(found, int) and 0 <= found < decoder.vocab_size:
                return found
    return 0


def _encoder_inputs(model: nn.Module) -> dict[str, Tensor]:
    """What the model is given first; nothing where its config doesn't say."""
    config: Any = getattr(model, "config", None)
    names = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", None)
    generator = torch.Generator().manual_seed(0)
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(floating)

    if main == "input_ids" and hasattr(config, "vocab_size"):
        return _text_inputs(config, names)
    seeing: Any = config if hasattr(config, "image_size") else getattr(config, "encoder", None)
    if main == "pixel_values" and hasattr(seeing, "image_size"):
        size = seeing.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": draw(_BATCH, getattr(seeing, "num_channels", 3), height, width)}
    if "input_features" in names and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 1500)
        return {"input_features": draw(_BATCH, config.num_mel_bins, frames)}
    if main == "input_values" and hasattr(config, "conv_stride"):
        return {"input_values": draw(_BATCH, _SAMPLES)}
    return {}


def _text_inputs(config: Any, names: Mapping[str, Any]) -> dict[str, Tensor]:
    length = min(_LENGTH, getattr(config, "max_position_embeddings", _LENGTH) or _LENGTH)
    shape = (_BATCH, length)
    inputs = {"input_ids": _ids(config, shape, seed=0)}
    if "attention_mask" in names:
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.int64)
        inputs["attention_mask"][-1, (3 * length) // 4 :] = 0
    if _TOKEN_TYPES in names and getattr(config, "type_vocab_size", None):
        inputs[_TOKEN_TYPES] = torch.zeros(shape, dtype=torch.int64)
    return inputs


def _ids(config: Any, shape: tuple[int, int], seed: int) -> Tensor:
    """Ids of the vocabulary; the first few are mostly not text."""
    generator = torch.Generator().manual_seed(seed)
    low = min(3, config.vocab_size - 1)
    return torch.randint(low, config.vocab_size, shape, generator=generator)


def _decoder_config(model: nn.Module) -> Any:
    config: Any = model.config
    return getattr(config, "decoder", None) or config


def _decoder_length(config: Any) -> int:
    """Another than the encoder's, from which the capture could not tell it otherwise."""
    names = ("max_target_positions", "max_position_embeddings")
    found = [getattr(config, name, None) for name in names]
    positions = [one for one in found if isinstance(one, int) and one > 0]
    return min([_DECODER_LENGTH, *(max(1, (3 * one) // 4) for one in positions)])


def zeros_when_left_out(model: nn.Module, named: Mapping[str, Any]) -> dict[str, str]:
    """{argument: the argument whose shape its zeros have}, for what transformers documents so.

    Tokenizers give `token_type_ids` or don't, by the model; models that know them take zeros when
    they are missing, and a captured program must too.
    """
    known = hasattr(model, "config") and _TOKEN_TYPES in named and "input_ids" in named
    return {_TOKEN_TYPES: "input_ids"} if known else {}
