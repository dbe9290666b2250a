"""fxopt: a compiler for PyTorch models that proves each step.

opt = fxopt.transform(model, [fxopt.Int8Linear(), fxopt.Lower()], example_inputs=batch)
print(opt.report)
"""

from fxopt import train
from fxopt.analyses.channels import channels
from fxopt.claim import Close, Exact, Sqnr
from fxopt.drop_in import optimize_pipeline, optimize_sentence_transformer
from fxopt.errors import (
    CalibrationError,
    CaptureError,
    EquivalenceError,
    ExportError,
    FxoptError,
    InputError,
    KernelError,
    LowerError,
    MeasureError,
    ModelError,
    NotCapturedError,
    PassError,
    RewriteError,
    SaveError,
    SearchError,
    TrainError,
    WellFormedError,
)
from fxopt.export import to_onnx
from fxopt.lower import Lower
from fxopt.optimized import Optimized, load
from fxopt.pass_registry import register_pass
from fxopt.passes import (
    Autocast,
    Canonicalize,
    Float8Linear,
    FoldNorms,
    FoldPruned,
    FuseConvBatchNorm,
    FuseLinears,
    HalfAttention,
    HalfLinear,
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    Prepack,
    PruneChannels,
    QuantizeCache,
    SelectKernels,
    ShiftChannels,
    SmoothQuant,
    Sparsify24,
    SplitOutliers,
)
from fxopt.program import Program, Refusal
from fxopt.recommendation import Recommendation, recommend
from fxopt.report import Report
from fxopt.rewriting import Edit, Match, Pass, Plan, Rule, constant, hole, op, rewrite
from fxopt.transform import transform

# Last: a function takes the place of the room that it is in.
from fxopt.comparison import compare  # isort: skip
from fxopt.measurement import measure  # isort: skip
from fxopt.search import search  # isort: skip

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
    "FoldNorms",
    "FoldPruned",
    "FuseConvBatchNorm",
    "FuseLinears",
    "FxoptError",
    "HalfAttention",
    "HalfLinear",
    "InputError",
    "Int4Linear",
    "Int8Embedding",
    "Int8Linear",
    "KernelError",
    "Lower",
    "LowerError",
    "Match",
    "MeasureError",
    "ModelError",
    "NotCapturedError",
    "Optimized",
    "Pass",
    "PassError",
    "Plan",
    "Prepack",
    "Program",
    "PruneChannels",
    "QuantizeCache",
    "Recommendation",
    "Refusal",
    "Report",
    "RewriteError",
    "Rule",
    "SaveError",
    "SearchError",
    "SelectKernels",
    "ShiftChannels",
    "SmoothQuant",
    "Sparsify24",
    "SplitOutliers",
    "Sqnr",
    "TrainError",
    "WellFormedError",
    "channels",
    "compare",
    "constant",
    "hole",
    "load",
    "measure",
    "op",
    "optimize_pipeline",
    "optimize_sentence_transformer",
    "recommend",
    "register_pass",
    "rewrite",
    "search",
    "to_onnx",
    "train",
    "transform",
]
