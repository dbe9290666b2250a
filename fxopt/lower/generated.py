"""What Inductor generated: the code of every compilation, and the kernels called in it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.cpu_allocator import reusing
from fxopt.errors import LowerError
from fxopt.kernels import GENERATED_AS, KERNEL_LEVEL
from fxopt.lower.shortcut import Shortcut
from fxopt.nodes import label

_NAMED = 4
_KERNELS = "|".join(re.escape(name) for name in sorted(set(GENERATED_AS.values())))
_CALL = re.compile(rf"torch\.ops\.({_KERNELS})\.\w+\(")
_NAMES_IN_CPP = _KERNELS.replace(re.escape("."), "::")
_CALL_IN_CPP = re.compile(rf'(?:OrThrow|call_dispatcher)\("({_NAMES_IN_CPP})", "')


class InductorBackend:
    """Inductor as a torch.compile backend that keeps the code it generates.

    `codes` holds one text for each graph compiled so far, forward and backward alike. Options apply
    to this backend's compilations alone; nothing process-wide is set. With `keep_memory`, calls in
    inference reuse what earlier ones freed (`cpu_allocator`). `shortcut` learns how to call the
    code.
    """

    def __init__(
        self, options: dict[str, Any], keep_memory: bool, shortcut: Shortcut | None = None
    ) -> None:
        self.options = options
        self.keep_memory = keep_memory
        self.shortcut = shortcut
        self.codes: list[str] = []

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        """Compile `module`; called by Dynamo, once for each set of shapes it specialises on."""
        from torch._functorch import config as autograd_config
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def keep_code(graph: fx.GraphModule, example: Sequence[Any], **kwargs: Any) -> Any:
            compiled = compile_fx_inner(graph, example, **kwargs)
            if kwargs.get("is_inference"):
                self._shorten_calls(compiled)
            self.codes.append(str(getattr(compiled, "source_code", "")))
            return compiled

        # A hit in the autograd cache would hand back a callable without coming past `keep_code`;
        # Inductor's own cache, which saves the C++ and Triton compilations, stays on.
        with autograd_config.patch(enable_autograd_cache=False):
            run: Any = compile_fx(
                module, inputs, inner_compile=keep_code, config_patches=dict(self.options)
            )
        return run if self.shortcut is None else self.shortcut.watched(run)

    def _shorten_calls(self, compiled: Any) -> None:
        """Let generated code call its kernels past autograd, which asks in Python, 5 microseconds
        for each, whether there are gradients to record, and take memory that it had before. There
        are no gradients in inference."""
        run = compiled.current_callable

        def call(inputs: Sequence[Any]) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return run(inputs)

        compiled.current_callable = reusing(call) if self.keep_memory else call


def kernel_nodes(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The kernel-level nodes; of equal calls only the first, since the compiler merges them."""
    found: dict[Any, fx.Node] = {}
    for node in nodes:
        if node.op == "call_function" and node.target in KERNEL_LEVEL:
            found.setdefault((node.target, node.args, tuple(node.kwargs.items())), node)
    return list(found.values())


def count_calls(code: str) -> Counter[str]:
    """How often the code calls each kernel (a name of `GENERATED_AS`), outside comments.

    From Python, or, where the calls are generated in C++, through torch's dispatcher.
    """
    lines = [line for line in code.splitlines() if not line.lstrip().startswith(("#", "//"))]
    calls = (match[1] for line in lines for match in _CALL.finditer(line))
    in_cpp = (match[1] for line in lines for match in _CALL_IN_CPP.finditer(line))
    return Counter((*calls, *(name.replace("::", ".") for name in in_cpp)))


def missing_kernels(asked: Sequence[fx.Node], code: str) -> tuple[str, ...]:
    """One message for each kernel that the code calls less often than the graph asks for."""
    found = count_calls(code)
    by_kernel: dict[str, list[fx.Node]] = {}
    for node in asked:
        assert isinstance(node.target, OpOverload)
        by_kernel.setdefault(GENERATED_AS[node.target], []).append(node)
    messages = []
    for kernel, nodes in by_kernel.items():
        if found[kernel] >= len(nodes):
            continue
        names = [f"{label(node)}: {node.target}" for node in nodes[:_NAMED]]
        more = [f"and {len(nodes) - _NAMED} more"] if len(nodes) > _NAMED else []
        messages.append(
            f"{found[kernel]} of {len(nodes)} calls of {kernel} are in the generated code; "
            "asked for by " + ", ".join(names + more)
        )
    return tuple(messages)


def check_kernels(asked: Sequence[fx.Node], code: str, strict: bool) -> tuple[str, ...]:
    """The messages of `missing_kernels`; with `strict` a `LowerError` that holds them."""
    missing = missing_kernels(asked, code)
    if missing and strict:
        raise LowerError(
            "lowering lost kernels: " + "; ".join(missing) + "\n  leave out strict=True to run "
            "with what was generated, or leave those nodes out of the pass that asked for them"
        )
    return missing
