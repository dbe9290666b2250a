"""The systems that are timed side by side: fxopt's lists of passes and the peers.

Every system gets the same model, inputs, calibration batches and as many threads as torch has, in
the settings that its own documentation recommends for latency.
"""

from benchmarks.systems.onnxruntime_peers import ONNXRUNTIME_FP32, ONNXRUNTIME_INT8
from benchmarks.systems.openvino_peers import OPENVINO_BF16, OPENVINO_FP32, OPENVINO_INT8
from benchmarks.systems.ours import (
    FXOPT_AUTOCAST,
    FXOPT_CAREFUL,
    FXOPT_DYNAMIC,
    FXOPT_FP32,
    FXOPT_HALF,
    FXOPT_HALF_LINEAR,
    FXOPT_LANGUAGE,
    FXOPT_MIXED,
    FXOPT_STATIC,
    FXOPT_WEIGHT_ONLY,
    LISTS,
    OURS,
    Transformed,
    transformed,
)
from benchmarks.systems.system import Call, Inputs, System, Workload, first
from benchmarks.systems.torch_peers import (
    AUTOCAST_BF16,
    AUTOCAST_BF16_COMPILE,
    COMPILE_BF16,
    COMPILE_FP32,
    EAGER,
    EAGER_BF16,
    TORCHAO_INT8,
    TORCHAO_INT8_BF16,
    TORCHAO_INT8_FROZEN,
    TORCHAO_INT8_KEPT_HEAD,
    TORCHAO_WEIGHT_ONLY,
    InAutocast,
    autocast,
)

__all__ = [
    "AUTOCAST_BF16",
    "AUTOCAST_BF16_COMPILE",
    "COMPILE_BF16",
    "COMPILE_FP32",
    "EAGER",
    "EAGER_BF16",
    "FXOPT_AUTOCAST",
    "FXOPT_CAREFUL",
    "FXOPT_DYNAMIC",
    "FXOPT_FP32",
    "FXOPT_HALF",
    "FXOPT_HALF_LINEAR",
    "FXOPT_LANGUAGE",
    "FXOPT_MIXED",
    "FXOPT_STATIC",
    "FXOPT_WEIGHT_ONLY",
    "LISTS",
    "ONNXRUNTIME_FP32",
    "ONNXRUNTIME_INT8",
    "OPENVINO_BF16",
    "OPENVINO_FP32",
    "OPENVINO_INT8",
    "OURS",
    "TORCHAO_INT8",
    "TORCHAO_INT8_BF16",
    "TORCHAO_INT8_FROZEN",
    "TORCHAO_INT8_KEPT_HEAD",
    "TORCHAO_WEIGHT_ONLY",
    "Call",
    "InAutocast",
    "Inputs",
    "System",
    "Transformed",
    "Workload",
    "autocast",
    "first",
    "transformed",
]
