"""The passes: one file each. `fxopt.lower.Lower`, which ends a list, lives in its own room."""

from fxopt.passes.autocast import Autocast
from fxopt.passes.canonicalize import Canonicalize
from fxopt.passes.float8_linear import Float8Linear
from fxopt.passes.fold_pruned import FoldPruned
from fxopt.passes.fuse_conv_batch_norm import FuseConvBatchNorm
from fxopt.passes.fuse_linears import FuseLinears
from fxopt.passes.half_attention import HalfAttention
from fxopt.passes.half_linear import HalfLinear
from fxopt.passes.int4_linear import Int4Linear
from fxopt.passes.int8_linear import Int8Linear
from fxopt.passes.prepack import Prepack
from fxopt.passes.prune_channels import PruneChannels
from fxopt.passes.select_kernels import SelectKernels
from fxopt.passes.shift_channels import ShiftChannels
from fxopt.passes.smooth_quant import SmoothQuant
from fxopt.passes.sparsify24 import Sparsify24
from fxopt.passes.split_outliers import SplitOutliers

__all__ = [
    "Autocast",
    "Canonicalize",
    "Float8Linear",
    "FoldPruned",
    "FuseConvBatchNorm",
    "FuseLinears",
    "HalfAttention",
    "HalfLinear",
    "Int4Linear",
    "Int8Linear",
    "Prepack",
    "PruneChannels",
    "SelectKernels",
    "ShiftChannels",
    "SmoothQuant",
    "Sparsify24",
    "SplitOutliers",
]
