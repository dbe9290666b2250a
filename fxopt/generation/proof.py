"""Teacher forcing: the optimised model, token by token, against the original on the whole text.

Each step is given the tokens that the original would have written, whatever it would say itself, so
that every position can be compared; but keys and values are its own, and their errors add up as
they do in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.claim import Claim, sqnr
from fxopt.errors import EquivalenceError
from fxopt.generation.cache import CACHE
from fxopt.generation.plan import GenerationPlan

_STEPS = 12
"""Tokens that the original writes on, which are read one by one."""


@dataclass(frozen=True)
class TeacherForcing:
    """How far `positions` logits were from the original's, and in how many the first choice agreed.

    A choice that differs is a `tie` where the original's two best logits are no further from each
    other than twice the largest error of a logit there.
    """

    positions: int
    one_by_one: int
    decibels: float
    agreed: int
    ties: int

    def __str__(self) -> str:
        ties = f" ({self.ties} ties among the others)" if self.ties else ""
        return (
            f"generation: {self.positions} positions of text that the original wrote, "
            f"{self.one_by_one} of them read one by one: logits {self.decibels:.1f} dB from the "
            f"original's, first choices agree in {self.agreed}{ties}"
        )


def teacher_forced(
    plan: GenerationPlan, generating: nn.Module, claim: Claim | None
) -> TeacherForcing:
    """The optimised model `generating` against the original that `plan` was made for.

    Without a `claim`, as of a pruned model, which means to compute something else, it is measured.

    Raises `EquivalenceError` where its logits are outside of `claim`.
    """
    original = plan.model()
    assert original is not None
    text, seen = _continued(plan)
    read = plan.text.shape[1]
    with torch.no_grad():
        wanted = original(**plan.call(text, seen), use_cache=False).logits[seen]
        # Row by row, as text is mostly written; batches were judged step by step.
        rows = [_read(plan, generating, text, seen, slice(i, i + 1)) for i in range(len(text))]
    got = torch.cat(rows)[seen]
    measured = None if claim is None else claim.measure(wanted, got)
    if measured is not None and not measured.holds:
        raise EquivalenceError(
            f"read token by token, the result broke its claim: claimed {claim}, measured "
            f"{measured.text} against the original's logits. Each program keeps its claim; errors "
            "in keys and values have added up. Quantize fewer layers, or allow more with budget=."
        )
    return _compared(wanted, got, text.shape[0] * (text.shape[1] - read))


def _read(plan: GenerationPlan, generating: Any, text: Tensor, seen: Tensor, rows: slice) -> Tensor:
    """The logits of `rows` of text [B, T]: the plan's is read at once, what follows one by one."""
    text, seen, at_once = text[rows], seen[rows], plan.text.shape[1]
    given = plan.call(text[:, :at_once], seen[:, :at_once], rows=rows)
    output = generating(**given, use_cache=True)
    found = [output.logits]
    for at in range(at_once, text.shape[1]):
        given = plan.call(text[:, : at + 1], seen[:, : at + 1], at, rows)
        output = generating(**given, **{CACHE: output[CACHE]})
        found.append(output.logits)
    return torch.cat(found, 1)


def _compared(wanted: Tensor, got: Tensor, one_by_one: int) -> TeacherForcing:
    same = wanted.argmax(-1) == got.argmax(-1)
    best = wanted.float().topk(2, -1).values
    error = (wanted - got).abs().amax(-1)
    ties = int(((best[:, 0] - best[:, 1] <= 2 * error) & ~same).sum())
    return TeacherForcing(len(same), one_by_one, sqnr(wanted, got), int(same.sum()), ties)


def _continued(plan: GenerationPlan) -> tuple[Tensor, Tensor]:
    """The plan's text and what the original writes after it, and what of it is seen."""
    reader, text, seen = plan.reader(), plan.text, plan.seen
    logits = reader.read(text, seen)
    room = plan.room()
    steps = _STEPS if room is None else min(_STEPS, room - text.shape[1])
    for index in range(steps):
        new = logits[:, -1].argmax(-1, keepdim=True)
        text, seen = torch.cat([text, new], 1), torch.cat([seen, torch.ones_like(new).bool()], 1)
        if index < steps - 1:
            logits = reader.read(new)
    return text, seen
