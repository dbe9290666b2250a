"""`fxopt passes`."""

from __future__ import annotations

import json
import textwrap
from dataclasses import MISSING
from typing import Any

import typer

from fxopt.claim import Close
from fxopt.cli.options import AsJson
from fxopt.pass_registry import listed_passes
from fxopt.rewriting import Pass
from fxopt.rewriting.option_annotations import spelled
from fxopt.rewriting.options import Option, declared

_WIDTH = 100


def passes(as_json: AsJson = False) -> None:
    """List the passes: stage, claim, what each does, and its options with values and defaults."""
    listed = listed_passes()
    found = [_described(kind) for kind in listed.passes.values()]
    if as_json:
        document = {"passes": found, "failed": dict(listed.failed)}
        typer.echo(json.dumps(document, indent=2))
        return
    typer.echo("\n\n".join(map(_text, found)))
    for reason in listed.failed.values():
        typer.echo(f"warning: {reason}", err=True)


def _described(kind: type[Pass]) -> dict[str, Any]:
    options = declared(kind)
    required = any(option.default is MISSING for option in options)
    usual = None if required else kind()
    claim = (usual or kind).claim
    return {
        "name": kind.name,
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "stage": kind.stage.name.lower(),
        "claim": _plain(claim),
        "description": _first_line(kind),
        "options": [_option(option, usual) for option in options],
    }


def _option(option: Option, usual: Pass | None) -> dict[str, Any]:
    """An option with the default that it comes to, null where it must be given."""
    default = option.default if usual is None else getattr(usual, option.name)
    return {
        "name": option.name,
        "takes": option.type.spelling,
        "choices": [_plain(choice) for choice in option.type.choices],
        "default": None if default is MISSING else _plain(default),
        "required": option.default is MISSING,
        "follows_others": option.follows,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if value == Close():
        return "close"
    return value if isinstance(value, bool | int | float | str | None) else spelled(value)


def _first_line(kind: type[Pass]) -> str:
    """The docstring's first line; empty where a dataclass has the one that it is given."""
    text = (kind.__doc__ or "").strip()
    return "" if text.startswith(f"{kind.__name__}(") else text.partition("\n")[0]


def _text(described: dict[str, Any]) -> str:
    claim = described["claim"] or "claim by its options"
    lines = [f"{described['name']}  ({described['stage']}, {claim})"]
    lines += [f"  {described['description']}"] if described["description"] else []
    width = max((len(option["name"]) for option in described["options"]), default=0)
    for option in described["options"]:
        lines += textwrap.wrap(
            f"{option['takes']}  [{_default(option)}]",
            _WIDTH,
            initial_indent=f"    {option['name']:<{width}}  ",
            subsequent_indent=" " * (width + 6),
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _default(option: dict[str, Any]) -> str:
    if option["required"]:
        return "required"
    default = option["default"]
    text = "|".join(map(str, default)) or "empty" if isinstance(default, list) else str(default)
    text = text.lower() if default is None or isinstance(default, bool) else text
    return text + (", by the other options" if option["follows_others"] else "")
