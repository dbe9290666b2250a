"""What `Optimized.save` wrote becomes a module again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fxopt.errors import SaveError
from fxopt.lower import Lower
from fxopt.optimized.optimized import Optimized, optimized_like
from fxopt.optimized.outcome import Evaluation, Outcome
from fxopt.report import Report
from fxopt.saving import load as read
from fxopt.spec import parse_passes


def load(folder: str | Path, *, namespaces: Collection[str] = ()) -> Optimized:
    """The module that `Optimized.save` wrote; lowered as it was, at its first call.

    Nothing found in the folder is executed; `namespaces` are those of a user's own operators that
    the graph may call. Raises `SaveError` for a damaged, truncated, hostile or foreign folder.
    """
    saved = read(folder, namespaces=namespaces)
    if saved.report_json is None:
        raise SaveError(f"{folder} holds no report; save the module with its save method")
    lowering = None
    for pass_ in parse_passes(saved.lowering or ""):
        if not isinstance(pass_, Lower):
            raise SaveError(f"{folder} names {pass_!r} as its lowering; only Lower can be one")
        lowering = pass_
    program = saved.program
    carried = {} if saved.config is None else {"config": _config(saved.config, folder)}
    twin = optimized_like(program.name, program.signature.forward, carried)
    report = Report.from_json(saved.report_json)
    evaluation = Evaluation()
    if isinstance(saved.evaluation, str):
        evaluation = Evaluation(missing=saved.evaluation)
    elif saved.evaluation is not None:
        evaluation = Evaluation(saved.evaluation)
    twin.install(Outcome(program, report, (), lowering, evaluation=evaluation))
    return twin


def _config(saved: Mapping[str, Any], folder: str | Path) -> Any:
    """The transformers config of a saved model; its class is one that transformers registers."""
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[saved["model_type"]].from_dict(dict(saved))
    except Exception as error:  # the file may be hostile: any value may stand anywhere
        raise SaveError(
            f"{folder} holds a model config that transformers can't read: {error!s:.200}"
        ) from error
