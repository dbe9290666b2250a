"""recommend: a pass list for a model on this machine, by written rules, each with its reason.

The rules look at the model's modules, at the example and at the device, and time products: those of
the model's costliest linear layers, in float32 and in int8. Nothing is captured or compiled. What
the list does to the model is judged when `transform` carries it out, and what it saves is measured
there; `fxopt.search` looks for a better one by trying.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxopt.calls import Inputs
from fxopt.capture import check_is_module, uncompiled
from fxopt.device import Device
from fxopt.kernels import multiplies_int8, takes_full_range
from fxopt.kernels.linear_speed import LINEAR_KERNELS, linear_speeds
from fxopt.lower.toolchain import has_cpp_compiler
from fxopt.pass_list import parse_passes
from fxopt.program import Mode, check_mode
from fxopt.rewriting import Pass

_FEW_ROWS = 8
"""Up to so many rows a product waits for its weights, and only these are worth making smaller."""

_GUESSED_ROWS = 256
_SHAPES_TIMED = 3

_BUDGET = "budget=sqnr(20)"
"""What int8 may cost the outputs: layers that cost more stay in float32."""

_KERNELS = {"weight_only": "weight_only", "dynamic": "int8", "static": "int8_static"}


@dataclass(frozen=True)
class Advice:
    """A pass, as a textual list writes it, and why it is in the list or isn't."""

    spec: str
    reason: str


@dataclass(frozen=True)
class Recommendation:
    """A pass list with its reasons. `print` shows them; `passes` go into `fxopt.transform`.

    `taken` are the passes in their order, `left_out` those that would be expected and aren't,
    `expect` what is known of the outcome before anything is done.
    """

    taken: tuple[Advice, ...]
    left_out: tuple[Advice, ...]
    expect: tuple[str, ...]

    @property
    def spec(self) -> str:
        """The list as text, as the command line's `--passes` takes it."""
        return ", ".join(one.spec for one in self.taken)

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The list as instances."""
        return parse_passes(self.spec)

    def lines(self) -> tuple[str, ...]:
        """What `print` shows: the list as text, below it the notes."""
        return (f"passes: {self.spec}", *(f"  {note}" for note in self.notes()))

    def notes(self) -> tuple[str, ...]:
        """What a report says of it: a sentence a pass, and what to expect."""
        return (
            *(f"recommended {one.spec}: {one.reason}" for one in self.taken),
            *(f"without {one.spec}: {one.reason}" for one in self.left_out),
            *(f"expect: {line}" for line in self.expect),
        )

    def __str__(self) -> str:
        return "\n".join(self.lines())


def recommend(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    calibrated: bool = False,
    mode: Mode = "eval",
) -> Recommendation:
    """The list of passes that suits `model` where its parameters are, and the reasons.

    `example_inputs` (as `fxopt.transform` takes them) tell how many rows a linear layer gets,
    without them 256 are assumed. `calibrated` says that `transform` will get `calibration=` inputs
    to learn ranges from. `transform(model, "auto", ...)` does what this says.

    Raises `ModelError` for what is no module, `PassError` for another mode.
    """
    check_is_module(model)
    check_mode(mode)
    return _Rules(uncompiled(model), example_inputs, calibrated, mode).recommendation()


class _Rules:
    def __init__(self, model: nn.Module, example: object, calibrated: bool, mode: Mode) -> None:
        self.mode, self.calibrated = mode, calibrated
        tensors = [*model.parameters(), *model.buffers()]
        self.place = next((one.device for one in tensors), torch.device("cpu"))
        self.device = Device.describe(self.place)
        self.modules = list(model.modules())
        self.linears = Counter(filter(None, map(_shape_of, self.modules)))
        self.bytes = sum(one.numel() * one.element_size() for one in model.parameters())
        self.rows = _rows_of(example)
        self.taken: list[Advice] = []
        self.left_out: list[Advice] = []
        self.expect: list[str] = []

    def recommendation(self) -> Recommendation:
        self._take("canonicalize", "constants are folded, what computes nothing is dropped")
        if self.mode == "eval":
            self._structure()
            self._int8()
        self._half()
        self._lowering()
        return Recommendation(tuple(self.taken), tuple(self.left_out), tuple(self.expect))

    def _take(self, spec: str, reason: str) -> None:
        self.taken.append(Advice(spec, reason))

    def _leave(self, spec: str, reason: str) -> None:
        self.left_out.append(Advice(spec, reason))

    def _structure(self) -> None:
        dead = sum(map(_dead_channels, self.modules))
        if dead:
            self._take("fold-pruned", f"output channels that are zero throughout: {dead}")
        if self.linears.total() > 1:
            self._take("fuse-linears", "linears that share an input become one product")
        norms = sum(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in self.modules)
        if norms:
            self._take(
                "fuse-conv-batch-norm", f"batch norms fold into what is before them: {norms}"
            )

    def _int8(self) -> None:
        mode: Literal["weight_only", "dynamic", "static"]
        if self.rows is not None and self.rows <= _FEW_ROWS:
            mode = "weight_only"
        else:
            mode = "static" if self.calibrated else "dynamic"
        options = [f"mode={mode}"] if mode != "dynamic" else []
        spec = f"int8-linear{{{', '.join([*options, _BUDGET])}}}"
        why_not = self._why_no_int8(mode)
        if why_not:
            self._leave("int8-linear", why_not)
            return
        if mode == "static":
            self._take("smooth-quant{alpha=auto, mode=static}", "outliers move into the weights")
        how = {
            "weight_only": f"with {self.rows} rows a product waits for its weights",
            "dynamic": "int8 products outrun float32's here; calibration= makes them faster still",
            "static": "int8 products outrun float32's here, with ranges learnt from calibration=",
        }
        self._take(spec, how[mode])
        if mode == "weight_only":
            return
        if self.place.type == "cpu" and not takes_full_range():
            self.expect.append("int8 weights of 7 bits, since this CPU has no int8 dot product")

    def _why_no_int8(self, mode: str) -> str | None:
        """Why int8 doesn't pay; None where one of the costliest shapes was timed to be faster."""
        if not self.linears:
            return "the model has no linear layers of its own; Int8Linear knows no others"
        if self.place.type != "cpu":
            return "half precision is the first choice on a GPU; fxopt.search tries int8 beside it"
        answer = multiplies_int8(self.device)
        if mode != "weight_only" and not answer:
            return answer.reason
        m, kernel = self.rows or _GUESSED_ROWS, _KERNELS[mode]
        bits = 8 if mode == "weight_only" or takes_full_range() else 7
        table = {name: LINEAR_KERNELS[name] for name in ("float", kernel)}
        faster: list[str] = []
        slower: list[str] = []
        for (k, n), count in self._costliest():
            timing = linear_speeds(
                m, k, n, torch.float32, self.place, rows=(), table=table, bits=bits
            ).at(m)
            ratio = timing.ratios.get(kernel)
            took = f"takes {ratio} the time" if ratio else "can't run"
            line = f"{took} at M={m}, K={k}, N={n} (layers: {count})"
            (faster if timing.pays(kernel) else slower).append(line)
        if not faster:
            return f"no faster here than float32: it {'; it '.join(slower)}"
        self.expect += [f"an int8 product {line}" for line in faster]
        weights = sum(count * k * n for (k, n), count in self.linears.items()) * 4
        self.expect.append(
            f"{weights / self.bytes:.0%} of the parameters are weights of linear layers, which "
            "take a quarter of their memory in int8"
        )
        return None

    def _costliest(self) -> list[tuple[tuple[int, int], int]]:
        """The shapes (K, N) with the most multiplications in all, and how many layers each has."""
        shapes = sorted(self.linears.items(), key=lambda one: -one[1] * one[0][0] * one[0][1])
        return shapes[:_SHAPES_TIMED]

    def _half(self) -> None:
        half = self.device.half()
        if half.dtype is None:
            self._leave("autocast", half.reason)
        else:
            self._take("autocast", half.reason)

    def _lowering(self) -> None:
        on_cpu = self.place.type == "cpu"
        if on_cpu and self.mode == "eval":
            self._take("prepack", "linears and attention run on oneDNN, weights laid out once")
        if on_cpu and not has_cpp_compiler():
            self._leave("lower", "Inductor needs a C++ compiler, and there is none")
        else:
            self._take("lower", "Inductor compiles what is between the products, in a minute or so")


def _shape_of(module: nn.Module) -> tuple[int, int] | None:
    """(K, N) of a linear layer, transformers' `Conv1D` among them; None for another module."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.dtype != torch.float32:
        return None
    if isinstance(module, nn.Linear):
        return weight.shape[1], weight.shape[0]
    return (weight.shape[0], weight.shape[1]) if type(module).__name__ == "Conv1D" else None


def _dead_channels(module: nn.Module) -> int:
    """Rows of a layer's weight that are zero throughout, with a bias of zero or none."""
    if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return 0
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return 0
    weight, bias = module.weight.detach(), module.bias
    if weight.is_meta or not weight.numel():
        return 0
    dead = weight.flatten(1).eq(0).all(1)
    return int((dead if bias is None else dead & bias.detach().eq(0)).sum())


def _rows_of(example: object) -> int | None:
    """How many rows a linear layer gets in a call; None where no example tells.

    Token ids have a row an entry, images of four axes one each, other floats one for all axes but
    the last.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    return max(map(_rows_in, tensors), default=None)


def _rows_in(tensor: Tensor) -> int:
    if not tensor.is_floating_point():
        return max(tensor.numel(), 1)
    if tensor.ndim == 4:
        return max(tensor.shape[0], 1)
    return max(math.prod(tensor.shape[:-1]), 1)
