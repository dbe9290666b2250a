"""Torch-Pruning, as its examples for transformers and for convolutional networks use it.

`MetaPruner` with `num_heads`, whole heads cut, what isn't to be cut in `ignored_layers`, outputs
turned into one number by `output_transform`; afterwards the attention modules are told their new
sizes, which Torch-Pruning leaves to its user.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from benchmarks.prunable import (
    Attention,
    attentions,
    channel_groups,
    constant_positions,
    convolutions,
    feed_forward,
)
from benchmarks.systems.system import Inputs

Kind = Literal["ffn", "heads", "residual", "channels"]
Importance = Literal["magnitude", "taylor"]

INSTALLED = importlib.util.find_spec("torch_pruning") is not None

# The layers that Torch-Pruning can start a group from.
_ROOTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
_OUTPUTS = ("head", "lm_head", "classifier", "pooler", "score", "qa_outputs")


def pruned(
    model: nn.Module,
    inputs: Inputs,
    kinds: Sequence[Kind],
    ratio: float = 0.5,
    importance: Importance = "magnitude",
    backward: Callable[[nn.Module], object] | None = None,
) -> nn.Module:
    """A copy of the model with `ratio` of what `kinds` name cut, each layer ranked by itself.

    `backward` gives the copy's parameters the gradients that "taylor" looks at. Raises whatever
    Torch-Pruning raises; whether the result runs, it doesn't say.
    """
    import torch_pruning

    model = copy.deepcopy(model)
    found = attentions(model)
    heads = {layer: _heads_of(a, layer) for a in found for layer in a.projections}
    with torch.enable_grad():
        pruner = torch_pruning.pruner.MetaPruner(
            model,
            dict(inputs),
            _importance(importance),
            global_pruning=False,
            pruning_ratio=ratio,
            num_heads=heads if "heads" in kinds else {},
            prune_num_heads="heads" in kinds,
            prune_head_dims=False,
            head_pruning_ratio=ratio if "heads" in kinds else 0.0,
            ignored_layers=_ignored(model, kinds),
            output_transform=_traced,
            # Its defaults are one dictionary that all pruners of a process share and write to.
            in_channel_groups={},
            out_channel_groups={},
        )
    if backward is not None:
        backward(model)
    pruner.step()
    model.zero_grad()
    _tell_sizes(found)
    return model


def without_constants(model: nn.Module, inputs: Inputs, kind: Kind) -> nn.Module:
    """A copy without the channels that `benchmarks.prunable.make_constant` makes constant.

    By `DependencyGraph.get_pruning_group` and `prune`, its way to cut channels that one names.
    """
    import torch_pruning

    model = copy.deepcopy(model)
    found = attentions(model)
    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph().build_dependency(
            model, dict(inputs), output_transform=_traced
        )
    if kind == "channels":
        _cut_convolutions(graph, model)
        return model
    for layer, positions in _linear_cuts(model, kind):
        cut = torch_pruning.prune_linear_out_channels
        group = graph.get_pruning_group(layer, cut, idxs=positions)
        if not graph.check_pruning_group(group):
            raise ValueError(f"its check refuses the group of {layer}: a layer would be left empty")
        group.prune()
    _tell_sizes(found)
    return model


def _traced(output: Any) -> list[Tensor]:
    """All outputs: what hangs on one that isn't looked at, it wouldn't see."""
    leaves = pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]


def _linear_cuts(model: nn.Module, kind: Kind) -> list[tuple[nn.Linear, list[int]]]:
    if kind == "ffn":
        # Of a gate and its up, the first takes the other along.
        units = {name.rpartition(".")[0]: layer for name, layer in feed_forward(model).items()}
        return [(layer, constant_positions(layer.out_features, 1)) for layer in units.values()]
    return [(a.value, list(range(a.key_heads // 2 * a.head_size))) for a in attentions(model)]


def _cut_convolutions(graph: Any, model: nn.Module) -> None:
    convs, groups = set(convolutions(model).values()), channel_groups(model)
    ignored = [m for m in model.modules() if isinstance(m, _ROOTS) and m not in convs]
    for group in graph.get_all_groups(ignored_layers=ignored, root_module_types=list(_ROOTS)):
        root = group[0].dep.target.module
        group.prune(idxs=constant_positions(root.out_channels, groups))


def _importance(name: Importance) -> Any:
    from torch_pruning import importance

    if name == "taylor":
        return importance.GroupTaylorImportance()
    return importance.GroupMagnitudeImportance(p=2)


def _ignored(model: nn.Module, kinds: Sequence[Kind]) -> list[nn.Module]:
    """Every layer that a group may start from, but those whose outputs are to be cut."""
    projections = {layer for a in attentions(model) for layer in a.projections}
    hidden = set(feed_forward(model).values())
    convs = set(convolutions(model).values())
    kept = []
    for name, module in model.named_modules():
        if not isinstance(module, _ROOTS):
            continue
        if module in projections:
            kind = "heads"
        elif module in hidden:
            kind = "ffn"
        elif any(part in _OUTPUTS for part in name.split(".")):
            kind = "output"
        elif module in convs and not projections:
            kind = "channels"
        else:
            kind = "residual"
        if kind not in kinds:
            kept.append(module)
    return kept


def _heads_of(attention: Attention, layer: nn.Linear) -> int:
    return attention.heads if layer is attention.query else attention.key_heads


def _tell_sizes(found: Sequence[Attention]) -> None:
    """Write the numbers of heads that are left into the attention modules."""
    for before in found:
        size = before.head_size
        heads, keys = before.query.out_features // size, before.key.out_features // size
        told = {
            "num_attention_heads": heads,
            "num_heads": heads,
            "n_heads": heads,
            "num_key_value_heads": keys,
            "num_key_value_groups": heads // max(keys, 1),
            "all_head_size": heads * size,
            "inner_dim": heads * size,
        }
        for name, value in told.items():
            if hasattr(before.module, name):
                setattr(before.module, name, value)
