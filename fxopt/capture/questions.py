"""What a trace asks about sizes: each question, its answer, and the model's line that asked.

torch.export assumes of a dynamic size that it isn't 0 or 1, answers `x.shape[1] == 1` by that, and
forgets the question. So the questions are recorded as they are asked.
"""

from __future__ import annotations

import linecache
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

_TORCH = f"{Path(torch.__file__).parent}/"
_OWN = f"{Path(__file__).parents[1]}/"
_SYMBOLS = ("fx/experimental/", "utils/_sympy/", "utils/_traceback.py")
_LIBRARY = ("nn/", "functional.py", "_tensor.py", "distributions/", "fft/", "masked/", "sparse/")
_HELPERS = ("transformers/integrations/", "transformers/masking_utils.py", "torch/nn/functional.py")


@dataclass(frozen=True)
class Question:
    """`answer` is what the trace took for the value of the sympy expression `asked`.

    `by_python` tells a branch of Python code (the model's, or a library's) from what operators ask
    in order to type their results; `by_helper`, among the branches, those of the functions that all
    models share (attention, masks). `source` is the line outside torch, as `file:line  code`, and
    `asker` the function that asked.
    """

    asked: Any
    answer: Any
    by_python: bool
    by_helper: bool
    source: str
    asker: str


@contextmanager
def recorded() -> Iterator[list[Question]]:
    """The questions about sizes that this thread's traces ask inside the block, first asked first.

    Only the class can be watched, since torch.export makes the environment of a trace itself.
    """
    found: list[Question] = []
    seen: set[tuple[Any, ...]] = set()
    thread = threading.get_ident()
    evaluate = ShapeEnv.evaluate_expr

    def evaluate_expr(self: ShapeEnv, asked: Any, *args: Any, **kwargs: Any) -> Any:
        answer = evaluate(self, asked, *args, **kwargs)
        if threading.get_ident() == thread:
            asker, by_python = _asker(sys._getframe(1))
            place = (asker.f_code, asker.f_lineno) if by_python else asker.f_code
            key = (asked, answer, place)
            if key not in seen and (by_python or asked.free_symbols):
                seen.add(key)
                found.append(_question(asked, answer, asker, by_python))
        return answer

    ShapeEnv.evaluate_expr = evaluate_expr  # type: ignore[assignment]
    try:
        yield found
    finally:
        ShapeEnv.evaluate_expr = evaluate  # type: ignore[method-assign]


def _asker(frame: types.FrameType) -> tuple[types.FrameType, bool]:
    """The frame that a question comes from, and whether Python code asks it there."""
    converted = False
    while (name := frame.f_code.co_filename) == torch.__file__ or _is_symbolic(name):
        # SymBool.__bool__, SymInt.__int__, ...: what Python calls, and no operator in C++ does.
        converted |= name == torch.__file__
        assert frame.f_back is not None
        frame = frame.f_back
    return frame, converted and (not _is_torch(name) or _is_library(name))


def _question(asked: Any, answer: Any, asker: types.FrameType, by_python: bool) -> Question:
    user: types.FrameType | None = asker
    while user is not None and _is_torch(user.f_code.co_filename):
        user = user.f_back
    by_helper = by_python and _short(asker.f_code.co_filename).startswith(_HELPERS)
    return Question(asked, answer, by_python, by_helper, _line(user), asker.f_code.co_name)


def _is_symbolic(name: str) -> bool:
    return name.startswith(_TORCH) and name.removeprefix(_TORCH).startswith(_SYMBOLS)


def _is_library(name: str) -> bool:
    return name.removeprefix(_TORCH).startswith(_LIBRARY)


def _is_torch(name: str) -> bool:
    return name.startswith((_TORCH, _OWN))


def _line(frame: types.FrameType | None) -> str:
    if frame is None:
        return ""
    name, line = frame.f_code.co_filename, frame.f_lineno
    return f"{_short(name)}:{line}  {linecache.getline(name, line).strip()}".rstrip()


def _short(name: str) -> str:
    """The path of a source file from its package on."""
    parts = PurePath(name).parts
    start = parts.index("site-packages") + 1 if "site-packages" in parts else len(parts) - 1
    return "/".join(parts[start:])
