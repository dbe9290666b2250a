"""Where int8 pays: the kernels of one linear layer timed beside each other at the shapes at hand.

A linear [M, K] -> [M, N] reads K·N weights and does M·K·N products. With few rows it waits for the
weights, which int8 makes four times smaller; with many it multiplies, which int8 does faster; in
between, and for small K and N, rounding the activations can cost more than either gains. Where the
borders lie is up to the machine, so they are measured on it. Called again and again, a layer finds
its weights in the cache if they fit, and float weights gain most by that: what pays here pays all
the more within a model.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from fxopt import kernels
from fxopt.rendering.alignment import aligned
from fxopt.timing import Timing, compare_kernels, timings_in

__all__ = [
    "LINEAR_KERNELS",
    "ROWS",
    "BreakEven",
    "LinearKernel",
    "Operands",
    "Timing",
    "compare_kernels",
    "linear_speeds",
    "timings_in",
]

ops = torch.ops.fxopt

ROWS = (1, 16, 64, 256, 1024)
"""The numbers of rows at which a break-even is looked for."""

_GROUP = 32
# Multiplications in a product: 0.1 s on a laptop. Bigger ones are timed only at the rows at hand.
# A bound on time instead would let the clock decide which lines a plan has.
_MOST_WORK = 1 << 34


class Operands:
    """What the kernels of one linear layer work on, each tensor made when first asked for."""

    def __init__(
        self, m: int, k: int, n: int, dtype: torch.dtype, device: torch.device, bits: int = 8
    ) -> None:
        self.m, self.k, self.n, self.dtype, self.device = m, k, n, dtype, device
        self.largest: int = 2 ** (bits - 1) - 1

    @cached_property
    def x(self) -> Tensor:
        """Activations [M, K]."""
        return self._spread(self.m, self.k)

    @cached_property
    def weight(self) -> Tensor:
        """The float weight [N, K]."""
        return self._spread(self.n, self.k)

    @cached_property
    def bias(self) -> Tensor:
        """The bias [N]."""
        return self._spread(self.n, 1).reshape(-1)

    @cached_property
    def x_int8(self) -> Tensor:
        """Quantized activations [M, K]."""
        return (self.x * 127).to(torch.int8)

    @cached_property
    def x_uint8(self) -> Tensor:
        """Quantized activations [M, K] with a zero point of 128."""
        return ops.shift_to_unsigned(self.x_int8)  # type: ignore[no-any-return]

    @cached_property
    def weight_int8(self) -> Tensor:
        """The quantized weight [N, K], of as many bits as the kernel will meet."""
        return (self._spread(self.n, self.k) * self.largest).to(torch.int8)

    @cached_property
    def weight_scale(self) -> Tensor:
        """The weight's scales [N, 1]."""
        return torch.full((self.n, 1), 1 / 127, device=self.device)

    @cached_property
    def group_scale(self) -> Tensor:
        """The weight's scales [N, K / 32, 1], or [N, 1, 1] where 32 doesn't divide K."""
        groups = self.k // _GROUP if self.k % _GROUP == 0 else 1
        return torch.full((self.n, groups, 1), 1 / 127, device=self.device)

    @cached_property
    def x_scale(self) -> Tensor:
        """The activations' scales [M, 1]."""
        return torch.full((self.m, 1), 1 / 127, device=self.device)

    @cached_property
    def has_fused_int8(self) -> bool:
        """Whether one kernel does an int8 linear with scales per token here."""
        return self.device.type == "cuda" or bool(kernels.native.load())

    def _spread(self, rows: int, columns: int) -> Tensor:
        # Numbers between -1 and 1 that draw nothing from the caller's generator.
        steps = torch.arange(rows * columns, device=self.device) % 255
        return (steps / 127 - 1).to(self.dtype).reshape(rows, columns)


LinearKernel = Callable[[Operands], object]


def _float(given: Operands) -> Tensor:
    """As `Prepack` leaves it on a CPU, and aten has it elsewhere."""
    y: Tensor
    if given.device.type == "cpu":
        y = ops.packed_linear(given.x, given.weight, given.bias, "none", None)
    else:
        y = torch.nn.functional.linear(given.x, given.weight, given.bias)
    return y


def _int8(given: Operands) -> Tensor:
    """One pass over x for the scales and one that rounds it, then everything in the product's
    epilogue; where no kernel does that, the memory traffic of what a compiler makes of it: one pass
    over the int32 product that scales, adds and converts.

    The rounding itself is left out, since eager operators would take six passes for it. Where a
    norm or an activation before it is fused with it, the graph is faster than this.
    """
    given.x.amax(-1, keepdim=True)
    given.x.to(torch.int8)
    if given.has_fused_int8:
        fused: Tensor = ops.int8_linear_fused(
            given.x_int8, given.x_scale, None, given.weight_int8, given.weight_scale, None,
            given.bias, given.dtype, "none",
        )  # fmt: skip
        return fused
    product = ops.int8_product(given.x_int8, given.weight_int8)
    y = torch.empty(product.shape, dtype=given.dtype, device=given.device)
    return y.copy_(product)


def _int8_static(given: Operands) -> Tensor:
    """One pass over x that rounds it, then everything in the product's epilogue."""
    given.x.to(torch.uint8)
    one, zero = torch.tensor(1 / 127), torch.tensor(128, dtype=torch.uint8)
    y: Tensor = ops.packed_int8_linear(
        given.x_uint8, one, zero, given.weight_int8, given.weight_scale, given.bias,
        "none", None, None, given.dtype,
    )  # fmt: skip
    return y


def _weight_only(given: Operands) -> Tensor:
    y: Tensor = ops.int8_weight_only_linear(
        given.x, given.weight_int8, given.weight_scale, given.bias
    )
    return y


def _weight_only_groups(given: Operands) -> Tensor:
    """In groups of 32 columns; larger ones take no longer."""
    y: Tensor = ops.int8_weight_only_linear(
        given.x, given.weight_int8, given.group_scale, given.bias
    )
    return y


def _int8_groups(given: Operands) -> Tensor:
    """The same with an input that is rounded in those groups."""
    y: Tensor = ops.int8_grouped_linear(given.x, given.weight_int8, given.group_scale, given.bias)
    return y


LINEAR_KERNELS: Mapping[str, LinearKernel] = {
    "float": _float,
    "int8": _int8,
    "int8_static": _int8_static,
    "weight_only": _weight_only,
    "weight_only_groups": _weight_only_groups,
    "int8_groups": _int8_groups,
}
"""The kernels of a linear layer by name; the first is the baseline."""


@dataclass(frozen=True)
class BreakEven:
    """The timings of one linear layer by number of rows; prints as a table and a sentence.

    `untimed` are numbers of rows at which the product would have taken too long to time.
    """

    k: int
    n: int
    dtype: torch.dtype
    device: str
    timings: Mapping[int, Timing]
    untimed: tuple[int, ...] = ()

    def at(self, m: int) -> Timing:
        """The timing at `m` rows, or at the next smaller number that was timed."""
        return self.timings[max((rows for rows in self.timings if rows <= m), default=self._least)]

    @property
    def sentence(self) -> str:
        """Which kernel is the fastest from how many rows on, with its time relative to the
        baseline's: `at K=768, N=3072: weight_only up to M = 1 (0.62x), int8 from M = 16 on (...)`.
        """
        groups = [
            (name, list(rows))
            for name, rows in groupby(sorted(self.timings), lambda m: self.timings[m].verdict)
        ]
        parts = [self._part(name, rows) for name, rows in groups]
        return f"at K={self.k}, N={self.n}: " + ", ".join(parts)

    def lines(self) -> tuple[str, ...]:
        """The table and the sentence, line by line."""
        return tuple(self._lines())

    def __str__(self) -> str:
        return "\n".join(self.lines())

    @property
    def _least(self) -> int:
        return min(self.timings)

    def _part(self, name: str, rows: Sequence[int]) -> str:
        first, last = rows[0], rows[-1]
        starts, ends = first == self._least, last == max(self.timings)
        if starts and ends:
            where = f"from M = {first} on" if len(rows) > 1 else f"at M = {first}"
        elif starts:
            where = f"up to M = {last}"
        elif ends:
            where = f"from M = {first} on"
        else:
            where = f"from M = {first} to {last}" if len(rows) > 1 else f"at M = {first}"
        timing = self.timings[last]
        if name == timing.baseline:
            return f"{name} {where}"
        at = f" at M = {last}" if len(rows) > 1 else ""
        return f"{name} {where} ({timing.ratios[name]}{at})"

    def _lines(self) -> Iterator[str]:
        yield f"linear layer K={self.k}, N={self.n} in {self.dtype} on {self.device}"
        names = list(dict.fromkeys(name for t in self.timings.values() for name in t.medians))
        baseline = next(iter(self.timings.values())).baseline
        cells = [("rows", baseline, *(name for name in names if name != baseline), "fastest")]
        for m, timing in sorted(self.timings.items()):
            ratios = [
                str(timing.ratios[name]) if name in timing.ratios else "-"
                for name in names
                if name != baseline
            ]
            cells.append((str(m), _milliseconds(timing.medians[baseline]), *ratios, timing.verdict))
        yield from (f"  {line}" for line in aligned(cells, ">"))
        failed = {name: why for t in self.timings.values() for name, why in t.failed.items()}
        yield from (f"  {name} can't run: {why}" for name, why in failed.items())
        if self.untimed:
            yield f"  not timed, too long: M = {', '.join(map(str, self.untimed))}"
        yield self.sentence


def linear_speeds(
    m: int,
    k: int,
    n: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    rows: Sequence[int] = ROWS,
    table: Mapping[str, LinearKernel] = LINEAR_KERNELS,
    bits: int = 8,
) -> BreakEven:
    """The kernels of a linear layer [M, K] -> [M, N] beside each other at `m` rows and at `rows`.

    `table` gives the kernels by name, the baseline first; int8 weights have `bits` bits. Each
    distinct question is measured once on a machine, for about a second, and recalled from then on,
    until a kernel's source changes. An empty batch is timed as one row.
    """
    device = torch.device(device)
    m = max(m, 1)
    few = [count for count in rows if count * k * n <= _MOST_WORK]
    timings = {}
    sets = (kernels.native.PRODUCTS, kernels.native.decoding()) if device.type == "cpu" else ()
    compiled = [bool(kernels.native.load(one)) for one in sets]
    for count in sorted({m, *few}):
        operands = Operands(count, k, n, dtype, device, bits)
        systems = {name: functools.partial(kernel, operands) for name, kernel in table.items()}
        key = ("linear", count, k, n, str(dtype), str(device), bits, kernels_digest(), *compiled)
        timings[count] = compare_kernels(systems, key)
    left = tuple(sorted({*rows} - set(timings)))
    return BreakEven(k, n, dtype, str(device), timings, left)


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 999.5 else f"{value:.0f} ms"


@functools.cache
def kernels_digest() -> str:
    """A digest of the source of `fxopt.kernels`: with other code, other timings."""
    folder = Path(kernels.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".h")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
