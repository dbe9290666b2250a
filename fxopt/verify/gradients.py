"""Gradients judged: a rewritten training program must not only answer but learn the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxopt.claim import Claim, Close, Exact, Sqnr
from fxopt.evaluate import evaluate, same_draws
from fxopt.program import Program
from fxopt.verify.judge import Verdict, worst_of
from fxopt.verify.oracle import Trial


def judge_gradients(claim: Claim, before: Program, after: Program, trial: Trial) -> Verdict | None:
    """The claim measured on the gradient of each parameter that both programs hold, the worst.

    It is that of the outputs' sum, each entry weighed by a random number, so that no part of an
    output cancels another (a softmax sums to a constant). Summing in another order changes last
    bits, so that an exact pass is held to `Close()`. None where no gradient can be compared.

    A gradient below a tenth of the noise that the claim allows the largest one is what rounding
    leaves of zero (that of a bias before a batch norm, say), and isn't judged.

    A parameter that the pass changed is another tensor, of another shape where channels were cut:
    its gradient has nothing to be compared with. An error in it shows in the gradients of the
    others, which pass through it. For a pass with an oracle, `before` is the oracle.
    """
    bound = Close() if isinstance(claim, Exact) else claim
    shared = {
        name: tensor
        for name, tensor in before.state.items()
        if isinstance(tensor, nn.Parameter)
        and tensor.requires_grad
        and after.state.get(name) is tensor
    }
    parameters = list(shared.values())
    pair = [_gradients(program, trial, parameters) for program in (before, after)]
    least = 0.1 * _noise(bound) * max(map(_magnitude, pair[0]), default=0.0)
    verdicts = [
        Verdict(bound, bound.measure(old, new), trial, f"the gradient of {name}")
        for name, old, new in zip(shared, *pair, strict=True)
        if max(_magnitude(old), _magnitude(new)) > least
    ]
    return worst_of(verdicts) if verdicts else None


def _gradients(program: Program, trial: Trial, parameters: Sequence[Tensor]) -> list[Tensor]:
    # A write would change what the backward keeps; after it, only outputs read what was written.
    unwritten = {
        node: lambda state, value: value
        for node in program.graph.nodes
        if node.target is torch.ops.aten.copy_.default
    }
    with same_draws(), torch.enable_grad():
        outputs = evaluate(program, trial.inputs, override=unwritten)
    tracked = [output for output in outputs if output.requires_grad]
    if not tracked:
        return [torch.zeros_like(parameter) for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(one.shape, generator=generator).to(one) for one in tracked]
    return list(
        torch.autograd.grad(tracked, parameters, weights, allow_unused=True, materialize_grads=True)
    )


def _noise(claim: Claim) -> float:
    """The share of a value that the claim allows to be wrong."""
    if isinstance(claim, Sqnr):
        return float(10.0 ** (-claim.db / 20.0))
    return (claim.rtol if isinstance(claim, Close) else None) or 1e-4


def _magnitude(gradient: Tensor) -> float:
    return float(gradient.abs().max()) if gradient.numel() else 0.0
