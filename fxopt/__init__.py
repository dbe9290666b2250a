"""fxopt: a compiler for PyTorch models that proves each step.

opt = fxopt.transform(model, [fxopt.Int8Linear(), fxopt.Lower()], example_inputs=batch)
print(opt.report)
"""

from fxopt.claim import Close, Exact, Sqnr
from fxopt.errors import (
    CalibrationError,
    CaptureError,
    EquivalenceError,
    ExportError,
    FxoptError,
    InputError,
    KernelError,
    LowerError,
    ModelError,
    NotCapturedError,
    PassError,
    RewriteError,
    SaveError,
    WellFormedError,
)
from fxopt.export import to_onnx
from fxopt.lower import Lower
from fxopt.optimized import Optimized, load
from fxopt.passes import (
    Autocast,
    Canonicalize,
    Float8Linear,
    FuseConvBatchNorm,
    FuseLinears,
    HalfAttention,
    HalfLinear,
    Int4Linear,
    Int8Linear,
    Prepack,
    SelectKernels,
    SmoothQuant,
    SplitOutliers,
)
from fxopt.program import Program, Refusal
from fxopt.report import Report
from fxopt.rewriting import Edit, Match, Pass, Plan, Rule, constant, hole, op, rewrite
from fxopt.transform import transform

__version__ = "0.1.0"

__all__ = [
    "Autocast",
    "CalibrationError",
    "Canonicalize",
    "CaptureError",
    "Close",
    "Edit",
    "EquivalenceError",
    "Exact",
    "ExportError",
    "Float8Linear",
    "FuseConvBatchNorm",
    "FuseLinears",
    "FxoptError",
    "HalfAttention",
    "HalfLinear",
    "InputError",
    "Int4Linear",
    "Int8Linear",
    "KernelError",
    "Lower",
    "LowerError",
    "Match",
    "ModelError",
    "NotCapturedError",
    "Optimized",
    "Pass",
    "PassError",
    "Plan",
    "Prepack",
    "Program",
    "Refusal",
    "Report",
    "RewriteError",
    "Rule",
    "SaveError",
    "SelectKernels",
    "SmoothQuant",
    "SplitOutliers",
    "Sqnr",
    "WellFormedError",
    "constant",
    "hole",
    "load",
    "op",
    "rewrite",
    "to_onnx",
    "transform",
]
