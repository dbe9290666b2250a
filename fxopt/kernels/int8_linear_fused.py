"""The int8 linear layer whole: product, zero points, scales, bias and activation in one operator.

    int8_linear_fused(q, s, z, W, t, u, b)  =  act( (q @ Wᵀ - z · uᵀ) * (s · tᵀ) + b ),   u = W · 1

for q int8 `[..., K]` that stands for (q - z) * s, and W int8 `[N, K]` for W * t. The zero point
leaves the sum as u, the row sums of W, known beforehand; all before the scales is exact in int32 up
to K = 65 000 (133 000 without zero points). On CUDA it is one Triton kernel
(`fxopt.kernels.triton_int8`), on a CPU one of the compiled kernels (`fxopt.kernels.native`);
without them this equation in aten.
Source for the zero point: Jacob et al., "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference", CVPR 2018, section 2.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxopt.device import Device
from fxopt.errors import KernelError
from fxopt.kernels.native import on_cpu
from fxopt.kernels.packed_linear import POST_OPS, activate
from fxopt.kernels.product_shapes import check_product

aten = torch.ops.aten

EPILOGUES = POST_OPS - {"add"}
_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda grad, z: grad,
    "relu": lambda grad, z: aten.threshold_backward(grad, z, 0),
    "gelu": lambda grad, z: aten.gelu_backward(grad, z),
    "gelu_tanh": lambda grad, z: aten.gelu_backward(grad, z, approximate="tanh"),
    "silu": lambda grad, z: aten.silu_backward(grad, z),
}
_TRITON_WRITES = (torch.float32, torch.float16, torch.bfloat16)

_library = torch.library.Library("fxopt", "FRAGMENT")
_SCHEMA = (
    "int8_linear_fused(Tensor q, Tensor scale, Tensor? zero_point, Tensor weight, "
    "Tensor weight_scale, Tensor? weight_sums, Tensor? bias, ScalarType dtype, str post_op) "
    "-> Tensor"
)
_library.define(_SCHEMA)


class Call(NamedTuple):
    """The arguments of one call, in the operator's order.

    `q` int8 `[..., K]`, or the same plus 128 as uint8; `scale` and `zero_point` (int8, of q as
    int8) `[..., 1]` or one number; `weight` int8 `[N, K]`; `weight_scale` `[N, 1]`, `weight_sums`
    (int32, computed where it is left out) and `bias` `[N]`; the result's `dtype`; `post_op`, one of
    `EPILOGUES`.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None
    weight: Tensor
    weight_scale: Tensor
    weight_sums: Tensor | None
    bias: Tensor | None
    dtype: torch.dtype
    post_op: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The result's: `[..., N]`."""
        return (*self.q.shape[:-1], self.weight.shape[0])

    def checked(self) -> Call:
        """This call; raises `KernelError` where shapes or dtypes don't fit."""
        self._check_dtypes()
        check_product("int8_linear_fused", self.q, self.weight)
        for name in ("scale", "zero_point"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.numel() != 1 and tensor.shape != self._a_row:
                raise KernelError(
                    f"int8_linear_fused needs one {name} or one a row, {tuple(self._a_row)}, "
                    f"not {tuple(tensor.shape)}"
                )
        for name in ("weight_scale", "weight_sums", "bias"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.numel() != self.shape[-1]:
                raise KernelError(
                    f"int8_linear_fused needs one {name} for each of the weight's "
                    f"{self.shape[-1]} rows, not {tuple(tensor.shape)}"
                )
        return self

    @property
    def _a_row(self) -> tuple[int, ...]:
        return (*self.q.shape[:-1], 1)

    def _check_dtypes(self) -> None:
        integers = [t.dtype for t in (self.q, self.weight, self.zero_point) if t is not None]
        wrong = self.q.dtype not in (torch.int8, torch.uint8)
        wrong |= any(dtype != torch.int8 for dtype in integers[1:])
        if wrong or not self.dtype.is_floating_point:
            raise KernelError(
                "int8_linear_fused needs 8-bit q, int8 weight and zero point and a "
                f"floating-point result, not {', '.join(map(str, integers))} and {self.dtype}"
            )
        if self.post_op not in EPILOGUES:
            raise KernelError(
                f"int8_linear_fused has no post_op {self.post_op!r}; one of {sorted(EPILOGUES)}"
            )

    def signed(self) -> Tensor:
        """`q` as int8."""
        if self.q.dtype == torch.int8:
            return self.q
        return (self.q.to(torch.int16) - 128).to(torch.int8)

    def sums(self) -> Tensor | None:
        """`weight_sums`, made where a zero point needs them and they weren't given."""
        if self.zero_point is None or self.weight_sums is not None:
            return self.weight_sums
        return row_sums(self.weight)

    def before_activation(self) -> Tensor:
        """The layer without `post_op`, in float32, or float64 if that is the dtype asked for."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        total: Tensor = torch.ops.fxopt.int8_product(self.signed(), self.weight)
        sums = self.sums()
        if self.zero_point is not None and sums is not None:
            total = total - self.zero_point.to(torch.int32) * sums.reshape(-1)
        z = total.to(wide) * self.weight_scale.reshape(-1).to(wide) * self.scale.to(wide)
        return z if self.bias is None else z + self.bias.reshape(-1).to(wide)


def row_sums(weight: Tensor) -> Tensor:
    """int32 `[N]`: the sum of each row of an int8 `weight` `[N, K]`, what a zero point needs."""
    return weight.sum(1, dtype=torch.int32)


def reference(*given: Any) -> Tensor:
    """The operator's definition, in aten; arguments as `Call` has them."""
    call = Call(*given).checked()
    activated = activate(call.before_activation(), call.post_op, None)
    # One number for scale may have more axes than q.
    y = activated.to(call.dtype).reshape(call.shape)
    # Without entries any strides are contiguous ones.
    return y.contiguous() if y.numel() else y.new_empty(call.shape)


def _on_cuda(*given: Any) -> Tensor:
    call = Call(*given)
    if call.dtype in _TRITON_WRITES and Device.describe(call.q.device).runs_triton():
        return in_triton(call.checked())
    return reference(*given)


def in_triton(call: Call, **options: Any) -> Tensor:
    """`call` by the Triton kernel; `options` go to `triton_int8.int8_linear`."""
    from fxopt.kernels import triton_int8

    count, inner = call.q.shape[:-1].numel(), call.q.shape[-1]
    y = triton_int8.int8_linear(
        _by_rows(call.signed().reshape(count, inner)),
        _flat(call.scale, torch.float32),
        None if call.zero_point is None else _flat(call.zero_point, torch.int8),
        _by_rows(call.weight),
        _flat(call.weight_scale, torch.float32),
        None if call.zero_point is None else _flat(call.sums(), torch.int32),
        None if call.bias is None else call.bias.reshape(-1).contiguous(),
        call.dtype,
        call.post_op,
        **options,
    )
    return y.view(call.shape)


def _flat(tensor: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert tensor is not None
    return tensor.detach().reshape(-1).to(dtype).contiguous()


def _by_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _fake(*given: Any, **named: Any) -> Tensor:
    call = Call(*given, **named).checked()
    return call.q.new_empty(call.shape, dtype=call.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, dtype, post_op = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = dtype, post_op


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Only the bias trains: all else is rounded, or a scale that was found by rounding."""
    call = Call(*ctx.saved_tensors, *ctx.options)
    at = Call._fields.index("bias")
    db = None
    if call.bias is not None and ctx.needs_input_grad[at]:
        z = call.before_activation()
        dz = _GRADIENTS[call.post_op](grad.to(z.dtype), z)
        db = dz.reshape(-1, dz.shape[-1]).sum(0).to(call.bias.dtype).view(call.bias.shape)
    return tuple(db if index == at else None for index in range(len(call)))


_library.impl("int8_linear_fused", reference, "CompositeExplicitAutograd")
_library.impl("int8_linear_fused", _on_cuda, "CUDA")
on_cpu(_SCHEMA, reference)
torch.library.register_fake("fxopt::int8_linear_fused", _fake, lib=_library)
torch.library.register_autograd(
    "fxopt::int8_linear_fused", _backward, setup_context=_save, lib=_library
)
