"""Casts between floating dtypes: how many there are, and the bytes that they move.

A cast of n entries reads them in one dtype and writes them in another: n * (old + new bytes). An
operator that converts its operands while it reads them (bfloat16 + float32) writes no copy and
counts nothing.

`torch.autocast` casts each operand of the operators on its lists, at every call. It keeps the
result, for as long as the outermost region lasts, only where the operand is a float32 leaf that
requires gradients, and no view of one; whether gradients are recorded makes no difference. So a
region around one call casts each weight once, in `no_grad` as well; a frozen weight, a buffer and
the transposed view of a weight are cast at every use, and under `inference_mode` everything is.

Source: aten/src/ATen/autocast_mode.cpp (`cached_cast`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.errors import FxoptError, PassError
from fxopt.interpreter import evaluate
from fxopt.nodes import fake, size_at_capture
from fxopt.operators.casts import CASTS
from fxopt.program import Program

aten = torch.ops.aten

_LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Casts:
    """How many casts from one floating dtype to another, and the bytes that they read and write.

    A cast is of weights when it reads a parameter, a buffer or a constant of the graph, or a view
    of one; else of activations. `unsized` says how many of them have a size that depends on values:
    their bytes are unknown and count as 0.
    """

    weights: int = 0
    weight_bytes: int = 0
    activations: int = 0
    activation_bytes: int = 0
    unsized: int = 0

    @property
    def count(self) -> int:
        """Casts of weights and activations."""
        return self.weights + self.activations

    @property
    def bytes(self) -> int:
        """Bytes that casts of weights and activations read and write."""
        return self.weight_bytes + self.activation_bytes

    def __add__(self, other: Casts) -> Casts:
        return Casts(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        if not self.count:
            return "no casts"
        text = (
            f"{_casts(self.count)}, {_size(self.bytes)}: "
            f"{self.weights} of weights ({_size(self.weight_bytes)}), "
            f"{self.activations} of activations ({_size(self.activation_bytes)})"
        )
        return f"{text}; without {self.unsized} whose size is data" if self.unsized else text


def graph_casts(program: Program) -> Casts:
    """The casts that the graph writes out as nodes, at the sizes of the example.

    What an operator casts within (`softmax(x, dtype=float32)` of bfloat16) is no node and isn't
    counted.
    """
    found = Casts()
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in CASTS:
            found += _cast(fake(node.args[0]), fake(node), _is_weight(node.args[0]))
    return found


def autocast_casts(program: Program, dtype: torch.dtype) -> Casts:
    """What `torch.autocast` to `dtype` (bfloat16 or float16) casts in one call of a program.

    The graph is run forward on fake tensors of the example's sizes, which computes nothing. It
    holds what the model does in float32: one whose own code asks for dtypes (T5 casts to that of a
    weight), or goes another way when it isn't captured (Llama repeats keys later), casts other
    activations when it runs under autocast; `counted_casts` measures them.

    Raises `PassError` for another dtype, `FxoptError` where the graph can't run under autocast.
    """
    if dtype not in _LOW:
        raise PassError(
            f"dtype={dtype}: torch.autocast lowers to torch.bfloat16 or torch.float16; ask for one "
            "of these"
        )
    device = next((n.meta["val"].device for n in program.placeholders), torch.device("cpu"))
    with FakeTensorMode(shape_env=ShapeEnv()):
        state = {
            name: torch.empty(
                t.shape, dtype=t.dtype, device=t.device, requires_grad=t.requires_grad
            )
            for name, t in program.state.items()
        }
        inputs = [_at_capture(node) for node in program.placeholders]
        fakes = replace(program, state=state)

        def run() -> None:
            with torch.autocast(device.type, dtype):
                evaluate(fakes, inputs)

        try:
            return counted_casts(run, state.values())
        except RuntimeError as error:
            raise FxoptError(
                f"the graph of {program.name}, captured in float32, can't run under torch.autocast "
                f"({str(error).splitlines()[0]}); if the model can, measure it with counted_casts"
            ) from error


def counted_casts(run: Callable[[], object], parameters: Iterable[Tensor]) -> Casts:
    """The casts that `run()` makes, counted while it runs eagerly.

    `parameters` are the tensors whose casts count as casts of weights: parameters and buffers.
    `run` enters `torch.autocast` by itself, since a region that is already open may hold casts of
    weights from before. What a compiled function does within its kernels isn't seen.
    """
    counter = _Counter(parameters)
    with counter:
        run()
    return counter.found


class _Counter(TorchDispatchMode):
    """Adds up the casts that are dispatched while it is on."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = Casts()
        self._weights = frozenset(filter(None, map(_storage, weights)))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Under inference_mode composite operators arrive whole, with their casts inside.
        if isinstance(func, torch._ops.OpOverload) and func is not torch.ops.prim.device.default:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        if func is aten._to_copy.default:
            self.found += _cast(args[0], result, _storage(args[0]) in self._weights)
        return result


def _cast(before: Any, after: Any, of_weights: bool) -> Casts:
    """One cast, or none where no floating dtype turns into another."""
    if not (before.is_floating_point() and after.is_floating_point()):
        return Casts()
    if before.dtype == after.dtype:
        return Casts()
    sized = not free_unbacked_symbols(after.shape)
    width = before.dtype.itemsize + after.dtype.itemsize
    moved = math.prod(map(size_at_capture, after.shape)) * width if sized else 0
    if of_weights:
        return Casts(weights=1, weight_bytes=moved, unsized=int(not sized))
    return Casts(activations=1, activation_bytes=moved, unsized=int(not sized))


def _is_weight(node: fx.Node) -> bool:
    """Whether a node is a tensor of the state, or a view of one."""
    while node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        is_view = schema is None or (
            bool(schema.returns) and schema.returns[0].alias_info is not None
        )
        if not is_view or not isinstance(node.args[0], fx.Node) or _changes_dtype(node):
            return False
        node = node.args[0]
    return node.op == "get_attr"


def _changes_dtype(node: fx.Node) -> bool:
    # An operator such as aten.to.dtype is a view where it has nothing to do.
    before, after = fake(node.args[0]), fake(node)
    return isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype != after.dtype


def _at_capture(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    sizes = [size_at_capture(size) for size in value.shape]
    return torch.empty(sizes, dtype=value.dtype, device=value.device)


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    # A tensor in another layout (sparse, oneDNN's) has no storage to know it by.
    strided = tensor.layout is torch.strided
    return StorageWeakRef(tensor.untyped_storage()) if strided else None


def _casts(count: int) -> str:
    return "1 cast" if count == 1 else f"{count} casts"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
