"""fxopt: a compiler for PyTorch models that proves each step.

opt = fxopt.transform(model, [fxopt.Int8Linear(), fxopt.Lower()], example_inputs=batch)
print(opt.report)
"""

from fxopt import train
from fxopt.analyses.channels import channels
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
    TrainError,
    WellFormedError,
)
from fxopt.export import to_onnx
from fxopt.lower import Lower
from fxopt.optimized import Optimized, load
from fxopt.passes import (
    Autocast,
    Canonicalize,
    Float8Linear,
    FoldPruned,
    FuseConvBatchNorm,
    FuseLinears,
    HalfAttention,
    HalfLinear,
    Int4Linear,
    Int8Linear,
    Prepack,
    PruneChannels,
    SelectKernels,
    SmoothQuant,
    Sparsify24,
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
    "FoldPruned",
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
    "PruneChannels",
    "Refusal",
    "Report",
    "RewriteError",
    "Rule",
    "SaveError",
    "SelectKernels",
    "SmoothQuant",
    "Sparsify24",
    "SplitOutliers",
    "Sqnr",
    "TrainError",
    "WellFormedError",
    "channels",
    "constant",
    "hole",
    "load",
    "op",
    "rewrite",
    "to_onnx",
    "train",
    "transform",
]
