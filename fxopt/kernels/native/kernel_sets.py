"""What is compiled together: sources, the CPUs that they are for, what times them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fxopt.device import Answer, Device
from fxopt.kernels.native.benchmark import Layer, decoding_layer, product_layer

_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
_CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")
_LANES = {"AVX512": 16, "AVX2": 8}


@dataclass(frozen=True)
class KernelSet:
    """Sources beside this file, compiled as one text in this order, for CPUs with `needed`.

    `name` is that by which operators are registered for it, `vectors` what they are compiled for.
    `units` is how instruction sets begin on which oneDNN is faster, `capability` what torch must
    not be capped below.
    """

    name: str
    sources: tuple[str, ...]
    needed: tuple[str, ...]
    vectors: str
    layer: Callable[[str], Layer]
    header: str = ""
    units: str = ""
    capability: str = "DEFAULT"

    def supported(self, cpu: Device) -> Answer:
        """Whether the set is for this CPU, and why."""
        units = sorted(name for name in cpu.instructions if self._is_unit(name))
        if units:
            return Answer(False, f"{cpu.name} has {', '.join(units)}, which oneDNN multiplies by")
        missing = [name for name in self.needed if name not in cpu.instructions]
        if missing:
            return Answer(False, f"{cpu.name} lacks {', '.join(missing)}, which the kernels need")
        used = torch.backends.cpu.get_cpu_capability()
        capped = _CAPABILITIES[: _CAPABILITIES.index(self.capability)]
        if used in capped:
            return Answer(False, f"torch uses {used} of this CPU, the kernels {self.capability}")
        return Answer(True, f"{cpu.name} has what the kernels need")

    def _is_unit(self, instruction: str) -> bool:
        return bool(self.units) and instruction.startswith(self.units)

    def source(self) -> str:
        """The text that is compiled."""
        folder = Path(__file__).parent
        texts = ((folder / name).read_text(encoding="utf-8") for name in self.sources)
        return "\n".join((*([self.header] if self.header else []), *texts))


PRODUCTS = KernelSet(
    "products",
    (
        "includes.h",
        "library.h",
        "vectors.h",
        "product.h",
        "panels.h",
        "linear.h",
        "quantize.h",
        "attention.h",
        "operators.h",
    ),
    (*_AVX512, "avx512_vnni", "avx512_bf16"),
    "AVX-512",
    product_layer,
    units="amx_",
)
"""Linear layers and attention of many rows."""


def _decoding(capability: str, lanes: int) -> KernelSet:
    products = ("few_rows.h", "many_rows.h", "rounded_rows.h")
    kernels = ("cached_attention.h", *products, "executor.h", "slots.h", "decoding.h")
    sources = ("includes.h", "library.h", "team.h", "lanes.h", *kernels)
    wide = capability == "AVX512"
    needed = ("avx2", "fma", "f16c", *(_AVX512 if wide else ()))
    vectors = "AVX-512" if wide else "AVX2"
    return KernelSet(
        "decoding",
        sources,
        needed,
        vectors,
        decoding_layer,
        header=f"#define FXOPT_LANES {lanes}",
        capability=capability,
    )


DECODING = {capability: _decoding(capability, lanes) for capability, lanes in _LANES.items()}
"""What a step of generation calls, by torch's names of what it lets CPUs use."""


def decoding() -> KernelSet:
    """The decoding kernels for what torch uses of this CPU, which a user may have capped."""
    return DECODING.get(torch.backends.cpu.get_cpu_capability(), DECODING["AVX2"])
