"""Real text, and what a folder's tokenizer makes of it."""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt.capture import decoder_start, takes_decoder_ids
from fxopt.errors import ModelError
from fxopt.loading.folder import first_line

_TEXT_MODULES = ("json", "pathlib", "re", "random", "statistics", "csv", "heapq", "decimal")


def real_sentences(count: int) -> list[str]:
    """`count` sentences of real text: from the documentation of Python's standard library."""
    sentences: list[str] = []
    for name in _TEXT_MODULES:
        text = pydoc.getdoc(pydoc.locate(name)).replace("\n", " ")
        sentences += [part.strip() for part in text.split(". ") if len(part.split()) > 5]
    return [sentences[index % len(sentences)] for index in range(count)]


def reads_ids(model: nn.Module) -> bool:
    """Whether what the model is given first are ids of tokens."""
    return getattr(model, "main_input_name", "input_ids") == "input_ids"


def has_tokenizer(source: Path) -> bool:
    """Whether a model's folder holds a tokenizer."""
    return source.is_dir() and (source / "tokenizer_config.json").exists()


def tokens(
    tokenizer: Any, model: nn.Module, texts: Sequence[str], length: int, padding: bool | str
) -> dict[str, Any]:
    """What `tokenizer` makes of `texts`, as far as the model takes it."""
    found = tokenizer(
        list(texts), padding=padding, truncation=True, max_length=length, return_tensors="pt"
    )
    takes = inspect.signature(model.forward).parameters
    inputs = {name: value for name, value in found.items() if name in takes}
    if takes_decoder_ids(model):
        inputs["decoder_input_ids"] = _written(inputs["input_ids"], decoder_start(model))
    return inputs


def _written(ids: torch.Tensor, start: int) -> torch.Tensor:
    """What a decoder has written by then: the text itself, without its last quarter."""
    count = written_length(ids.shape[1])
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, : count - 1]], 1)


def written_length(length: int) -> int:
    """The length of what a decoder has written of a text of so many tokens."""
    return max(1, (3 * length) // 4)


def read_tokenizer(source: Path) -> Any:
    """The folder's tokenizer, with a token to pad with. Raises `ModelError`."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    except Exception as error:  # as of a model
        raise ModelError(
            f"transformers can't load the tokenizer of {source}: {first_line(error)}"
        ) from error
    if tokenizer.pad_token is None:
        # Padding is masked out, so that any token of the vocabulary will do.
        others = tokenizer.eos_token or tokenizer.unk_token
        tokenizer.pad_token = others or tokenizer.convert_ids_to_tokens(0)
    return tokenizer
