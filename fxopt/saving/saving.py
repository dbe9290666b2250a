"""A program to a folder and back, bit for bit in its outputs."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fxopt.errors import SaveError, WellFormedError
from fxopt.program import Program
from fxopt.saving import folder as folders
from fxopt.saving.nodes import decode_nodes, encode_nodes
from fxopt.saving.tensors import read_tensors, write_tensors
from fxopt.saving.trees import decode_signature, encode_signature
from fxopt.saving.values import counts, field, strings, texts
from fxopt.wellformed import check


@dataclass(frozen=True)
class Saved:
    """What a folder held: the program, the spec of its lowering pass, its report as JSON text.

    `config` is the JSON of the model's transformers config, where it had one; `evaluation` what a
    program that trains computes in evaluation, where that doesn't follow from it, or why that isn't
    known.
    """

    program: Program
    lowering: str | None
    report_json: str | None
    config: Mapping[str, Any] | None = None
    evaluation: Program | str | None = None


def save(
    program: Program,
    folder: str | Path,
    *,
    lowering: str | None = None,
    report_json: str | None = None,
    config: Mapping[str, Any] | None = None,
    evaluation: Program | str | None = None,
) -> None:
    """Write `program` to `folder`, which is made, or replaced if it holds a saved program.

    `evaluation` is written beside it, over the same tensors where their names are the same; a text
    says why there is none. Tensors that exist as recipes are computed first. The folder appears
    complete or not at all.
    Raises `WellFormedError` for a program that breaks the dialect, and `SaveError` where something
    can't be saved, or `folder` holds anything else.
    """
    target = Path(folder)
    check(program)
    program = program.materialized()
    graph = _encode(program)
    state = {name: program.tensor(name) for name in program.state}
    if isinstance(evaluation, Program):
        check(evaluation)
        state = {**{name: evaluation.tensor(name) for name in evaluation.state}, **state}
    with folders.writing(target) as partial:
        entries = write_tensors(partial / folders.TENSORS, state, program.example)
        folders.write_json(
            partial / folders.GRAPH,
            {
                **graph,
                "lowering": lowering,
                "config": config,
                "tensors": entries,
                "evaluation": (
                    _encode(evaluation) if isinstance(evaluation, Program) else evaluation
                ),
            },
        )
        if report_json is not None:
            (partial / folders.REPORT).write_text(report_json, encoding="utf-8")


def load(folder: str | Path, *, namespaces: Collection[str] = ()) -> Saved:
    """Read what `save` wrote. Nothing that is found in the folder is executed.

    `namespaces` are those of operators, other than aten and fxopt, that the graph may call. Raises
    `SaveError` for whatever isn't a saved program, complete, undamaged and well-formed.
    """
    path = Path(folder)
    manifest = folders.verify(path)
    data = folders.read_json(path / folders.GRAPH)
    try:
        state, example = read_tensors(path / folders.TENSORS, field(data, "tensors", dict))
        program = _decode(data, state, example, namespaces)
        evaluation = _evaluation(data, state, program, namespaces)
        lowering = data["lowering"]
        if not isinstance(lowering, str | None):
            raise SaveError("the saved lowering is no text")
        config = data["config"]
        if not isinstance(config, dict | None):
            raise SaveError("the saved model config is no object")
        return Saved(program, lowering, _report(path), config, evaluation)
    except SaveError as error:
        raise SaveError(
            f"{path} (saved by fxopt {manifest['fxopt']}, torch {manifest['torch']}) can't be "
            f"loaded: {error}"
        ) from error
    except WellFormedError as error:
        raise SaveError(f"{path} holds a graph that is not well-formed: {error}") from error
    except Exception as error:  # the file may be hostile: any shape of JSON may stand anywhere
        raise SaveError(
            f"{path / folders.GRAPH} is damaged: {type(error).__name__}: {error!s:.200}"
        ) from error


def _encode(program: Program) -> dict[str, Any]:
    return {
        "name": program.name,
        "mode": program.mode,
        "notes": list(program.notes),
        "aliases": dict(program.aliases),
        "non_persistent": sorted(program.non_persistent),
        "module_types": dict(program.module_types),
        "pruned": dict(program.pruned),
        "signature": encode_signature(program.signature),
        "nodes": encode_nodes(program),
    }


def _decode(
    data: Any,
    state: Mapping[str, Tensor],
    example: tuple[Tensor, ...],
    namespaces: Collection[str],
) -> Program:
    mode: Any = field(data, "mode", str)
    if mode not in ("eval", "train"):
        raise SaveError(f"the program was saved in the unknown mode {mode!r:.40}")
    signature = decode_signature(field(data, "signature", dict))
    nodes = field(data, "nodes", list)
    if isinstance(data.get("evaluation"), dict):
        read = {node.get("target") for node in nodes if isinstance(node, dict)}
        state = {name: tensor for name, tensor in state.items() if name in read}
    program = Program(
        graph=decode_nodes(nodes, signature, state, example, namespaces),
        state=state,
        signature=signature,
        example=example,
        mode=mode,
        name=field(data, "name", str),
        aliases=strings(data, "aliases"),
        non_persistent=frozenset(texts(data, "non_persistent")),
        module_types=strings(data, "module_types"),
        notes=tuple(texts(data, "notes")),
        pruned=counts(data, "pruned"),
    )
    check(program)
    return program


def _evaluation(
    data: Any, state: Mapping[str, Tensor], program: Program, namespaces: Collection[str]
) -> Program | str | None:
    """The evaluation program of a folder; those of earlier versions hold none."""
    encoded = data.get("evaluation")
    if encoded is None or isinstance(encoded, str):
        return encoded
    if program.mode != "train" or not isinstance(encoded, dict):
        raise SaveError("an evaluation program is saved where nothing trains")
    nodes = field(encoded, "nodes", list)
    read = {node.get("target") for node in nodes if isinstance(node, dict)}
    unused = set(state) - read - set(program.state)
    if unused:
        raise SaveError(f"no program reads the tensor {min(unused)}")
    own = {name: tensor for name, tensor in state.items() if name in read}
    paths = [one.path for one in program.signature.tensors]
    inputs = dict(zip(paths, program.example, strict=True))
    wanted = [one.path for one in decode_signature(field(encoded, "signature", dict)).tensors]
    missing = [path for path in wanted if path not in inputs]
    if missing or encoded.get("mode") != "eval" or encoded.get("evaluation") is not None:
        raise SaveError("the saved evaluation program doesn't fit the one that trains")
    return _decode(encoded, own, tuple(inputs[path] for path in wanted), namespaces)


def _report(path: Path) -> str | None:
    report = path / folders.REPORT
    if not report.exists():
        return None
    text = report.read_text(encoding="utf-8")
    json.loads(text)
    return text
