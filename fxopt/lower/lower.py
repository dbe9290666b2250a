"""Lower: the end of a pass list, torch.compile with Inductor. Claim: close."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from fxopt.claim import Claim, Close
from fxopt.kernels import KERNEL_LEVEL
from fxopt.lower.compilation import Compiled, compile_program
from fxopt.lower.lowering import Lowered, Lowering
from fxopt.nodes import label
from fxopt.program import Mode, Program
from fxopt.progress import Progress
from fxopt.rewriting import Plan
from fxopt.rewriting.plan import Site


@dataclass(frozen=True, repr=False)
class Lower(Lowering):
    """Compile the program for the device its tensors are on.

    `mode` is torch.compile's: "reduce-overhead" records CUDA graphs where shapes are static, and on
    a CPU calls the kernels from C++, unless it trains: less time between the kernels for a longer
    compilation, of minutes with 30 layers; "max-autotune" times several kernels for each product.
    `dynamic` left out compiles the first shapes as they are and, when others come, once more for
    any; True starts with any shape, False compiles each shape anew. With `fallback="eager"` a
    program that can't be compiled here runs uncompiled, and the report says so. With `strict=True`
    a kernel-level operator whose kernel is not in the generated code is an error, not a warning. A
    program on a CPU that doesn't train goes through `Prepack` first, if the list hasn't it: its
    kernels are faster than Inductor's own and keep a packed copy of each weight; `prepack=False`
    leaves linears and attention to Inductor. A step of generation with up to 8 tokens on a CPU is
    executed as a list of instructions in one call, for which nothing is compiled
    (`fxopt.executor`); `executor=False` compiles it as all else.

    Raises `PassError` for an unknown value of an option.
    """

    name: ClassVar[str] = "lower"
    claim: Claim = Close()
    backend: Literal["inductor"] = "inductor"
    mode: Literal["default", "reduce-overhead", "max-autotune"] | None = None
    dynamic: bool | None = None
    fallback: Literal["eager"] | None = None
    strict: bool = False
    prepack: bool = True
    executor: bool = True

    def plan(self, program: Program) -> Plan:
        """The kernel-level nodes whose kernels the generated code must contain."""
        nodes = [node for node in program.graph.nodes if node.target in KERNEL_LEVEL]
        return Plan(repr(self), tuple(Site("kernel", node.name, label(node)) for node in nodes))

    def needs(self, mode: Mode) -> tuple[str, ...]:
        """Kernels are selected first, and on a CPU prepacked where the program doesn't train."""
        prepacks = self.prepack and mode == "eval"
        return (*super().needs(mode), *(("prepack",) if prepacks else ()))

    def lower(self, module: fx.GraphModule, program: Program, progress: Progress) -> Lowered:
        """`module` compiled by Inductor for the shapes of the example: see `compile_program`."""
        return compile_program(module, program, self, progress)

    def compile(self, module: fx.GraphModule) -> Compiled:
        """`module` compiled at its first call, and again when inputs of other shapes come."""
        return Compiled(module, self)
