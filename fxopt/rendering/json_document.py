"""Dataclasses as JSON: the fields of the dataclasses under their own names, with a schema version.

What isn't finite, which JSON has no number for, is written as "inf", "-inf" or "nan".
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from fxopt.errors import SaveError

VERSION = 1

T = TypeVar("T")

_NOT_FINITE = ("inf", "-inf", "nan")


def dump(report: Any, schema: str) -> str:
    """The dataclass `report` as JSON: `{"schema": ..., "version": ..., fields}`, indented."""
    return json.dumps(
        {"schema": schema, "version": VERSION, **_plain(dataclasses.asdict(report))},
        indent=2,
        ensure_ascii=False,
        allow_nan=False,
    )


def load(content: str, kind: type[T], schema: str) -> T:
    """The dataclass of type `kind` that `dump` wrote; builds nothing but its declared fields.

    What messages call it is the last part of `schema`. Raises `SaveError` where the text is no
    JSON, of another schema, of another version, or has a field missing, unknown or of another type;
    the message names the field.
    """
    noun = schema.rpartition(".")[2]
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SaveError(f"this is no {noun}: {error}. Give the text of a .json {noun}.") from error
    if not isinstance(data, dict) or data.pop("schema", None) != schema:
        raise SaveError(f'this JSON is no {noun}: it has no "schema": "{schema}"')
    version = data.pop("version", None)
    if version != VERSION:
        raise SaveError(
            f"this {noun} has schema version {version!r}, and this fxopt reads version {VERSION}. "
            "Read it with the fxopt that wrote it."
        )
    return typing.cast(T, _read(data, kind, noun))


def _read(value: Any, kind: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return _read_union(value, typing.get_args(kind), where)
    if origin is tuple and isinstance(value, list):
        item = typing.get_args(kind)[0]
        return tuple(_read(inner, item, f"{where}[{i}]") for i, inner in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        item = typing.get_args(kind)[1]
        return {key: _read(inner, item, f"{where}.{key}") for key, inner in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _read_fields(value, typing.cast(type, kind), where)
    if kind is float and (type(value) is int or value in _NOT_FINITE):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise SaveError(
        f"the {_noun(where)} is damaged: {where} holds {value!r:.60}, which is no "
        f"{getattr(kind, '__name__', kind)}"
    )


def _noun(where: str) -> str:
    return where.partition(".")[0]


def _read_union(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    fitting = [kind for kind in kinds if type(value) is kind or _has_fields(kind, value)]
    return _read(value, fitting[0] if fitting else kinds[0], where)


def _has_fields(kind: Any, value: Any) -> bool:
    if not dataclasses.is_dataclass(kind) or not isinstance(value, dict):
        return False
    return set(value) == {field.name for field in dataclasses.fields(kind)}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _read_fields(value: dict[str, Any], kind: type, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    required = {
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(value))
    unknown = sorted(set(value) - {field.name for field in fields})
    if missing or unknown:
        problem = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"
        raise SaveError(f"the {_noun(where)} is damaged: {where} {problem}")
    return kind(
        **{name: _read(inner, hints[name], f"{where}.{name}") for name, inner in value.items()}
    )
