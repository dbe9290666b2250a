"""Fisher information: how sensitive a program's outputs are to an error in the value of a node.

An error e in the value y of a node moves the outputs z by J e, which costs

    KL(before ‖ after)  ~  ½ eᵀ Jᵀ F J e

with F = diag(p) - p pᵀ for logits z and p = softmax(z), and F = I where there are no logits: half
the squared error of the outputs. For signs ε drawn evenly and B Bᵀ = F, g = Jᵀ B ε has
E[g gᵀ] = Jᵀ F J, so one backward pass gives a sample for every node. With p,

    B ε = √p ε - p <√p, ε>

Summed over the width of one row, E[‖g_r‖²] is the trace of its block of Jᵀ F J: how much an error
of no particular direction costs there. Padding, and tokens that nobody reads, cost nothing.

Sources: Martens, "New insights and perspectives on the natural gradient method", JMLR 2020,
section 9 (the Fisher information is the generalized Gauss-Newton matrix); Li et al., "BRECQ", ICLR
2021, section 3.2 (layers rebuilt under the Fisher information of their outputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.errors import PassError
from fxopt.eval_graph import in_evaluation_mode
from fxopt.interpreter import evaluate, same_draws
from fxopt.observation.observation import check_no_nan
from fxopt.program import Program
from fxopt.recipe import Recipe


def output_gradients(
    program: Program, inputs: Mapping[fx.Node, fx.Node], seed: int
) -> Iterator[dict[fx.Node, tuple[Tensor, Tensor]]]:
    """For each calibration batch, by node: the value of its input, and a draw of g at its output.

    `inputs` names the operand to look at for each node. g has the shape of the node's value. The
    logits are the output of that name where it has two axes or more. A train-mode program is looked
    at in evaluation mode; all draws follow from `seed`.

    Raises `PassError` where no output depends on the nodes, `CalibrationError` for NaN in the
    inputs looked at.
    """
    program, same = in_evaluation_mode(program)
    frozen = {
        name: replace(one, requires_grad=False) if isinstance(one, Recipe) else one.detach()
        for name, one in program.state.items()
    }
    # `evaluate` records gradients for train mode only; the graph stays that of evaluation.
    traced = replace(program, state=frozen, mode="train")
    pairs = {node: (same(node), same(x)) for node, x in inputs.items()}
    tracked = {node for node, _ in pairs.values()}
    looked_at = {x for _, x in pairs.values()}
    draw = torch.Generator().manual_seed(seed)
    for index, batch in enumerate(program.batches()):
        seen: dict[fx.Node, Tensor] = {}

        def look(node: fx.Node, value: Any, index: int = index, seen: Any = seen) -> Any:
            if node in looked_at:
                check_no_nan(node, value, index)
            if node in tracked and not value.requires_grad:
                value = value.detach().requires_grad_()
            if node in tracked or node in looked_at:
                seen[node] = value
            return value

        with same_draws(), torch.enable_grad():
            outputs = evaluate(traced, batch, look, unwritten(traced))
            objective = _objective(traced, outputs, draw)
        values = [seen[node] for node, _ in pairs.values()]
        found = torch.autograd.grad(objective, values, allow_unused=True, materialize_grads=True)
        gradients = zip(pairs.items(), found, strict=True)
        yield {node: (seen[x].detach(), gradient) for (node, (_, x)), gradient in gradients}


def unwritten(program: Program) -> dict[fx.Node, Callable[..., Any]]:
    """What keeps a backward pass valid: nothing is written, so that no value changes after use."""
    return {
        node: lambda state, value: state
        for node in program.graph.nodes
        if node.target is torch.ops.aten.copy_.default
    }


def _objective(program: Program, outputs: Sequence[Tensor], draw: torch.Generator) -> Tensor:
    """<z, B ε>, whose gradient at a node is Jᵀ B ε."""
    answer = program.signature.unflatten(outputs)
    logits = answer.get("logits") if isinstance(answer, Mapping) else None
    if isinstance(logits, Tensor) and logits.ndim > 1 and logits.requires_grad:
        root = logits.detach().softmax(-1).sqrt()
        noise = root * _signs(logits, draw)
        noise = noise - root.square() * noise.sum(-1, keepdim=True)
        return (logits * noise).sum()
    tracked = [output for output in outputs if output.requires_grad]
    if not tracked:
        raise PassError(
            'weighting="fisher": no output depends on these layers by operations that have '
            'gradients; use weighting="uniform"'
        )
    return torch.stack([(y * _signs(y, draw)).sum() for y in tracked]).sum()


def _signs(like: Tensor, draw: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, like.shape, generator=draw) * 2 - 1).to(like)
