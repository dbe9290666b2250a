"""The systems that are timed side by side: each takes a model and inputs and gives a callable.

Every system gets the same model, the same inputs and as many threads as torch has, runs in the
settings that its own documentation recommends for latency, and returns the first output tensor.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class System:
    """A name, how to make a callable of a model, and the packages that this takes."""

    name: str
    prepare: Callable[[nn.Module, Inputs], Run]
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """The packages that aren't installed here."""
        return tuple(name for name in self.needs if importlib.util.find_spec(name) is None)


class _FirstOutput(nn.Module):
    """The model with positional inputs and its first output tensor, as exporters want it."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        return first(self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=False))


def first(output: Any) -> Tensor:
    """The first tensor of a model's output."""
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


def eager(model: nn.Module, inputs: Inputs) -> Run:
    """The model as it is."""
    return lambda: first(model(**inputs))


def fxopt_list(passes: str) -> Callable[[nn.Module, Inputs], Run]:
    """`fxopt.transform` with a textual list of passes."""

    def prepare(model: nn.Module, inputs: Inputs) -> Run:
        import fxopt

        # The benchmark checks the outputs and takes the times itself.
        optimized = fxopt.transform(
            model, passes, example_inputs=dict(inputs), verify=False, measure_cost=False
        )
        return lambda: first(optimized(**inputs))

    return prepare


def torch_compile(model: nn.Module, inputs: Inputs) -> Run:
    """`torch.compile` with freezing, which packs the weights for oneDNN."""
    return _compiled(model, inputs, freezing=True)


def torchao_int8(freezing: bool) -> Callable[[nn.Module, Inputs], Run]:
    """torchao's int8 per-token dynamic activations, int8 weights, then `torch.compile`."""

    def prepare(model: nn.Module, inputs: Inputs) -> Run:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantized = copy.deepcopy(model)
        quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
        return _compiled(quantized, inputs, freezing=freezing)

    return prepare


def openvino_fp32(model: nn.Module, inputs: Inputs) -> Run:
    """OpenVINO in float32 under its latency hint, reshaped to the static sizes at hand."""
    import openvino

    tensors = tuple(inputs.values())
    converted = openvino.convert_model(_FirstOutput(model, list(inputs)), example_input=tensors)
    converted.reshape({i: list(tensor.shape) for i, tensor in enumerate(tensors)})
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(converted, "CPU", options)
    arrays = [tensor.numpy() for tensor in tensors]
    return lambda: torch.from_numpy(compiled(arrays)[0])


def onnxruntime_fp32(model: nn.Module, inputs: Inputs) -> Run:
    """ONNX Runtime's CPU provider with all graph optimizations (its default)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    names = list(inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            _FirstOutput(model, names),
            tuple(inputs.values()),
            path,
            dynamo=True,
            verbose=False,
            input_names=names,
        )
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    taken = {node.name for node in session.get_inputs()}
    feed = {name: tensor.numpy() for name, tensor in inputs.items() if name in taken}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


_STRUCTURE = "canonicalize, fuse-linears"

EAGER = System("torch eager fp32", eager)
FXOPT_FP32 = System("fxopt fp32", fxopt_list(f"{_STRUCTURE}, prepack, lower"))
FXOPT_INT8 = System("fxopt int8 dynamic", fxopt_list("canonicalize, int8-linear, prepack, lower"))
COMPILE_FP32 = System("torch.compile fp32, freezing", torch_compile)
TORCHAO_INT8 = System("torchao int8 dynamic + compile", torchao_int8(False), ("torchao",))
TORCHAO_INT8_FROZEN = System(
    "torchao int8 dynamic + compile, freezing", torchao_int8(True), ("torchao",)
)
OPENVINO_FP32 = System("OpenVINO fp32", openvino_fp32, ("openvino",))
ONNXRUNTIME_FP32 = System(
    "ONNX Runtime fp32", onnxruntime_fp32, ("onnxruntime", "onnx", "onnxscript")
)


def _compiled(model: nn.Module, inputs: Inputs, *, freezing: bool) -> Run:
    compiled = torch.compile(model)
    with _frozen(freezing):
        compiled(**inputs)
    return lambda: first(compiled(**inputs))


@contextmanager
def _frozen(freezing: bool) -> Iterator[None]:
    import torch._inductor.config as inductor

    with inductor.patch(freezing=freezing):
        yield
