"""The passes: one file each. `fxopt.lower.Lower`, which ends a list, lives in its own room."""

from fxopt.passes.kernel_selection.prepack import Prepack
from fxopt.passes.kernel_selection.select_kernels import SelectKernels
from fxopt.passes.mixed_precision.autocast import Autocast
from fxopt.passes.mixed_precision.half_attention import HalfAttention
from fxopt.passes.mixed_precision.half_linear import HalfLinear
from fxopt.passes.pruning.fold_pruned import FoldPruned
from fxopt.passes.pruning.prune_channels import PruneChannels
from fxopt.passes.pruning.sparsify24 import Sparsify24
from fxopt.passes.quantization.float8_linear import Float8Linear
from fxopt.passes.quantization.int4_linear import Int4Linear
from fxopt.passes.quantization.int8_embedding import Int8Embedding
from fxopt.passes.quantization.int8_linear import Int8Linear
from fxopt.passes.quantization.quantize_cache import QuantizeCache
from fxopt.passes.quantization.shift_channels import ShiftChannels
from fxopt.passes.quantization.smooth_quant import SmoothQuant
from fxopt.passes.quantization.split_outliers import SplitOutliers
from fxopt.passes.structure.canonicalize import Canonicalize
from fxopt.passes.structure.fold_norms import FoldNorms
from fxopt.passes.structure.fuse_conv_batch_norm import FuseConvBatchNorm
from fxopt.passes.structure.fuse_linears import FuseLinears

__all__ = [
    "Autocast",
    "Canonicalize",
    "Float8Linear",
    "FoldNorms",
    "FoldPruned",
    "FuseConvBatchNorm",
    "FuseLinears",
    "HalfAttention",
    "HalfLinear",
    "Int4Linear",
    "Int8Embedding",
    "Int8Linear",
    "Prepack",
    "PruneChannels",
    "QuantizeCache",
    "SelectKernels",
    "ShiftChannels",
    "SmoothQuant",
    "Sparsify24",
    "SplitOutliers",
]
