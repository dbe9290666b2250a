"""Numbered siblings, such as the layers of a transformer: told apart by their number only."""

from __future__ import annotations

import re

from fxopt.graph_text.printer import Chunk

# A dotted name in a printed line, but no float: it starts with a letter, an underscore or "%".
_DOTTED = re.compile(r"(?<![\w.])(?:%\.?\w+|[A-Za-z_]\w*)(?:\.\w+)+")
# A value of the sibling before, as `relative_to` writes it.
_RESULT = re.compile(r"%<-1>[\w.<>-]*")


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


def continues(first: str, second: str) -> bool:
    """Whether `second` does what `first` does, on one value of the sibling before it.

    Both as `relative_to` writes them. The first layer of a stack reads an embedding where the
    second reads the first: that is no difference between layers.
    """
    results = set(_RESULT.findall(second))
    if len(results) != 1:
        return False
    before, *between = re.escape(second).split(re.escape(results.pop()))
    pattern = before + r"(?P<input>%[\w.<>-]+)" + "(?P=input)".join(between)
    return re.fullmatch(pattern, first) is not None


def collapsed(chunks: list[Chunk]) -> list[str]:
    """Texts of the chunks; runs of numbered siblings equal to the one before become one line."""
    texts: list[str] = []
    run: list[int] = []
    stack, previous, chained = None, "", False
    for key, block in [*_blocks(chunks), (None, "")]:
        shape = relative_to(block, key[1]) if key else ""
        is_next = key is not None and key[0] == stack
        if key and is_next and not run:
            chained = shape != previous and continues(previous, shape)
        if key and is_next and (shape == previous or (chained and not run)):
            run.append(key[1])
        else:
            texts += [_run_text(stack or "", run, chained)] if run else []
            texts += [block] if block else []
            run, stack = [], key[0] if key else None
        previous = shape
    return texts


def _blocks(chunks: list[Chunk]) -> list[tuple[tuple[str, int] | None, str]]:
    """The texts of the chunks, those of one numbered module together."""
    blocks: list[tuple[tuple[str, int] | None, str]] = []
    for chunk in chunks:
        key, text = numbered_part(chunk.path), chunk_text(chunk)
        if key and blocks and blocks[-1][0] == key:
            blocks[-1] = (key, f"{blocks[-1][1]}\n\n{text}")
        else:
            blocks.append((key, text))
    return blocks


def _run_text(stack: str, run: list[int], chained: bool) -> str:
    names = [f"{stack}.{number}" if stack else str(number) for number in (run[0] - 1, *run)]
    shown = names[1] if len(run) == 1 else f"{names[1]} ... {names[-1]}"
    how = ", each on the result of the one before" if chained else ""
    return f"# {shown}: as {names[0]}{how}"
