"""The difference of two programs, on texts whose names a rewrite leaves alone."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from fxopt.graph_text.printer import Printer
from fxopt.graph_text.siblings import continues, numbered_part, relative_to
from fxopt.graph_text.types import DTYPE_NAMES
from fxopt.program import Program

_TYPE = re.compile(rf"(?<![%.\w])(?:{'|'.join(DTYPE_NAMES)})\[[^\]]*\]")


def diff(before: Program, after: Program) -> str:
    """What changed from `before` to `after`: removed lines (-), added ones (+), by module.

    A line of which only types changed is printed once (~), with the old and the new types:
    `linear(%x, weight: f32[3072, 768] -> f32[1536, 768])`. So is a change that numbered siblings
    share. The empty string where nothing changed.
    """
    old = Printer(before)
    new = Printer(after, old)
    pairs = [[(c.header, line) for c in p.chunks() for line in c.lines] for p in (old, new)]
    for printer, entries in zip((old, new), pairs, strict=True):
        entries.insert(0, ("", printer.header))
        entries.append(("# return", printer.result()))
    hunks = _hunks(*pairs)
    if not hunks:
        return ""
    sizes = [f"{p.name}: {p.node_count()} operations, {_bytes_text(p)}" for p in (before, after)]
    return "\n".join([f"--- {sizes[0]}", f"+++ {sizes[1]}", *_folded(hunks)]) + "\n"


def _hunks(old: list[tuple[str, str]], new: list[tuple[str, str]]) -> dict[str, list[str]]:
    """{module header: its removed, added and retyped lines}, in order."""
    hunks: dict[str, list[str]] = {}
    matcher = difflib.SequenceMatcher(None, _untyped(old), _untyped(new), False)
    for tag, i0, i1, j0, j1 in matcher.get_opcodes():
        if tag == "equal":
            for (header, line), (_, other) in zip(old[i0:i1], new[j0:j1], strict=True):
                if line != other:
                    hunks.setdefault(header, []).append(f"~{_retyped(line, other)}")
            continue
        for sign, entries in (("-", old[i0:i1]), ("+", new[j0:j1])):
            for header, line in entries:
                hunks.setdefault(header, []).append(f"{sign}{line}")
    return hunks


def _untyped(lines: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(header, _TYPE.sub("?", line)) for header, line in lines]


def _retyped(old: str, new: str) -> str:
    """The line with `old -> new` for each type that isn't the same in both."""
    types = iter(_TYPE.findall(new))

    def both(match: re.Match[str]) -> str:
        kind = next(types)
        return kind if kind == match[0] else f"{match[0]} -> {kind}"

    return _TYPE.sub(both, old)


def _folded(hunks: Mapping[str, list[str]]) -> list[str]:
    """The hunks as lines; a hunk that numbered siblings share is printed for the first only."""
    texts: list[str] = []
    for first, *rest in _alike(hunks):
        texts += ["", first] if first.startswith("# ") else [""]
        texts += hunks[first]
        if rest:
            names = [header.removeprefix("# ").partition("  ")[0] for header in rest]
            shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
            texts.append(f"  and the same in {len(names)} more: {shown}")
    return texts


def _alike(hunks: Mapping[str, list[str]]) -> list[list[str]]:
    """The headers of the hunks, those of siblings that changed alike together."""
    groups: list[tuple[str, str, list[str]]] = []
    for header, lines in hunks.items():
        part = numbered_part(header.removeprefix("# "))
        number = part[1] if part else 0
        place = relative_to(header, number) if part else header
        change = relative_to("\n".join(lines), number) if part else "\n".join(lines)
        for index, (other_place, other_change, headers) in enumerate(groups):
            if place == other_place and (change == other_change or continues(other_change, change)):
                # The next sibling is compared with this one, whose input is a sibling too.
                groups[index] = (place, change, [*headers, header])
                break
        else:
            groups.append((place, change, [header]))
    return [headers for _, _, headers in groups]


def _bytes_text(program: Program) -> str:
    size = program.parameter_bytes()
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size} bytes"
