"""The operator that runs a list of instructions: kernels of a program in one call.

`fxopt.executor` writes the instructions; only the compiled kernels run them (`native/executor.h`).
"""

from __future__ import annotations

import torch

_library = torch.library.Library("fxopt", "FRAGMENT")
_library.define("execute(Tensor code, Tensor[] inputs, Tensor[] held) -> Tensor[]")
