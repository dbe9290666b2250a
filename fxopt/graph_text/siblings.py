"""Numbered siblings, such as the layers of a transformer: told apart by their number only."""

from __future__ import annotations

import re

from fxopt.graph_text.printer import Chunk

# A dotted name in a printed line, but no float: it starts with a letter, an underscore or "%".
_DOTTED = re.compile(r"(?<![\w.])(?:%\.?\w+|[A-Za-z_]\w*)(?:\.\w+)+")


def chunk_text(chunk: Chunk) -> str:
    return "\n".join([chunk.header, *chunk.lines])


def numbered_part(path: str) -> tuple[str, int] | None:
    """(`encoder.layer`, 3) of `encoder.layer.3.output`: the outermost numbered module."""
    match = re.match(r"(?:(.*?)\.)?(\d+)(?:\.|$)", path)
    return (match[1] or "", int(match[2])) if match else None


def relative_to(line: str, number: int) -> str:
    """The line with module numbers written relative to `number`."""

    def relative(match: re.Match[str]) -> str:
        segments = re.split(r"([%.]+)", match[0])
        return "".join(f"<{int(s) - number}>" if s.isdigit() else s for s in segments)

    return _DOTTED.sub(relative, line)


def collapsed(chunks: list[Chunk]) -> list[str]:
    """Texts of the chunks; runs of numbered siblings equal to the one before become one line."""
    blocks: list[tuple[tuple[str, int] | None, list[str]]] = []
    for chunk in chunks:
        key = numbered_part(chunk.path)
        if key is None or not blocks or blocks[-1][0] != key:
            blocks.append((key, []))
        blocks[-1][1].append(chunk_text(chunk))
    texts: list[str] = []
    run: list[tuple[str, int]] = []
    previous = None
    for key, parts in blocks:
        block = "\n\n".join(parts)
        shape = (key[0], relative_to(block, key[1])) if key else None
        if key and shape == previous:
            run.append(key)
            continue
        texts += _run_text(run)
        run, previous = [], shape
        texts.append(block)
    return texts + _run_text(run)


def _run_text(run: list[tuple[str, int]]) -> list[str]:
    if not run:
        return []
    (prefix, first), (_, last) = run[0], run[-1]
    dot = f"{prefix}." if prefix else ""
    numbers = f"{dot}{first}" if first == last else f"{dot}{first} ... {dot}{last}"
    return [f"# {numbers}: as {dot}{first - 1}"]
