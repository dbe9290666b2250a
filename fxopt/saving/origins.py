"""The origins of state tensors as JSON, and what earlier versions said of them by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from fxopt.errors import SaveError
from fxopt.program import Origin
from fxopt.saving.values import field

_SUFFIXES = {
    "_main": Origin("split-outliers", "main"),
    "_outliers": Origin("split-outliers", "outliers"),
    "_shift": Origin("shift-channels", "shift"),
    "_smoothed": Origin("smooth-quant", "smoothed"),
    "_sparse24": Origin("sparsify24", "sparse24"),
}
_SUFFIXED = re.compile(rf"({'|'.join(_SUFFIXES)})(_\d+)?$")


def encode_origins(origins: Mapping[str, tuple[Origin, ...]]) -> dict[str, Any]:
    """{name: [[pass, role], ...]}."""
    return {
        name: [[origin.pass_name, origin.role] for origin in several]
        for name, several in origins.items()
    }


def decode_origins(data: Any, state: Collection[str]) -> dict[str, tuple[Origin, ...]]:
    """What `encode_origins` wrote into a document; read from the names of the state where the
    document is of an earlier version, which wrote nothing."""
    if "origins" not in data:
        found = {name: _SUFFIXED.search(name) for name in state}
        return {name: (_SUFFIXES[match[1]],) for name, match in found.items() if match}
    return {name: _decoded(several) for name, several in field(data, "origins", dict).items()}


def _decoded(several: Any) -> tuple[Origin, ...]:
    pairs = several if isinstance(several, list) else [several]
    for pair in pairs:
        texts = isinstance(pair, list) and all(isinstance(text, str) for text in pair)
        if not texts or len(pair) != 2:
            raise SaveError(f"the saved graph holds an origin that can't be read: {pair!r:.80}")
    return tuple(Origin(*pair) for pair in pairs)
