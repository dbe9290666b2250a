"""ONNX Runtime's CPU provider with all graph optimizations, which is its default."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.systems.system import Call, FirstOutput, Inputs, System, Workload


def onnx_runtime(*, int8: bool = False) -> Callable[[Workload], Call]:
    """ONNX Runtime in float32, or `quantize_dynamic`: int8 weights per channel, uint8 inputs."""

    def prepare(workload: Workload) -> Call:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads still spin while it runs, but not on into the turn of the next system.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        with tempfile.TemporaryDirectory() as folder:
            path = _exported(workload, Path(folder))
            if int8:
                path = _quantized(path)
            session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        taken = [node.name for node in session.get_inputs()]

        def call(inputs: Inputs) -> Tensor:
            return torch.from_numpy(
                session.run(None, {name: inputs[name].numpy() for name in taken})[0]
            )

        return call

    return prepare


def _exported(workload: Workload, folder: Path) -> Path:
    path = folder / "model.onnx"
    names = list(workload.inputs)
    torch.onnx.export(
        FirstOutput(workload.model, names),
        tuple(workload.inputs.values()),
        path,
        dynamo=True,
        verbose=False,
        input_names=names,
        external_data=False,
    )
    return path


def _quantized(path: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantized = path.with_suffix(".int8.onnx")
    quantize_dynamic(path, quantized, weight_type=QuantType.QInt8, per_channel=True)
    return quantized


_PACKAGES = ("onnxruntime", "onnx", "onnxscript")

ONNXRUNTIME_FP32 = System("ONNX Runtime fp32", onnx_runtime(), _PACKAGES)
ONNXRUNTIME_INT8 = System("ONNX Runtime dynamic int8", onnx_runtime(int8=True), _PACKAGES)
