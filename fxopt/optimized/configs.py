"""The config of a transformers model on disk: its JSON, and the class that transformers registers.

A config may count what it holds (a label for each class, a kind for each layer), so such numbers
are bounded in what comes from a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxopt.errors import SaveError

_COUNTS = ("layer", "label", "block", "stage", "depth", "replace", "indices", "reduction", "factor")
_LARGEST_COUNT = 1 << 17


def saved_config(config: Any) -> dict[str, Any] | None:
    """The JSON of `config`; None where no class that transformers registers could read it back."""
    if not hasattr(config, "to_json_string"):
        return None
    try:
        data: dict[str, Any] = json.loads(config.to_json_string())
        return data if type(read_config(data, "the model")) is type(config) else None
    except (SaveError, TypeError, ValueError):
        return None


def read_config(saved: Mapping[str, Any], origin: str | Path) -> Any:
    """The config whose JSON was saved at `origin`; `SaveError` where transformers can't read it."""
    from transformers import CONFIG_MAPPING  # heavy, and only models of transformers need it

    try:
        _check_counts(dict(saved), "")
        return CONFIG_MAPPING[saved["model_type"]].from_dict(dict(saved))
    except Exception as error:  # the file may be hostile: any value may stand anywhere
        raise SaveError(
            f"{origin} holds a model config that transformers can't read: {error!s:.200}"
        ) from error


def read_generation_config(saved: Mapping[str, Any], origin: str | Path) -> Any:
    """The `GenerationConfig` that was saved at `origin`; `SaveError` where it is none."""
    from transformers import GenerationConfig

    try:
        known = dict(saved["config"])
        # One that says it comes from a model's config is read without what is not of its class.
        from_model = known.pop("_from_model_config", None)
        config = GenerationConfig.from_dict(known)
        config._from_model_config = from_model
        return config
    except Exception as error:  # the file may be hostile: any value may stand anywhere
        raise SaveError(
            f"{origin} holds a generation config that transformers can't read: {error!s:.200}"
        ) from error


def _check_counts(value: Any, key: str) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_counts(inner, name)
    elif isinstance(value, list):
        for inner in value:
            _check_counts(inner, key)
    elif _is_count(key) and isinstance(value, (int, float)) and abs(value) > _LARGEST_COUNT:
        raise SaveError(f"{key} is {value}, and at most {_LARGEST_COUNT} are read")


def _is_count(key: str) -> bool:
    return any(word in key for word in _COUNTS)
