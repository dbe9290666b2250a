"""OpenVINO under its latency hint, with static sizes; int8 by NNCF."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.systems.system import Call, FirstOutput, Inputs, System, Workload


def openvino(*, float32: bool = False, int8: bool = False) -> Callable[[Workload], Call]:
    """OpenVINO, reshaped to the sizes at hand.

    Left alone it computes in bfloat16 where the CPU has it; `float32` asks for float32. `int8` is
    NNCF's post-training quantization for transformers, calibrated on the workload's batches.
    """

    def prepare(workload: Workload) -> Call:
        import openvino

        names = list(workload.inputs)
        model = _converted(FirstOutput(workload.model, names), tuple(workload.inputs.values()))
        model.reshape({i: list(t.shape) for i, t in enumerate(workload.inputs.values())})
        if int8:
            model = _quantized(model, workload, names)
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        if float32:
            options["INFERENCE_PRECISION_HINT"] = "f32"
        compiled = openvino.Core().compile_model(model, "CPU", options)

        def call(inputs: Inputs) -> Tensor:
            arrays = [inputs[name].numpy() for name in names]
            return torch.from_numpy(compiled(arrays, share_inputs=True, share_outputs=True)[0])

        return call

    return prepare


def _converted(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Traced; where its tracer can't take the model (Llama), as torch.export captures it."""
    import openvino
    from openvino.frontend import OpConversionFailure

    try:
        return openvino.convert_model(model, example_input=inputs)
    except OpConversionFailure:
        return openvino.convert_model(torch.export.export(model, inputs, strict=False))


def _quantized(model: Any, workload: Workload, names: list[str]) -> Any:
    import nncf

    nncf.set_log_level(logging.ERROR)
    batches = workload.calibration or (workload.inputs,)
    like = workload.inputs
    arrays = [
        tuple(_padded(batch[name], like[name]).numpy() for name in names) for batch in batches
    ]
    return nncf.quantize(
        model,
        nncf.Dataset(arrays),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(arrays),
    )


def _padded(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` [batch, length] padded with zeros to the length of `like`: the traced model takes
    that one alone, and padding is id 0 under mask 0."""
    missing = like.shape[-1] - tensor.shape[-1] if tensor.dim() == 2 else 0
    return torch.nn.functional.pad(tensor, (0, max(0, missing)))


OPENVINO_FP32 = System("OpenVINO fp32", openvino(float32=True), ("openvino",))
OPENVINO_BF16 = System("OpenVINO bf16", openvino(), ("openvino",))
OPENVINO_INT8 = System("OpenVINO + NNCF int8", openvino(int8=True), ("openvino", "nncf"))
