"""A program as a graph module over its own tensors; further graphs over the same ones."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxopt.attribute_names import quote_names
from fxopt.program import Program
from fxopt.recipe import materialize

aten = torch.ops.aten


class LayerNormTensors(nn.LayerNorm):
    """The container of a layer norm's tensors, by type: an optimizer that spares norms the weight
    decay, as that of transformers.Trainer, knows them by `isinstance`. It computes nothing."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def extra_repr(self) -> str:
        return ""


def graph_module(program: Program) -> fx.GraphModule:
    """The program as a graph module over its own tensors, tied names tied.

    State that a call writes is copied, so that calling the result leaves the model as it is.
    """
    state = {name: materialize(tensor) for name, tensor in program.state.items()}
    state.update({name: state[name].detach().clone() for name in program.written})
    graph = _copied(program.graph)
    if program.mode == "train":
        _read_before_writing(graph)
    module = _empty(program.name)
    for name in state:
        _make_owner(module, name)
    for path, kind in program.module_types.items():
        if kind == "LayerNorm" and path:
            _contain(module, path, LayerNormTensors())
    for name, tensor in state.items():
        owner, leaf = owner_of(module, name)
        if isinstance(tensor, nn.Parameter):
            owner._parameters[leaf] = tensor
        else:
            _put_buffer(owner, leaf, tensor, persistent=name not in program.non_persistent)
    for alias, name in program.aliases.items():
        _alias(module, alias, name)
    module.graph = graph
    return module


def graph_over(module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A copy of `graph`, all of whose state `module` holds, as a module over the same tables.

    Whatever moves or replaces a tensor in one of the two moves or replaces it in both.
    """
    other = _empty(type(module).__name__)
    share_tables(other, module)
    other.graph = _copied(graph)
    return other


def hold(module: fx.GraphModule, program: Program) -> None:
    """Let `module` hold what `program` reads and it doesn't hold yet; written state is copied."""
    for name, entry in program.state.items():
        owner, leaf = _make_owner(module, name)
        if leaf in owner._parameters or leaf in owner._buffers:
            continue
        tensor = materialize(entry)
        if isinstance(tensor, nn.Parameter):
            owner._parameters[leaf] = tensor
            continue
        own = tensor.detach().clone() if name in program.written else tensor
        _put_buffer(owner, leaf, own, persistent=name not in program.non_persistent)


def share_tables(module: nn.Module, source: nn.Module) -> None:
    """Let `module` hold the parameters, buffers and parts of `source`, in the very same tables."""
    module._parameters = source._parameters
    module._buffers = source._buffers
    module._modules = source._modules
    module._non_persistent_buffers_set = source._non_persistent_buffers_set


def attribute(module: nn.Module, name: str) -> Tensor:
    """The tensor that `module` holds under a dotted name."""
    owner, leaf = owner_of(module, name)
    tensor = {**owner._buffers, **owner._parameters}.get(leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def _copied(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    quote_names(copy)
    return copy


def _empty(name: str) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(())
    return fx.GraphModule(nn.Module(), graph, class_name=name)


def _read_before_writing(graph: fx.Graph) -> None:
    """Let what reads floating-point state that the graph writes later read a copy of it.

    A batch norm keeps its running statistics for the backward, which mustn't find them written.
    """
    for write in graph.find_nodes(op="call_function", target=aten.copy_.default):
        state = write.args[0]
        if state.op != "get_attr" or not state.meta["val"].is_floating_point():
            continue
        with graph.inserting_after(state):
            copy = graph.call_function(aten.clone.default, (state,))
        copy.meta = dict(state.meta)
        state.replace_all_uses_with(copy, lambda user, kept=(write, copy): user not in kept)


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The part of `module` that holds what has a dotted name, and the name there."""
    path, _, leaf = name.rpartition(".")
    owner = module
    for part in path.split(".") if path else []:
        inner = owner._modules[part]
        assert inner is not None
        owner = inner
    return owner, leaf


def _contain(module: nn.Module, path: str, container: nn.Module) -> None:
    """Put `container` in the place of the plain one at `path`, if there is one."""
    try:
        owner, leaf = owner_of(module, path)
        plain = owner._modules[leaf]
    except (AttributeError, KeyError):
        return
    assert plain is not None
    share_tables(container, plain)
    owner._modules[leaf] = container


def _alias(module: nn.Module, alias: str, name: str) -> None:
    """Let `alias` name the same tensor as `name`, in containers made where they are missing."""
    owner, leaf = _make_owner(module, alias)
    tensor = attribute(module, name)
    if isinstance(tensor, nn.Parameter):
        owner._parameters[leaf] = tensor
    elif leaf not in owner._buffers:
        _put_buffer(owner, leaf, tensor)


def _make_owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that is to hold `name`, in containers made where they are missing, and its leaf.

    Past `add_module` and `register_buffer`, which refuse names that nn.Module's methods have.
    """
    path, _, leaf = name.rpartition(".")
    owner = module
    for part in path.split(".") if path else []:
        inner = owner._modules.setdefault(part, nn.Module())
        assert inner is not None
        owner = inner
    return owner, leaf


def _put_buffer(owner: nn.Module, leaf: str, tensor: Tensor, persistent: bool = True) -> None:
    owner._buffers[leaf] = tensor
    if not persistent:
        owner._non_persistent_buffers_set.add(leaf)
