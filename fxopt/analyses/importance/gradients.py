"""Taylor importance: what zeroing a channel changes, to first order.

    Σ over batches (Σ over the channel's parameters  g · w)²

g is the gradient of the graph's own loss where it has one: the change of the loss, squared.
Otherwise it is that of <y, ε> for outputs y and a Gaussian draw ε, and

    E[(g · w)²] = ‖J w‖²

is the first-order change of the outputs' energy. Source: Molchanov et al., "Importance Estimation
for Neural Network Pruning", CVPR 2019.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fxopt.analyses.channels import Group
from fxopt.analyses.importance.magnitude import along, finite, parameters, per_channel
from fxopt.errors import PassError
from fxopt.eval_graph import evaluation_mode
from fxopt.interpreter import evaluate, same_draws
from fxopt.observation.fisher import unwritten
from fxopt.program import Program
from fxopt.recipe import Recipe


def taylor(program: Program, groups: Sequence[Group], seed: int) -> dict[str, Tensor]:
    """The Taylor importance of each channel; parameters of `groups` alone get gradients."""
    places = {group.name: parameters(group, group.places) for group in groups}
    traced, leaves = _traced(program, {one.name for found in places.values() for one in found})
    generator = torch.Generator().manual_seed(seed)
    scores = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    for batch in program.batches():
        gradients = _gradients(traced, leaves, batch, generator)
        sums: dict[tuple[str, int], Tensor] = {}
        for group in groups:
            change = torch.zeros(group.size, dtype=torch.float64)
            for place in places[group.name]:
                key = place.name, place.axis
                if key not in sums:
                    product = gradients[place.name] * leaves[place.name].detach()
                    sums[key] = finite(along(product, place.axis), f"the gradient of {place.name}")
                change += per_channel(sums[key], place)
            scores[group.name] += change.square()
    return scores


def _traced(program: Program, names: set[str]) -> tuple[Program, dict[str, Tensor]]:
    """The program in evaluation mode, recording gradients of the state `names`, which it shares."""
    program = evaluation_mode(program)
    leaves = {name: program.tensor(name).detach().requires_grad_() for name in sorted(names)}
    rest = {
        name: replace(one, requires_grad=False) if isinstance(one, Recipe) else one.detach()
        for name, one in program.state.items()
        if name not in leaves
    }
    # `evaluate` records gradients for train mode only; the graph stays that of evaluation.
    return replace(program, state={**rest, **leaves}, mode="train"), leaves


def _gradients(
    program: Program, leaves: Mapping[str, Tensor], batch: Sequence[Tensor], draw: torch.Generator
) -> dict[str, Tensor]:
    with same_draws(), torch.enable_grad():
        outputs = evaluate(program, batch, override=unwritten(program))
        objective = _objective(program, outputs, draw)
    tensors = list(leaves.values())
    found = torch.autograd.grad(objective, tensors, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def _objective(program: Program, outputs: Sequence[Tensor], draw: torch.Generator) -> Tensor:
    """The loss among the outputs, or their product with a Gaussian draw."""
    answer = program.signature.unflatten(outputs)
    loss = answer.get("loss") if isinstance(answer, Mapping) else None
    if isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad:
        return loss
    tracked = [output for output in outputs if output.requires_grad]
    if not tracked:
        raise PassError(
            "importance(kind='taylor'): no output depends on a parameter of the groups by "
            "operations that have gradients; use 'activation' or a magnitude"
        )
    noise = [torch.randn(one.shape, generator=draw).to(one) for one in tracked]
    return torch.stack([(y * e).sum() for y, e in zip(tracked, noise, strict=True)]).sum()
