"""Learning judged: a training program must not only answer the same but learn the same.

That is gradients of parameters and inputs, and what a call leaves in the buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fxopt.capture import attributes_kept
from fxopt.claim import Claim, Close, Exact, Sqnr
from fxopt.interpreter import evaluate, same_draws
from fxopt.program import Program
from fxopt.verify.judge import Verdict, worst_of
from fxopt.verify.oracle import Trial, call_model


def judge_gradients(claim: Claim, before: Program, after: Program, trial: Trial) -> Verdict | None:
    """The claim measured on the gradient of each parameter that both programs hold, the worst.

    Those of the inputs are judged as well, and what both write to buffers. A gradient is that of
    the outputs' sum, each entry weighed by a random number, so that no part of an output cancels
    another (a softmax sums to a constant). Summing in another order changes last bits, so that an
    exact pass is held to `Close()`. None where nothing can be compared.

    A gradient below a tenth of the noise that the claim allows the largest one is what rounding
    leaves of zero (that of a bias before a batch norm, say), and isn't judged.

    A parameter that the pass changed is another tensor, of another shape where channels were cut:
    its gradient has nothing to be compared with. An error in it shows in the gradients of the
    others, which pass through it. For a pass with an oracle, `before` is the oracle.
    """
    shared = {
        name: tensor
        for name, tensor in before.state.items()
        if isinstance(tensor, nn.Parameter)
        and tensor.requires_grad
        and after.state.get(name) is tensor
    }
    pair = [_learnt_by(program, trial, shared) for program in (before, after)]
    return _compared(claim, trial, *pair)


def judge_learning(
    claim: Claim, model: nn.Module, program: Program, trial: Trial
) -> Verdict | None:
    """The claim measured on what a call of the eager `model` and of `program`, its capture, learns.

    As `judge_gradients`, over all parameters and buffers of the model: one that the program doesn't
    hold has no gradient there, and isn't written.
    """
    named = {name: one for name, one in model.named_parameters() if one.requires_grad}
    expected = _learnt_by_model(model, program, trial, named)
    found = _learnt_by(program, trial, named)
    buffers = {name: one.detach() for name, one in model.named_buffers()}
    expected = replace(expected, written={**buffers, **expected.written})
    found = replace(found, written={**buffers, **found.written})
    return _compared(claim, trial, expected, found)


@dataclass(frozen=True)
class _Learnt:
    """Gradients by parameter and by input, and what the call wrote, by buffer."""

    parameters: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    written: Mapping[str, Tensor]


def _compared(claim: Claim, trial: Trial, old: _Learnt, new: _Learnt) -> Verdict | None:
    """The worst of a parameter where one is wrong, else the worst of all."""
    bound = Close() if isinstance(claim, Exact) else claim
    verdicts = _gradient_verdicts(bound, trial, old.parameters, new.parameters)
    if verdicts and not worst_of(verdicts).holds:
        return worst_of(verdicts)
    verdicts += _gradient_verdicts(bound, trial, old.inputs, new.inputs)
    for name, one in old.written.items():
        other = new.written.get(name)
        if other is not None and other.shape == one.shape:
            where = f"the buffer {name} after a call"
            verdicts.append(Verdict(bound, bound.measure(one, other), trial, where))
    return worst_of(verdicts) if verdicts else None


def _gradient_verdicts(
    claim: Claim, trial: Trial, old: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> list[Verdict]:
    least = 0.1 * _noise(claim) * max(map(_magnitude, old.values()), default=0.0)
    return [
        Verdict(claim, claim.measure(one, new[name]), trial, f"the gradient of {name}")
        for name, one in old.items()
        if max(_magnitude(one), _magnitude(new[name])) > least
    ]


def _learnt_by(program: Program, trial: Trial, parameters: Mapping[str, Tensor]) -> _Learnt:
    # A write would change what the backward keeps; after it, only outputs read what was written.
    written: dict[str, Tensor] = {}

    def seen(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        def keep(state: Tensor, value: Tensor) -> Tensor:
            written[name] = value.detach()
            return value

        return keep

    writes = {
        node: seen(str(node.args[0].target))
        for node in program.graph.nodes
        if node.target is torch.ops.aten.copy_.default
    }
    inputs = _leaves(program, trial)
    with same_draws(), torch.enable_grad():
        outputs = evaluate(program, _given(inputs), override=writes)
    kept = {name: one for name, one in written.items() if name in program.state}
    return _learnt(outputs, parameters, inputs, kept)


def _learnt_by_model(
    model: nn.Module, program: Program, trial: Trial, parameters: Mapping[str, Tensor]
) -> _Learnt:
    buffers = dict(model.named_buffers())
    before = {name: buffer.detach().clone() for name, buffer in buffers.items()}
    inputs = _leaves(program, trial)
    with attributes_kept(model), same_draws(), torch.enable_grad():
        outputs = call_model(model, program)(_given(inputs))
        # A written buffer that an output is made of would be put back under its gradient.
        after = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        changed = {name: one for name, one in after.items() if not _same_bits(one, before[name])}
        learnt = _learnt(outputs, parameters, inputs, changed)
    with torch.no_grad():
        for name in changed:
            buffers[name].copy_(before[name])
    return learnt


def _leaves(program: Program, trial: Trial) -> dict[str, Tensor]:
    """The inputs by path, as leaves that gradients of floating-point ones are taken of."""
    paths = (tensor.path for tensor in program.signature.tensors)
    return {
        path: one.detach().clone().requires_grad_(one.is_floating_point())
        for path, one in zip(paths, trial.inputs, strict=True)
    }


def _given(leaves: Mapping[str, Tensor]) -> list[Tensor]:
    """What a call is given, which it may write to."""
    return [leaf.clone() for leaf in leaves.values()]


def _learnt(
    outputs: Sequence[Tensor],
    parameters: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    written: Mapping[str, Tensor],
) -> _Learnt:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(one.shape, generator=generator).to(one.device) for one in outputs]
    tracked = [(one, drawn[at].to(one)) for at, one in enumerate(outputs) if one.requires_grad]
    floating = {f"the input {name}": one for name, one in inputs.items() if one.requires_grad}
    wanted = [*parameters.values(), *floating.values()]
    found: Sequence[Tensor] = [torch.zeros_like(one) for one in wanted]
    if tracked and wanted:
        found = torch.autograd.grad(
            [one for one, _ in tracked],
            wanted,
            [weights for _, weights in tracked],
            allow_unused=True,
            materialize_grads=True,
        )
    count = len(parameters)
    return _Learnt(
        dict(zip(parameters, found[:count], strict=True)),
        dict(zip(floating, found[count:], strict=True)),
        written,
    )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _noise(claim: Claim) -> float:
    """The share of a value that the claim allows to be wrong."""
    if isinstance(claim, Sqnr):
        return float(10.0 ** (-claim.db / 20.0))
    return (claim.rtol if isinstance(claim, Close) else None) or 1e-4


def _magnitude(gradient: Tensor) -> float:
    return float(gradient.abs().max()) if gradient.numel() else 0.0
