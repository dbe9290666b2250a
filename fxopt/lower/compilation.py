"""Compile a program at once, look its kernels up, and never fall back in silence."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from fxopt.cpu_allocator import keep_freed_memory, release
from fxopt.errors import LowerError
from fxopt.executor import executor_of
from fxopt.kernels import GENERATED_AS, native
from fxopt.lower.generated import InductorBackend, check_kernels, count_calls, kernel_nodes
from fxopt.lower.lowering import Lowered
from fxopt.lower.shortcut import Shortcut
from fxopt.lower.toolchain import check_toolchain, explain_compiler_failure, recompile_limit_error
from fxopt.program import Program
from fxopt.progress import Progress, silent


class Options(Protocol):
    """What a compilation asks of the options of `Lower`, which explains them."""

    @property
    def mode(self) -> str | None: ...

    @property
    def dynamic(self) -> bool | None: ...

    @property
    def fallback(self) -> str | None: ...

    @property
    def strict(self) -> bool: ...

    @property
    def executor(self) -> bool: ...


class Compiled:
    """A graph module compiled at its first call, and again when inputs of other shapes come.

    Runs in the grad mode that was current when it was made: that mode is part of what is compiled.
    In inference on a CPU, calls of few rows are executed as a list of instructions where the
    program allows it (`executor`), and inputs of a kind that came twice go past Dynamo
    (`shortcut`).
    """

    def __init__(self, module: fx.GraphModule, options: Options) -> None:
        self.module = module
        self.options = options
        self._grad = torch.is_grad_enabled()
        on_cpu = _on_cpu(module)
        infers = on_cpu and not self._grad
        self._shortcut = Shortcut(module) if infers else None
        self.executor = executor_of(module) if infers and options.executor else None
        self.backend = InductorBackend(
            _inductor_options(options, on_cpu, self._grad), on_cpu, self._shortcut
        )
        if on_cpu:
            weakref.finalize(self, release).atexit = False
        self._graphs = bool(self.backend.options.get("triton.cudagraphs"))
        self._run = self._compile(options.dynamic)
        self._widened = options.dynamic is True

    def __call__(self, *inputs: Tensor) -> Any:
        """The module's outputs. Raises `LowerError` where it can't be compiled for `inputs`."""
        with torch.set_grad_enabled(self._grad):
            try:
                return self._call(inputs)
            except recompile_limit_error() as error:
                if self._widened:
                    raise LowerError(
                        "the program was compiled for too many different inputs: its code depends "
                        "on their sizes beyond batch and length; pad the inputs to a few sizes, or "
                        "use Lower(fallback='eager')"
                    ) from error
                # Too many shapes for one compilation each: one for all of them.
                self._widened = True
                if self._shortcut is not None:
                    self._shortcut.forget()
                self._run = self._compile(True)
                return self._call(inputs)

    def _compile(self, dynamic: bool | None) -> Callable[..., Any]:
        # Dynamo counts recompilations by code object; recompiling gives the module one of its own.
        self.module.recompile()
        # In training a parameter may be frozen between two calls.
        options = None if self._grad else {"guard_filter_fn": _guards}
        return torch.compile(
            self.module,
            fullgraph=True,
            dynamic=dynamic,
            backend=self.backend,
            options=options,  # type: ignore[arg-type]
        )

    def _call(self, inputs: Sequence[Tensor]) -> Any:
        if self._shortcut is not None and not torch.compiler.is_dynamo_compiling():
            executed = self._executed(self._shortcut, inputs)
            return self._call_shortly(self._shortcut, inputs) if executed is None else executed
        if not self._graphs:
            return self._run(*inputs)
        # A recorded CUDA graph writes its outputs to the same memory at each replay.
        torch.compiler.cudagraph_mark_step_begin()
        return torch.utils._pytree.tree_map_only(Tensor, torch.clone, self._run(*inputs))

    @property
    def is_listed(self) -> bool:
        """Whether nothing was compiled so far, so that nothing is lost with this callable."""
        return self.executor is not None and not self.backend.codes

    def executes(self, inputs: Sequence[Tensor]) -> bool:
        """Whether a call with `inputs` is a list of instructions, for which nothing is compiled."""
        return self.executor is not None and self.executor.refusal(inputs) is None

    def _executed(self, shortcut: Shortcut, inputs: Sequence[Tensor]) -> Any:
        """The outputs by a list of instructions; None where there is none for the call."""
        if self.executor is None or shortcut.is_called_otherwise():
            return None
        return self.executor(inputs)

    def _call_shortly(self, shortcut: Shortcut, inputs: Sequence[Tensor]) -> Any:
        route = shortcut.find(inputs)
        if route is not None:
            return route(inputs)
        result = self._run(*inputs)
        shortcut.learn(inputs, result)
        return result


def _guards(entries: Sequence[Any]) -> list[bool]:
    """Which conditions to check at each call: all but those on the module's own state, which only
    `Optimized` holds and which moves to another device by compiling anew."""
    return [not (entry.is_global or entry.name.startswith("self")) for entry in entries]


def compile_program(
    module: fx.GraphModule,
    program: Program,
    options: Options,
    progress: Progress | None = None,
) -> Lowered:
    """Compile `module`, the materialised `program`, for the shapes of the program's example.

    A copy of the example is run once; buffers that the program writes are put back. Raises
    `LowerError` where there is no compiler, no CUDA where it is asked for, or, with `strict`, a
    lost kernel.
    """
    say = progress or silent
    start = time.perf_counter()
    asked = kernel_nodes(program.graph.nodes)
    device = _device(module, program.example)
    if device.type == "cpu" and program.mode == "train":
        keep_freed_memory()
    with torch.set_grad_enabled(program.mode == "train"):
        try:
            check_toolchain(device)
            if device.type == "cpu":
                _load_kernels(asked, say)
            compiled = Compiled(module, options)
            executed = compiled.executes(program.example)
            how = "listing the instructions of" if executed else "compiling"
            by = "" if executed else " with Inductor"
            say(f"{how} {program.node_count()} operations for {device}{by}")
            _run_once(compiled, module, program)
        except Exception as error:
            failure = explain_compiler_failure(error)
            if options.fallback is None:
                if failure is error:
                    raise
                raise failure from error
            reason = f"not compiled, runs eagerly: {failure}"
            return Lowered(_eager(module), (reason,), seconds=time.perf_counter() - start)
    say(f"compiled in {time.perf_counter() - start:.1f} s")
    names = [GENERATED_AS[node.target] for node in asked]  # type: ignore[index]
    wanted = {name: names.count(name) for name in sorted(set(names))}
    if executed:  # every node of the graph is an instruction
        return Lowered(compiled, (), wanted, wanted, time.perf_counter() - start)
    code = "\n".join(compiled.backend.codes)
    warnings = check_kernels(asked, code, options.strict)
    called = {name: found for name, found in sorted(count_calls(code).items()) if found}
    return Lowered(compiled, warnings, called, wanted, time.perf_counter() - start)


def _load_kernels(asked: Sequence[fx.Node], say: Progress) -> None:
    if not native.loaded():
        say("loading the kernels for this CPU, which are compiled once on a machine")
    native.load()
    native.load_for(node.target for node in asked)


def _eager(module: fx.GraphModule) -> Callable[..., Any]:
    grad = torch.is_grad_enabled()

    def run(*inputs: Tensor) -> Any:
        with torch.set_grad_enabled(grad):
            return module(*inputs)

    return run


def _run_once(compiled: Compiled, module: fx.GraphModule, program: Program) -> None:
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in program.written}
    before = {name: buffer.detach().clone() for name, buffer in buffers.items()}
    # Copies, for what the program writes; of tensors apart, as the inputs of calls are.
    compiled(
        *(
            tensor.detach().clone().requires_grad_(tensor.requires_grad)
            for tensor in program.example
        )
    )
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(before[name])


def _on_cpu(module: fx.GraphModule) -> bool:
    return _device(module, ()).type == "cpu"


def _device(module: fx.GraphModule, example: Sequence[Tensor]) -> torch.device:
    tensors = (*example, *module.parameters(), *module.buffers())
    kinds = {tensor.device.type: tensor.device for tensor in tensors}
    return kinds.get("cuda") or next(iter(kinds.values()), torch.device("cpu"))


def _inductor_options(options: Options, on_cpu: bool, trains: bool) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    chosen = dict(list_mode_options(options.mode, options.dynamic)) if options.mode else {}
    if on_cpu and chosen.pop("triton.cudagraphs", False):
        # What a CUDA graph spares on a GPU, Python between the kernels, C++ spares on a CPU.
        chosen["cpp_wrapper"] = not trains
    # Dynamo's guards check the inputs, and the state has the strides it was compiled for.
    chosen["size_asserts"] = False
    # Multiply and add in one instruction, rounded once: a sixth off softmax, a quarter off GELU.
    chosen["cpp.enable_floating_point_contract_flag"] = "fast"
    # Its own generator draws a number for each entry anew, in scalar code: a third of a step.
    chosen["fallback_random"] = on_cpu and trains
    if chosen.get("triton.cudagraphs"):
        chosen["triton.cudagraph_skip_dynamic_graphs"] = True
    return chosen
