"""A program to a folder and back, bit for bit in its outputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fxopt.errors import SaveError, WellFormedError
from fxopt.nodes import note_origins
from fxopt.program import Program
from fxopt.saving import folder as folders
from fxopt.saving.call_types import CallTypes
from fxopt.saving.further import EVALUATION, Decode, decode_further, first_of, tensors_of
from fxopt.saving.nodes import decode_nodes, encode_nodes
from fxopt.saving.origins import decode_origins, encode_origins
from fxopt.saving.tensors import read_tensors, write_tensors
from fxopt.saving.trees import decode_signature, encode_signature
from fxopt.saving.values import counts, field, strings, texts
from fxopt.wellformed import check


@dataclass(frozen=True)
class Saved:
    """What a folder held: the program, the spec of its lowering pass, its report as JSON text.

    `config` is the JSON of the model's transformers config, where it had one; `further` are the
    programs for other branches of the model; `evaluation` is what a program that trains computes in
    evaluation, where that doesn't follow from it, or why that isn't known; `generation` is the JSON
    of the generation config of a model that is read step by step.
    """

    program: Program
    lowering: str | None
    report_json: str | None
    config: Mapping[str, Any] | None = None
    further: tuple[Program, ...] = ()
    evaluation: Program | str | None = None
    generation: Mapping[str, Any] | None = None


def save(
    program: Program,
    folder: str | Path,
    *,
    lowering: str | None = None,
    report_json: str | None = None,
    config: Mapping[str, Any] | None = None,
    further: Sequence[Program] = (),
    evaluation: Program | str | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write `program` to `folder`, which is made, or replaced if it holds a saved program.

    So are `further` programs of the same model, and its `evaluation` or why there is none; a tensor
    that several hold is written once. Tensors that exist as recipes are computed first. What was
    written is read back, as `load` will, before it takes its place; a folder that was there keeps
    its content until then. Raises `WellFormedError` for a program that breaks the dialect, and
    `SaveError` where something can't be saved, `folder` can't be written, or holds anything else.
    """
    for one in (program, *further):
        check(one)
    with folders.writing(Path(folder)) as partial:
        program = program.materialized()
        others = [one.materialized() for one in further]
        graph = {
            **to_document(program),
            "further": [to_document(one) for one in others],
            "evaluation": document_beside(evaluation),
        }
        state = {name: program.tensor(name) for name in program.state}
        state |= tensors_of(others) | tensors_beside(evaluation)
        entries = write_tensors(partial / folders.TENSORS, state, program.example)
        folders.write_json(
            partial / folders.GRAPH,
            {
                **graph,
                "lowering": lowering,
                "config": config,
                "generation": generation,
                "tensors": entries,
            },
        )
        if report_json is not None:
            (partial / folders.REPORT).write_text(report_json, encoding="utf-8")
        _prove(partial, program, state)


def _prove(folder: Path, program: Program, state: Mapping[str, Tensor]) -> None:
    """Read the graph in `folder` back over the tensors in memory; `SaveError` where that fails."""
    try:
        data = folders.read_json(folder / folders.GRAPH)
        program, *_ = _programs(data, state, program.example)
        decode_beside(data.get("evaluation"), state, program, from_document)
        _report(folder)
    except (SaveError, WellFormedError) as error:
        raise SaveError(
            f"nothing was saved, since load would refuse it: {error}\nThe module is as it was: "
            "keep its weights with torch.save(opt.state_dict(), ...), and report this to fxopt."
        ) from error


class _OnlyTriedError(Exception):
    """Ends a trial of writing."""


def check_target(folder: str | Path) -> None:
    """Raise the `SaveError` that `save` would, where it couldn't write to `folder`."""
    try:
        with folders.writing(Path(folder)):
            raise _OnlyTriedError
    except _OnlyTriedError:
        return


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
        program, *further = _programs(data, state, example, namespaces)
        beside = decode_beside(
            data.get("evaluation"),
            state,
            program,
            partial(from_document, namespaces=namespaces, programs=2),
        )
        lowering = data["lowering"]
        if not isinstance(lowering, str | None):
            raise SaveError("the saved lowering is no text")
        config = data["config"]
        if not isinstance(config, dict | None):
            raise SaveError("the saved model config is no object")
        generation = data.get("generation")  # earlier versions wrote none
        if not isinstance(generation, dict | None):
            raise SaveError("the saved generation config is no object")
        report = _report(path)
        return Saved(program, lowering, report, config, tuple(further), beside, generation)
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


def _programs(
    data: Any,
    state: Mapping[str, Tensor],
    example: tuple[Tensor, ...],
    namespaces: Collection[str] | None = None,
) -> tuple[Program, ...]:
    """All programs of a graph file, the first one first."""

    further = data.get("further", [])  # folders of earlier versions hold one program
    count = 1 + (len(further) if isinstance(further, list) else 0)
    count += isinstance(data.get("evaluation"), dict)

    def decode(document: Any, tensors: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Program:
        return from_document(document, tensors, inputs, namespaces, count)

    return (decode(data, first_of(state), example), *decode_further(further, state, decode))


def to_document(program: Program) -> dict[str, Any]:
    """`program` without its tensors as a JSON document; `SaveError` where something has no form."""
    return {
        "name": program.name,
        "mode": program.mode,
        "notes": list(program.notes),
        "aliases": dict(program.aliases),
        "non_persistent": sorted(program.non_persistent),
        "module_types": dict(program.module_types),
        "pruned": dict(program.pruned),
        "origins": encode_origins(program.origins),
        "signature": encode_signature(program.signature),
        "nodes": encode_nodes(program),
    }


def from_document(
    data: Any,
    state: Mapping[str, Tensor],
    example: tuple[Tensor, ...],
    namespaces: Collection[str] | None = None,
    programs: int = 1,
) -> Program:
    """The program whose document `to_document` made, over its tensors, checked as by `load`.

    It may call operators of `namespaces`; of any where they are left out. Where it is one of
    several `programs`, they share what a file may take.
    """
    mode: Any = field(data, "mode", str)
    if mode not in ("eval", "train"):
        raise SaveError(f"the program was saved in the unknown mode {mode!r:.40}")
    signature = decode_signature(field(data, "signature", dict))
    types = CallTypes(len(field(data, "nodes", list)), programs)
    graph = decode_nodes(data["nodes"], signature, state, example, namespaces, types)
    note_origins(graph, decode_origins(data, state))
    program = Program(
        graph=graph,
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


def document_beside(evaluation: Program | str | None) -> Any:
    """What is written of the evaluation of a program that trains."""
    if not isinstance(evaluation, Program):
        return evaluation
    check(evaluation)
    return to_document(evaluation)


def tensors_beside(evaluation: Program | str | None) -> dict[str, Tensor]:
    """Its tensors, under names that no other program's have."""
    if not isinstance(evaluation, Program):
        return {}
    return tensors_of([evaluation.materialized()], EVALUATION)


def decode_beside(
    document: Any, tensors: Mapping[str, Tensor], program: Program, decode: Decode
) -> Program | str | None:
    """The evaluation of `program` that `document_beside` wrote; earlier versions wrote none."""
    if document is None or isinstance(document, str):
        return document
    (found,) = decode_further([document], tensors, decode, EVALUATION)
    if program.mode != "train" or found.mode != "eval":
        raise SaveError("the saved evaluation program doesn't fit the one that trains")
    return found


def _report(path: Path) -> str | None:
    report = path / folders.REPORT
    if not report.exists():
        return None
    folders.read_json(report)
    return report.read_text(encoding="utf-8")
