"""The model that a transformers folder or GGUF file holds: all of it, or an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt.errors import FxoptError, ModelError


def read_model(source: Path) -> tuple[nn.Module, tuple[str, ...]]:
    """The model and warnings about it; `ModelError` where it isn't the one that was saved."""
    import transformers

    if not source.exists():
        raise ModelError(
            f"{source} doesn't exist. MODEL is a local folder that holds config.json and "
            "weights, or a .gguf file; nothing is downloaded."
        )
    options: dict[str, Any] = {"local_files_only": True, "output_loading_info": True}
    named = True
    try:
        if source.suffix == ".gguf":
            reader: Any = transformers.AutoModelForCausalLM
            model, info = reader.from_pretrained(
                str(source.parent), gguf_file=source.name, dtype=torch.float32, **options
            )
        else:
            config = transformers.AutoConfig.from_pretrained(str(source), local_files_only=True)
            named = bool(config.architectures)
            kind = _architecture(source, config.architectures[0] if named else "AutoModel")
            model, info = kind.from_pretrained(str(source), **options)
    except FxoptError:
        raise
    except Exception as error:  # readers of foreign files raise whatever they stumble over
        raise ModelError(f"transformers can't load {source}: {first_line(error)}") from error
    return model, _check_weights(source, model, info, named)


def _architecture(source: Path, name: str) -> Any:
    import transformers

    kind = getattr(transformers, name, None)
    is_model = isinstance(kind, type) and issubclass(kind, nn.Module)
    if not is_model and name != "AutoModel":
        raise ModelError(
            f"{source} holds a {name}, which transformers {transformers.__version__} doesn't have. "
            "Another class would leave out what is its own, such as its head. Build the model in "
            "Python with its own code, and call fxopt.transform() on it."
        )
    return kind


def _check_weights(
    source: Path, model: nn.Module, info: Mapping[str, Any], named: bool
) -> tuple[str, ...]:
    """Refuse a model with random weights, or a head that a guessed class has left out."""
    kind = type(model).__name__
    missing, left = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise ModelError(
            f"{source} lacks {len(missing)} weights of {kind} ({_some(missing)}), which would be "
            "random numbers. Save the whole model, or build it in Python as it is to be, and call "
            "fxopt.transform() on it."
        )
    if left and not named:
        raise ModelError(
            f"{source}: config.json names no class under 'architectures', and {kind} has no place "
            f"for {len(left)} weights of the file ({_some(left)}). Write the class there that the "
            "model was saved from."
        )
    if not left:
        return ()
    return (f"{len(left)} weights of {source} have no place in {kind}: {_some(left)}",)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def first_line(error: Exception) -> str:
    """What an error says first; its class where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
