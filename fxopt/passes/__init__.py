"""The passes: one file each. `fxopt.lower.Lower`, which ends a list, lives in its own room."""

from fxopt.passes.canonicalize import Canonicalize
from fxopt.passes.fuse_conv_batch_norm import FuseConvBatchNorm
from fxopt.passes.fuse_linears import FuseLinears
from fxopt.passes.int8_linear import Int8Linear
from fxopt.passes.prepack import Prepack
from fxopt.passes.select_kernels import SelectKernels

__all__ = [
    "Canonicalize",
    "FuseConvBatchNorm",
    "FuseLinears",
    "Int8Linear",
    "Prepack",
    "SelectKernels",
]
