"""Globs of a pass that match nothing: what was to be left alone would be changed, unsaid."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

_NEAREST = 3
_LEAST_LIKE = 0.3


def unmatched(option: str, globs: Iterable[object], names: Collection[str]) -> tuple[str, ...]:
    """A warning for each of an option's globs that matches none of the names, with the nearest.

    Functions of a name are passed over, and so is everything where there are no names.
    """
    texts = [glob for glob in globs if isinstance(glob, str)] if names else []
    return tuple(
        f"{option}={glob!r} matches none of {len(names)} paths; the nearest are "
        f"{', '.join(_nearest(glob, names))}"
        for glob in texts
        if not any(fnmatchcase(name, glob) for name in names)
    )


def _nearest(glob: str, names: Collection[str]) -> list[str]:
    plain = glob.strip("*.")
    order = sorted(names)
    return difflib.get_close_matches(plain, order, _NEAREST, _LEAST_LIKE) or order[:_NEAREST]
