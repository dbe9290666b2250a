"""From what torch.export gives to the one dialect of the house.

lifted parameters      -> get_attr nodes named as in the model's state_dict
tied parameters        -> one get_attr name, the others recorded as aliases
guards, assertions     -> dropped (the signature checks the inputs of every call)
no_grad, autocast off  -> their bodies inlined
dropout switched off   -> dropped
second spellings       -> the first (see `spelling`)
in-place operators     -> functional ones, none decomposed (see `functionalization`); writes to
                          buffers and inputs become copy_ nodes at the end
"""

from __future__ import annotations

import inspect
import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    OutputKind,
    SymIntArgument,
    TensorArgument,
)
from torch.fx.experimental.symbolic_shapes import has_free_symbols

from fxopt.calls import describe_leaves
from fxopt.capture.failures import DERIVATIVE_ADVICE
from fxopt.capture.functionalization import UnknownWriteError, functionalized
from fxopt.capture.model_state import lookup, non_persistent, tied_names
from fxopt.capture.spelling import brought_back, respell
from fxopt.capture.trace_memory import sharing_operand
from fxopt.errors import CaptureError
from fxopt.nodes import arguments, draws_random, drop_dead_nodes
from fxopt.operators import DROPOUT, DROPOUT_IN_PLACE, is_assertion
from fxopt.program import Mode, Program
from fxopt.signature import Range, Signature, TensorInput

aten = torch.ops.aten

_DROPOUT = frozenset((*DROPOUT, *DROPOUT_IN_PLACE))
_NAMES_IN_CODE = {
    *("self", "torch", "fxopt", "operator", "math", "getattr", "slice", "range"),
    *fx.graph._custom_builtins,
}
_NO_MODULE = {"_empty_nn_module_stack_from_metadata_hook"}
_VMAP = {
    "_add_batch_dim",
    "_remove_batch_dim",
    "_vmap_decrement_nesting",
    "_vmap_increment_nesting",
    "lazy_load_decompositions",
}
_MUTATIONS = (
    OutputKind.BUFFER_MUTATION,
    OutputKind.PARAMETER_MUTATION,
    OutputKind.USER_INPUT_MUTATION,
)
_STATE_KINDS = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}


def to_program(
    exported: ExportedProgram,
    model: nn.Module,
    forward: inspect.Signature,
    named: Mapping[str, Any],
    mode: Mode,
    learns: bool,
) -> Program:
    """The exported graph as a Program over the model's own tensors.

    Where it `learns`, regions without gradients stay so. `named` are the example inputs as
    {argument name: value}. Raises `CaptureError` for custom objects, effect tokens and enabled
    autocast regions.
    """
    exported = _without_vmap(exported, model)
    try:
        return _Translation(exported, model, mode, learns).program(forward, named)
    except UnknownWriteError:
        decomposed = exported.run_decompositions({})
        return _Translation(decomposed, model, mode, learns).program(forward, named)


class _Translation:
    """One walk over an exported graph that builds the program's graph node by node."""

    def __init__(
        self, exported: ExportedProgram, model: nn.Module, mode: Mode, learns: bool
    ) -> None:
        self.exported = exported
        self.model = model
        self.mode = mode
        self.learns = learns
        self.graph = fx.Graph()
        self.state: dict[str, Tensor] = {}
        self.module_types: dict[str, str] = {"": type(model).__name__}
        self.nodes: dict[fx.Node, Any] = {}
        self.stopped = 0  # how many regions without gradients the walk stands in
        self.shares: dict[fx.Node, fx.Node] = {}
        self.canonical, self.aliases = tied_names(model)

    def program(self, forward: inspect.Signature, named: Mapping[str, Any]) -> Program:
        placeholders = [n for n in self.exported.graph.nodes if n.op == "placeholder"]
        specs = self.exported.graph_signature.input_specs
        leaves = describe_leaves(named)
        inputs: list[TensorInput | object] = []
        example = []
        user_leaves = iter(leaves)
        pending = []
        for node, spec in zip(placeholders, specs, strict=True):
            if spec.kind == InputKind.USER_INPUT:
                path, leaf = next(user_leaves)
                if isinstance(spec.arg, ConstantArgument):
                    inputs.append(leaf)
                    self.nodes[node] = spec.arg.value
                else:
                    inputs.append(self._placeholder(node, path))
                    example.append(leaf)
            elif spec.kind in _STATE_KINDS and isinstance(spec.arg, TensorArgument):
                pending.append((node, spec.target))
            else:
                raise CaptureError(
                    f"{type(self.model).__name__} passes a {spec.kind.name.lower()} ({node.name}) "
                    "through its graph; only tensors can be captured. Move the object out of "
                    "forward."
                )
        for node, target in pending:
            self._attribute(node, target)
        body = [n for n in self.exported.graph.nodes if n.op not in ("placeholder", "output")]
        self._inline(body, self.exported.graph_module)
        out_constants = self._outputs()
        graph = functionalized(self.graph, self.shares)
        drop_dead_nodes(graph, "train")
        if self.mode == "train":
            self._refuse_written_parameters(graph)
        in_spec = pytree.tree_structure(dict(named))
        out_spec = self.exported.call_spec.out_spec
        assert out_spec is not None
        ranges = {
            str(symbol): _range(bounds)
            for symbol, bounds in self.exported.range_constraints.items()
        }
        signature = Signature(forward, in_spec, tuple(inputs), ranges, out_spec, out_constants)
        program = Program(
            graph=graph,
            state=self.state,
            signature=signature,
            example=tuple(example),
            mode=self.mode,
            name=type(self.model).__name__,
            aliases=self.aliases,
            non_persistent=frozenset(non_persistent(self.model)),
            module_types=self.module_types,
        )
        return program.with_graph(graph)

    def _placeholder(self, node: fx.Node, path: str) -> TensorInput:
        value = node.meta["val"]
        new = self.graph.placeholder(self._parameter_name(path))
        new.meta = {"val": value, "module_path": "", "source": ""}
        self.nodes[node] = new
        sizes = tuple(int(s) if not has_free_symbols(s) else str(s) for s in value.shape)
        return TensorInput(path, value.dtype, value.device, sizes)

    def _parameter_name(self, path: str) -> str:
        """A name for a parameter of the generated function, that nothing else there has."""
        name = re.sub(r"\W+", "_", path, flags=re.ASCII).strip("_") or "input"
        if not name.isidentifier() or keyword.iskeyword(name) or name in _NAMES_IN_CODE:
            name = f"input_{name}"
        taken = {str(one.target) for one in self.graph.nodes}
        candidates = (f"{name}_{n}" if n else name for n in range(1 << 20))
        return next(candidate for candidate in candidates if candidate not in taken)

    def _attribute(self, node: fx.Node, target: str) -> None:
        tensor = lookup(self.model, target)
        if tensor is None:
            constant = {**self.exported.state_dict, **self.exported.constants}[target]
            assert isinstance(constant, Tensor)
            tensor = constant
        name = self.canonical.get(target, target)
        if name not in self.state:
            self.state[name] = tensor
            new = self.graph.get_attr(name)
            new.meta = {"val": node.meta["val"], "module_path": "", "source": ""}
            self.nodes[node] = new
        else:
            known = next(n for n in self.graph.nodes if n.op == "get_attr" and n.target == name)
            self.nodes[node] = known

    def _inline(self, body: list[fx.Node], owner: fx.GraphModule) -> None:
        for node in body:
            if node in self.nodes:
                continue  # a result of an inlined region
            if node.op == "get_attr":
                self.nodes[node] = getattr(owner, str(node.target))
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                self._inline_region(node)
            elif is_assertion(node.target):
                self._drop_assertion(node)
            elif node.target in _DROPOUT and not draws_random(node):
                self.nodes[node] = self._value(node.args[0])
            elif node.target is aten.sym_numel.default:
                self.nodes[node] = self._numel(node)
            elif (norm := brought_back(node)) is not None:
                self._bring_back(node, *norm)
            else:
                self._copy(node)

    def _drop_assertion(self, node: fx.Node) -> None:
        """What a functional assertion gives is the token that it was given."""
        token = arguments(node).get("dep_token")
        if token is not None:
            self.nodes[node] = self._value(token)

    def _numel(self, node: fx.Node) -> fx.Node | int:
        """numel(x) as the product of the sizes of x; compilers take no other operator for it."""
        x, meta = self._value(node.args[0]), self._meta(node)
        sizes = x.meta["val"].shape
        value: Any = math.prod(size for size in sizes if isinstance(size, int))
        total: fx.Node | int = value
        for axis, size in enumerate(sizes):
            if isinstance(size, int):
                continue
            value = value * size
            factor = self.graph.call_function(aten.sym_size.int, (x, axis))
            factor.meta = {**meta, "val": size}
            if total == 1:
                total = factor
                continue
            total = self.graph.call_function(operator.mul, (total, factor))
            total.meta = {**meta, "val": value}
        return total

    def _bring_back(self, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
        """One operator for `node`, of which the first result is read."""
        new = self.graph.call_function(target, fx.map_arg(args, self._value))
        new.meta = {**self._meta(node), "val": node.meta["val"][0]}
        for user in node.users:
            self.nodes[user] = new

    def _copy(self, node: fx.Node) -> None:
        new = self.graph.node_copy(node, self._operands(node))
        respell(new)
        new.meta = self._meta(node)
        self.nodes[node] = new
        shared = sharing_operand(node)
        operand = None if shared is None else self.nodes[shared]
        if isinstance(operand, fx.Node):
            self.shares[new] = operand

    def _operands(self, node: fx.Node) -> Callable[[fx.Node], Any]:
        """How `node` reads its operands: where gradients are off, what it writes carries none."""
        if not self.stopped or not _is_mutable(node):
            return self._value
        places = [node.kwargs.get("out", node.args[0])]
        return lambda one: self._value(one) if one in places else self._detached(self._value(one))

    def _meta(self, node: fx.Node) -> dict[str, Any]:
        stack = node.meta.get("nn_module_stack") or {}
        path = ""
        for entry_path, kind in stack.values():
            if entry_path in _NO_MODULE:
                continue
            path = entry_path.partition("@")[0]  # torch marks the second call of a shared module
            self.module_types.setdefault(path, _class_name(kind))
        return {
            "val": node.meta.get("val"),
            "module_path": path,
            "source": _source(node.meta.get("stack_trace")),
            "nn_module_stack": stack,
            "stack_trace": node.meta.get("stack_trace"),
        }

    def _value(self, node: Any) -> Any:
        return self.nodes[node] if isinstance(node, fx.Node) else node

    def _inline_region(self, node: fx.Node) -> None:
        """Replace a no_grad or autocast region by its body."""
        kind = node.target.name()  # type: ignore[union-attr]
        skip = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}.get(kind)
        if skip is None or (kind == "wrap_with_autocast" and node.args[2]):
            what = (
                "an enabled torch.autocast region" if skip else f"the higher-order operator {kind}"
            )
            raise CaptureError(
                f"{type(self.model).__name__} holds {what}, which the graph dialect doesn't "
                "take, at "
                f"{self._region_source(node) or 'an unknown line'}. Move it out of "
                "forward (precision is placed by a pass), or rewrite the branch with torch.where."
            )
        module = self._value(node.args[skip])
        assert isinstance(module, fx.GraphModule)
        stops = kind == "wrap_with_set_grad_enabled" and not node.args[0] and self.learns
        inner = [n for n in module.graph.nodes if n.op == "placeholder"]
        for placeholder, argument in zip(inner, node.args[skip + 1 :], strict=True):
            self.nodes[placeholder] = self._value(argument)
        body = [n for n in module.graph.nodes if n.op not in ("placeholder", "output")]
        self.stopped += stops
        self._inline(body, module)
        self.stopped -= stops
        (results,) = next(iter(reversed(module.graph.nodes))).args
        # What a region hands through is the caller's own tensor, with its gradient.
        values = [
            self._detached(self._value(result)) if stops and result not in inner
            else self._value(result)
            for result in results
        ]  # fmt: skip
        self.nodes[node] = values
        for user in node.users:
            assert user.target.__name__ == "getitem"  # type: ignore[union-attr]
            index = user.args[1]
            assert isinstance(index, int)
            self.nodes[user] = values[index]

    def _region_source(self, region: fx.Node) -> str:
        """The line of a region, or of the first operation in its body that knows one."""
        bodies = [self._value(node) for node in region.all_input_nodes]
        inner = [n for body in bodies if isinstance(body, fx.GraphModule) for n in body.graph.nodes]
        sources = (_source(n.meta.get("stack_trace")) for n in (region, *inner))
        return next(filter(None, sources), "")

    def _detached(self, value: Any) -> Any:
        """`value` without the gradient that it may carry."""
        if not isinstance(value, fx.Node) or value.target is aten.detach.default:
            return value
        tensor = value.meta["val"]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return value
        new = self.graph.call_function(aten.detach.default, (value,))
        new.meta = dict(value.meta)
        self.shares[new] = value
        return new

    def _outputs(self) -> dict[int, object]:
        """Close the graph with its state writes and output; return the constant output leaves."""
        specs = self.exported.graph_signature.output_specs
        (results,) = next(iter(reversed(self.exported.graph.nodes))).args
        constants: dict[int, object] = {}
        outputs: list[fx.Node] = []
        index = 0
        names = {node.name: node for node in self.exported.graph.nodes}
        for result, spec in zip(results, specs, strict=True):
            if spec.kind == OutputKind.USER_OUTPUT:
                value = self._value(result)
                if isinstance(value, fx.Node):
                    self._check_output(value)
                    outputs.append(value)
                else:
                    constants[index] = value
                index += 1
            elif spec.kind in _MUTATIONS:
                self._write(spec, names, self._value(result))
            else:
                raise CaptureError(
                    f"the graph returns a {spec.kind.name.lower()}; only tensors can be"
                )
            assert not isinstance(spec.arg, SymIntArgument) or isinstance(value, fx.Node)
        output = self.graph.output(tuple(outputs))
        output.meta = {"val": tuple(node.meta["val"] for node in outputs)}
        return constants

    def _refuse_written_parameters(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
            place = node.args[0]
            if isinstance(self.state.get(str(place.target)), nn.Parameter):
                raise CaptureError(
                    f"{type(self.model).__name__} writes to its parameter {place.target} in "
                    f"forward (at {node.meta['source'] or 'an unknown line'}), which a graph that "
                    "trains can't hold. Write it between the calls, or make it a buffer; for "
                    "nn.Embedding(max_norm=), set max_norm=None for the training and bound the "
                    "rows after each optimizer step."
                )

    def _check_output(self, node: fx.Node) -> None:
        if not isinstance(node.meta["val"], Tensor):
            raise CaptureError(
                f"{type(self.model).__name__} returns a number that depends on its inputs "
                f"({node.name}, at {node.meta['source'] or 'an unknown line'}); a program returns "
                "tensors. Return it as one, with torch.scalar_tensor, or leave it out."
            )

    def _write(self, spec: Any, names: Mapping[str, fx.Node], value: fx.Node) -> None:
        if spec.kind != OutputKind.USER_INPUT_MUTATION:
            target = self.canonical.get(spec.target, spec.target)
            place = next(n for n in self.graph.nodes if n.op == "get_attr" and n.target == target)
        else:
            place = self.nodes[names[spec.target]]
        new = self.graph.call_function(aten.copy_.default, (place, value))
        new.meta = {
            "val": place.meta["val"],
            "module_path": value.meta["module_path"],
            "source": value.meta["source"],
        }


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _without_vmap(exported: ExportedProgram, model: nn.Module) -> ExportedProgram:
    """`exported` with torch.vmap written out; `CaptureError` for other transforms of torch.func."""
    found = [
        node
        for module in exported.graph_module.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
        if getattr(node.target, "__module__", None) == "torch._functorch.predispatch"
    ]
    for node in found:
        if node.target.__name__ not in _VMAP:
            raise CaptureError(
                f"{type(model).__name__} can't be captured as a graph.\n"
                f"  construct: a transform of torch.func ({node.target.__name__})\n"
                f"  at: {_source(node.meta.get('stack_trace')) or 'unknown line'}\n"
                f"  try: {DERIVATIVE_ADVICE}"
            )
    return exported.run_decompositions({}) if found else exported


def _class_name(kind: Any) -> str:
    return (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]


def _source(trace: str | None) -> str:
    """`file.py:line  code` of the innermost frame outside torch; the path from its package on."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]+\n(?:\s+([^\n]+))?', trace or "")
    if not frames:
        return ""
    own = [frame for frame in frames if not frame[0].startswith("<")]
    outside = [frame for frame in own if "/torch/" not in frame[0].replace("\\", "/")]
    file, line, code = (outside or own or frames)[-1]
    parts = PurePath(file).parts
    start = parts.index("site-packages") + 1 if "site-packages" in parts else len(parts) - 1
    return f"{'/'.join(parts[start:])}:{line}  {code}".rstrip()


def _range(bounds: Any) -> Range:
    def number(value: Any) -> int | None:
        try:
            return int(value)
        except (OverflowError, TypeError, ValueError, AttributeError):
            return None

    low, high = number(bounds.lower), number(bounds.upper)
    return Range(low or 0, high if high is not None and high < 2**62 else None)
