"""Measurements as JSON: the fields of the dataclasses under their own names, with a version."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from fxopt.errors import SaveError

SCHEMA = "fxopt.measurement"
VERSION = 1

T = TypeVar("T")


def dump(measurement: Any) -> str:
    """The dataclass as JSON: `{"schema": ..., "version": ..., fields}`, indented."""
    content = {"schema": SCHEMA, "version": VERSION, **dataclasses.asdict(measurement)}
    return json.dumps(content, indent=2, ensure_ascii=False)


def load(content: str, kind: type[T]) -> T:
    """The dataclass of type `kind` that `dump` wrote; builds nothing but its declared fields.

    Raises `SaveError` where the text is no JSON, no measurement, of another version, or has a field
    missing, unknown or of another type; the message names the field.
    """
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SaveError(
            f"this is no measurement: {error}. Give the text that Measurement.to_json wrote."
        ) from error
    if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
        raise SaveError(f'this JSON is no measurement: it has no "schema": "{SCHEMA}"')
    version = data.pop("version", None)
    if version != VERSION:
        raise SaveError(
            f"this measurement has schema version {version!r}, and this fxopt reads version "
            f"{VERSION}. Read it with the fxopt that wrote it."
        )
    return typing.cast(T, _read(data, kind, "measurement"))


def _read(value: Any, kind: Any, where: str) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _read(value, _chosen(value, parts), where)
    if origin is tuple and isinstance(value, list):
        return tuple(_read(inner, parts[0], f"{where}[{i}]") for i, inner in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {key: _read(inner, parts[1], f"{where}.{key}") for key, inner in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _read_fields(value, typing.cast(type, kind), where)
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise SaveError(
        f"the measurement is damaged: {where} holds {value!r:.60}, which is no "
        f"{getattr(kind, '__name__', kind)}"
    )


def _chosen(value: Any, kinds: tuple[Any, ...]) -> Any:
    """The member of a union that `value` is: by its type, or for a dataclass by its fields."""
    for kind in kinds:
        if dataclasses.is_dataclass(kind):
            names = {field.name for field in dataclasses.fields(kind)}
            if isinstance(value, dict) and set(value) == names:
                return kind
        elif type(value) is kind:
            return kind
    return kinds[0]


def _read_fields(value: dict[str, Any], kind: type, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    missing, unknown = sorted(set(names) - set(value)), sorted(set(value) - set(names))
    if missing or unknown:
        problem = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"
        raise SaveError(f"the measurement is damaged: {where} {problem}")
    return kind(
        **{name: _read(inner, hints[name], f"{where}.{name}") for name, inner in value.items()}
    )
