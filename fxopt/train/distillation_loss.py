"""The loss of a student against its teacher: for `distill`, and inside any other training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import TrainError
from fxopt.train import losses
from fxopt.train.calling import call, evaluating, named_inputs
from fxopt.train.counted import counted_logits, counted_queries, counted_tokens
from fxopt.train.layer_pairs import checked_pairs, layer_pairs, state_pairs
from fxopt.train.outputs import named_outputs, required
from fxopt.train.rng_state import rng_state_kept
from fxopt.train.terms import Attention, Hidden, Logits, Task, Term, checked_terms

Pair = tuple[str, Tensor, Tensor]


class DistillationLoss(nn.Module):
    """`loss(outputs, batch)`: what a student that returned `outputs` for `batch` has to learn.

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):  # of a Trainer
            outputs = model(**inputs)
            loss = self.distillation(outputs, inputs)
            return (loss, outputs) if return_outputs else loss

    `terms` left out are, by what both models return for the first batch: `Task()` where the student
    gives a loss, and `Logits()` where both give logits, else `Hidden()`.
    The teacher runs in eval mode and without gradients; its parameters aren't this module's, but
    `.to(device)` moves it too.

    Hidden states of two widths are compared through projections, which learn with the student: call
    `prepare(student, batch)` before the optimizer is made, and give it `loss.parameters()` as well.
    A Trainer clips and zeroes the gradients of its model only, so let the optimizer zero theirs:
    `optimizer.register_step_post_hook(lambda *_: loss.zero_grad())`.

    Raises `TrainError` for wrong terms, and where the outputs lack what a term needs.
    """

    teacher: nn.Module

    def __init__(self, teacher: nn.Module, terms: Sequence[Term] | None = None) -> None:
        super().__init__()
        if not isinstance(teacher, nn.Module):
            raise TrainError(f"the teacher must be an nn.Module, not {type(teacher).__name__}")
        object.__setattr__(self, "teacher", teacher)  # not a part: it isn't trained or saved
        self.terms = checked_terms(terms)
        self.projections = nn.ModuleDict()

    def forward(self, outputs: Any, batch: Any) -> Tensor:
        """The weighted sum of the terms, a scalar."""
        return self.total(self.losses(outputs, batch, self.teach(batch)))

    def prepare(self, student: nn.Module, batch: Any) -> DistillationLoss:
        """Settle the terms and make the projections, from one call of both models; returns itself.

        The projections are drawn from torch's generator. Nothing is made twice.
        """
        with evaluating(student), rng_state_kept():
            outputs = call(student, batch)
        self.fit(outputs, self.teach(batch))
        return self

    def teach(self, batch: Any) -> Any:
        """The teacher's outputs for `batch`."""
        with evaluating(self.teacher):
            return call(self.teacher, batch)

    def fit(self, outputs: Any, taught: Any) -> None:
        """Settle the terms and make the projections that these outputs need."""
        student, teacher = named_outputs(outputs), named_outputs(taught)
        self.terms = self.terms or _possible_terms(student, teacher)
        for name, own, other in self._hidden_pairs(student, teacher):
            if own.shape[-1] != other.shape[-1] and name not in self.projections:
                dtype = torch.promote_types(own.dtype, torch.float32)
                self.projections[name] = nn.Linear(
                    own.shape[-1], other.shape[-1], bias=False, device=own.device, dtype=dtype
                )

    def losses(self, outputs: Any, batch: Any, taught: Any) -> dict[str, Tensor]:
        """The value of each term before its weight, as {"logits": scalar, ...}."""
        student, teacher = named_outputs(outputs), named_outputs(taught)
        if self.terms is None:
            self.terms = _possible_terms(student, teacher)
        inputs = named_inputs(self.teacher, batch)
        values: dict[str, Tensor] = {}
        for term in self.terms:
            if isinstance(term, Task):
                values[term.name] = required(student, "loss", "student", "Task()").mean()
            elif isinstance(term, Logits):
                values[term.name] = self._logits(term, student, teacher, inputs)
            elif isinstance(term, Hidden):
                values[term.name] = self._hidden(term, student, teacher, inputs)
            else:
                values[term.name] = self._attention(term, student, teacher, inputs)
        return values

    def total(self, values: Mapping[str, Tensor]) -> Tensor:
        """The sum of what `losses` gave, each times its term's weight."""
        weights = {term.name: term.weight for term in self.terms or ()}
        return torch.stack([weights[name] * value for name, value in values.items()]).sum()

    def extra_repr(self) -> str:
        return f"teacher={type(self.teacher).__name__}, terms={self.terms}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DistillationLoss:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.teacher._apply(fn, recurse)
        return self

    def _logits(
        self, term: Logits, student: Mapping[str, Any], teacher: Mapping[str, Any], inputs: Any
    ) -> Tensor:
        own: Tensor = required(student, "logits", "student", "Logits()")
        other: Tensor = required(teacher, "logits", "teacher", "Logits()")
        self._check_shapes("logits", own, other)
        keep = counted_logits(inputs, own, self.teacher, term.next_token)
        return losses.logits_divergence(own, other, term.temperature, keep)

    def _hidden(
        self, term: Hidden, student: Mapping[str, Any], teacher: Mapping[str, Any], inputs: Any
    ) -> Tensor:
        distance = losses.hidden_mse if term.distance == "mse" else losses.hidden_cosine
        found = []
        for name, own, other in self._hidden_pairs(student, teacher):
            states = self._projected(name, own, other)
            self._check_shapes(f"hidden states {name}", states, other)
            keep = counted_tokens(inputs, other, self.teacher)
            found.append(distance(states, other, keep))
        return torch.stack(found).mean()

    def _attention(
        self, term: Attention, student: Mapping[str, Any], teacher: Mapping[str, Any], inputs: Any
    ) -> Tensor:
        own = required(student, "attentions", "student", "Attention()")
        other = required(teacher, "attentions", "teacher", "Attention()")
        pairs = term.layers or layer_pairs(len(own), len(other))
        distance = losses.attention_kl if term.distance == "kl" else losses.attention_mse
        found = []
        for i, j in checked_pairs(pairs, len(own), len(other), "Attention"):
            self._check_shapes(f"attentions {i} and {j}", own[i][:, 0], other[j][:, 0])
            keep = counted_queries(inputs, other[j], self.teacher)
            found.append(distance(own[i], other[j], keep))
        return torch.stack(found).mean()

    def _hidden_pairs(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any]
    ) -> Iterator[Pair]:
        """(name, student's states, teacher's states) of each pair that the term Hidden compares."""
        term = next((term for term in self.terms or () if isinstance(term, Hidden)), None)
        if term is None:
            return
        names = (set(student), set(teacher))
        layered = term.layers is not None or any("hidden_states" in known for known in names)
        if not layered and all("last_hidden_state" in known for known in names):
            yield "last", student["last_hidden_state"], teacher["last_hidden_state"]
            return
        own = required(student, "hidden_states", "student", "Hidden()")
        other = required(teacher, "hidden_states", "teacher", "Hidden()")
        pairs = term.layers or state_pairs(len(own), len(other))
        for i, j in checked_pairs(pairs, len(own), len(other), "Hidden"):
            yield f"{i}_{j}", own[i], other[j]

    def _projected(self, name: str, own: Tensor, other: Tensor) -> Tensor:
        if name in self.projections:
            projection = self.projections[name]
            weight: Any = projection.weight
            return projection(own.to(weight.dtype))  # type: ignore[no-any-return]
        if own.shape[-1] != other.shape[-1]:
            raise TrainError(
                f"hidden states {name} of the student have width {own.shape[-1]}, the teacher's "
                f"{other.shape[-1]}: a projection must learn between them. Call "
                "loss.prepare(student, batch) before the optimizer is made, and give it "
                "[*student.parameters(), *loss.parameters()]"
            )
        return own

    def _check_shapes(self, what: str, own: Tensor, other: Tensor) -> None:
        if own.device != other.device:
            raise TrainError(
                f"{what} of the student are on {own.device}, the teacher's on {other.device}. Move "
                f"the teacher: loss.to('{own.device}')"
            )
        if own.shape != other.shape:
            raise TrainError(
                f"{what} of the student have shape {tuple(own.shape)}, the teacher's "
                f"{tuple(other.shape)}; both must have the same rows and classes"
            )


def _possible_terms(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> tuple[Term, ...]:
    if _is_bare(student) and _is_bare(teacher):
        raise TrainError(
            "both models return tensors without a name, which may be logits or states: say which "
            "with terms=[Logits()] or terms=[Hidden()]"
        )
    own_loss: tuple[Term, ...] = (Task(),) if "loss" in student else ()
    has_logits = "logits" in student and "logits" in teacher
    return (*own_loss, Logits() if has_logits else Hidden())


def _is_bare(outputs: Mapping[str, Any]) -> bool:
    return "logits" in outputs and outputs["logits"] is outputs.get("last_hidden_state")
