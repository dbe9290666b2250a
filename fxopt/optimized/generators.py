"""The classes of modules that generate, by what they generate from."""

from __future__ import annotations

from pathlib import Path

from fxopt.errors import SaveError
from fxopt.generation import GenerationPlan, Seq2SeqPlan, hears
from fxopt.optimized.generating import Generating
from fxopt.optimized.seq2seq import Seq2SeqGenerating
from fxopt.optimized.whisper import WhisperGenerating

_CLASSES: dict[str, type[Generating]] = {
    one.kind: one for one in (Generating, Seq2SeqGenerating, WhisperGenerating)
}


def generator_of(plan: GenerationPlan) -> type[Generating]:
    """The class of what is made by `plan`."""
    if not isinstance(plan, Seq2SeqPlan):
        return Generating
    return WhisperGenerating if hears(plan.model()) else Seq2SeqGenerating


def generator_called(kind: object, origin: str | Path) -> type[Generating]:
    """The class that a module saved at `origin` names; `SaveError` where there is none."""
    found = _CLASSES.get(kind) if isinstance(kind, str) else None
    if found is None:
        raise SaveError(f"{origin} generates as {kind!r:.40}, which this fxopt doesn't know")
    return found
