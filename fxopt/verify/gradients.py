"""Learning judged: a training program must not only answer the same but learn the same.

That is gradients of parameters and inputs, and what a call leaves in the buffers.

A gradient whose terms cancel holds the rounding of these terms: a batch norm's weight ahead of
another batch norm, which undoes any scale, may have a ten thousandth of the gradient that its terms
have, and is off by so many times the usual share of it, in eager mode as in any other order of
evaluation. How far rounding puts a gradient off is measured where one is found wrong: it is what it
moves by where inputs and weights move by a unit in the last place, which draws every rounding anew
(Higham, "Accuracy and Stability of Numerical Algorithms", 2002, chapter 1: the forward error is the
backward error times the condition number).

    g       a gradient of the program before, g' that of the program after it
    r       max over 8 draws of |g(inputs and weights * (1 ± eps)) - g|, entry by entry
    judged  g + sign(g' - g) max(|g' - g| - 4 r, 0)  in place of g'

Rounding moves gradients of ordinary condition by a few eps, a hundredth of what the claim allows:
but for cancelled ones, and entries that a tie to the last bit decides, r changes no judgement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fxopt.capture import attributes_kept
from fxopt.claim import Claim, Close, Exact, Sqnr
from fxopt.errors import ModelError
from fxopt.interpreter import evaluate, same_draws
from fxopt.program import Program
from fxopt.verify.judge import Verdict, worst_of
from fxopt.verify.oracle import Trial, call_model, tensors_kept


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
    old, new = (_learnt_by(program, trial, shared) for program in (before, after))
    return _compared(claim, trial, old, new, lambda: _rounding(before, trial, shared, old))


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
    return _compared(claim, trial, expected, found, lambda: _rounding(program, trial, named, found))


@dataclass(frozen=True)
class _Learnt:
    """Gradients by parameter and by input, and what the call wrote, by buffer."""

    parameters: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    written: Mapping[str, Tensor]


_DRAWS = 8
_MARGIN = 4.0
"""Right programs were off by 2 times the largest of 8 draws at most, by less than once mostly."""


def _compared(
    claim: Claim, trial: Trial, old: _Learnt, new: _Learnt, rounding: Callable[[], _Learnt]
) -> Verdict | None:
    """The verdict on plain differences and, where one is too large, on those beyond `rounding`."""
    bound = Close() if isinstance(claim, Exact) else claim
    plain = _verdicts(bound, trial, old, new)
    worst = _worst(*plain)
    if worst is None or worst.holds:
        return worst
    worst = _worst(*_verdicts(bound, trial, old, _beyond(rounding(), old, new)))
    if worst is None or worst.holds:
        return worst
    return next(one for verdicts in plain for one in verdicts if one.where == worst.where)


def _worst(parameters: Sequence[Verdict], others: Sequence[Verdict]) -> Verdict | None:
    """The worst of a parameter where one is wrong, else the worst of all."""
    if parameters and not worst_of(parameters).holds:
        return worst_of(parameters)
    verdicts = [*parameters, *others]
    return worst_of(verdicts) if verdicts else None


def _verdicts(
    bound: Close | Sqnr, trial: Trial, old: _Learnt, new: _Learnt
) -> tuple[list[Verdict], list[Verdict]]:
    """Those on the gradients of parameters, and those on all else."""
    parameters = _gradient_verdicts(bound, trial, old.parameters, new.parameters)
    others = _gradient_verdicts(bound, trial, old.inputs, new.inputs)
    for name, one in old.written.items():
        other = new.written.get(name)
        if other is not None and other.shape == one.shape:
            where = f"the buffer {name} after a call"
            others.append(Verdict(bound, bound.measure(one, other), trial, where))
    return parameters, others


def _gradient_verdicts(
    bound: Close | Sqnr, trial: Trial, old: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> list[Verdict]:
    largest = max(map(_magnitude, old.values()), default=0.0)
    return [
        Verdict(bound, bound.measure(one, new[name]), trial, f"the gradient of {name}")
        for name, one in old.items()
        if max(_magnitude(one), _magnitude(new[name])) > 0.1 * _noise(bound, one.dtype) * largest
    ]


def _beyond(rounding: _Learnt, old: _Learnt, new: _Learnt) -> _Learnt:
    """`new` with gradients as near to the old ones as rounding may have put them."""
    parameters, inputs = (
        {name: _nearer(one, other[name], noise[name]) for name, one in part.items()}
        for part, other, noise in (
            (old.parameters, new.parameters, rounding.parameters),
            (old.inputs, new.inputs, rounding.inputs),
        )
    )
    return replace(new, parameters=parameters, inputs=inputs)


def _nearer(old: Tensor, new: Tensor, noise: Tensor) -> Tensor:
    difference = new - old
    beyond = (difference.abs() - _MARGIN * noise).clamp_min(0.0)
    return torch.where(old == new, new, old + difference.sgn() * beyond)


def _rounding(
    program: Program, trial: Trial, parameters: Mapping[str, Tensor], found: _Learnt
) -> _Learnt:
    """How far the gradients of `program`, which are `found`, are off by rounding, each entry."""
    generator = torch.Generator().manual_seed(0)
    parts = found.parameters, found.inputs
    noise = [{name: torch.zeros_like(one.abs()) for name, one in part.items()} for part in parts]
    for _ in range(_DRAWS):
        moved: dict[int, Tensor] = {
            id(tensor): nn.Parameter(_moved(tensor, generator))
            for tensor in program.state.values()
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad
        }
        state = {name: moved.get(id(one), one) for name, one in program.state.items()}
        again = _learnt_by(
            replace(program, state=state),
            replace(trial, inputs=tuple(_moved(one, generator) for one in trial.inputs)),
            {name: moved.get(id(one), one) for name, one in parameters.items()},
        )
        others = again.parameters, again.inputs
        for part, other, largest in zip(parts, others, noise, strict=True):
            for name, one in part.items():
                off = (other[name] - one).abs().nan_to_num_(nan=0.0, posinf=0.0)
                largest[name] = torch.maximum(largest[name], off)
    of_parameters, of_inputs = noise
    return _Learnt(of_parameters, of_inputs, {})


def _moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Each entry of a floating-point tensor moved to a neighbour, up or down at random."""
    if not tensor.is_floating_point():
        return tensor
    up = torch.rand(tensor.shape, generator=generator).to(tensor.device) < 0.5
    step = torch.where(up, 1.0, -1.0).to(tensor) * torch.finfo(tensor.dtype).eps
    return tensor.detach() * (1.0 + step)


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
    kept = tensors_kept(buffers.values())
    with kept, attributes_kept(model), same_draws(), torch.enable_grad():
        outputs = call_model(model, program)(_given(inputs))
        # A written buffer that an output is made of would be put back under its gradient.
        after = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        changed = {name: one for name, one in after.items() if not _same_bits(one, before[name])}
        try:
            return _learnt(outputs, parameters, inputs, changed)
        except RuntimeError as error:
            reason = (str(error).splitlines() or ["(no message)"])[0]
            raise ModelError(
                f"{program.name} itself can't be trained: its backward raises "
                f"{type(error).__name__}: {reason}. Mend the model; mode='eval' needs no gradients."
            ) from error


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


def _noise(bound: Close | Sqnr, dtype: torch.dtype) -> float:
    """The share of a value that the claim allows to be wrong."""
    return bound.rtol_of(dtype) if isinstance(bound, Close) else float(10.0 ** (-bound.db / 20.0))


def _magnitude(gradient: Tensor) -> float:
    return float(gradient.abs().max()) if gradient.numel() else 0.0
