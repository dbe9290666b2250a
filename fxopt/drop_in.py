"""A transformed model put in the place of the one that a service's object calls.

What the model inside is called with is not guessed but recorded, from a call of the object itself;
and that the result answers afterwards is seen, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from fxopt.calls import bind, forward_signature, generates
from fxopt.errors import InputError, ModelError
from fxopt.transform import transform

T = TypeVar("T")


def optimize_sentence_transformer(
    sentences: T,
    texts: Sequence[str],
    passes: str | Iterable[Any] = "auto",
    *,
    calibration: Sequence[str] = (),
    **options: Any,
) -> T:
    """`sentences`, a `SentenceTransformer`, with its transformer model transformed in its place.

    `texts` are a batch like those of the service: the passes are judged and timed on it.
    `calibration` are further texts from which static int8 learns ranges; `passes` and `options` are
    those of `fxopt.transform`. Pooling and normalization stay as they are.

    Raises `ModelError` for an object that holds no transformer model, or that goes on answering by
    the original; `InputError` for no texts; and what `transform` raises. `sentences` is as it was
    then.
    """
    held: Any = sentences
    _check_texts("texts", texts)
    owner = held[0] if isinstance(held, nn.Sequential) and len(held) else held
    names = ("model", "auto_model")  # the latter alone before sentence-transformers 6
    name = next((one for one in names if isinstance(getattr(owner, one, None), nn.Module)), None)
    if name is None:
        raise ModelError(
            f"{type(held).__name__} holds no transformer model as its first module: give a "
            "SentenceTransformer of a transformers model, or transform its module yourself"
        )

    def call(given: Any) -> object:
        return held.encode(list(given))

    _replace(owner, name, call, texts, calibration, passes, options)
    return sentences


def optimize_pipeline(
    pipeline: T,
    inputs: Any,
    passes: str | Iterable[Any] = "auto",
    *,
    calibration: Sequence[Any] = (),
    **options: Any,
) -> T:
    """`pipeline`, of `transformers.pipeline`, with its model transformed in its place.

    `inputs` is a call like those of the service (several of a list in one batch, so that the batch
    size stays open), `calibration` a list of further ones; `passes` and `options` are those of
    `fxopt.transform`. Of a pipeline that writes text the prompts are the example, and of one that
    transcribes the sound.

    Raises `ModelError` for what is no pipeline with a torch model, or generates with a model that
    isn't read step by step, and what `transform` raises. `pipeline` is as it was then.
    """
    held: Any = pipeline
    model = getattr(held, "model", None)
    if not isinstance(model, nn.Module) or not callable(held):
        raise ModelError(f"{type(held).__name__} is no transformers pipeline with a torch model")
    if getattr(held, "_pipeline_calls_generate", False) or generates(model):
        options = {"generation": True, **options}

    def call(given: Any) -> object:
        # One batch of them, so that the batch size stays open; a pipeline takes one by one else.
        several = isinstance(given, list) and len(given) > 1
        return held(given, batch_size=len(given)) if several else held(given)

    _replace(held, "model", call, inputs, calibration, passes, options)
    return pipeline


def _check_texts(name: str, texts: object) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
        raise InputError(f"{name} must be a list of texts with at least one, not {texts!r:.60}")


def _replace(
    owner: Any,
    name: str,
    call: Callable[[Any], object],
    inputs: Any,
    calibration: Sequence[Any],
    passes: str | Iterable[Any],
    options: Mapping[str, Any],
) -> None:
    """Transform `owner.name` on what it gets when `call` is given `inputs`, and put it there."""
    model: nn.Module = getattr(owner, name)
    listener = _listener(model, options)
    example = _recorded(listener, call, [inputs])
    if not example:
        raise ModelError(
            f"{type(model).__name__} wasn't called by {type(owner).__name__}: its inputs are "
            "unknown. Transform it yourself, with example_inputs."
        )
    batches = _recorded(listener, call, [list(calibration)]) if calibration else None
    if options.get("generation"):
        example = [_source(example[0])]
        batches = [_source(one) for one in batches if _is_prompt(one)] if batches else None
    optimized = transform(model, passes, example_inputs=example[0], calibration=batches, **options)
    setattr(owner, name, optimized)
    if not _recorded(optimized, call, [inputs]):
        setattr(owner, name, model)
        raise ModelError(
            f"{type(owner).__name__} goes on answering by the original {type(model).__name__} "
            f"after {name} was set: put the result of fxopt.transform in its place yourself"
        )


def _listener(model: Any, options: Mapping[str, Any]) -> Any:
    """What is called with the whole source: of an encoder-decoder that generates, its encoder."""
    config = getattr(model, "config", None)
    both = options.get("generation") and getattr(config, "is_encoder_decoder", False)
    return model.get_encoder() if both else model


def _is_prompt(call: Mapping[str, Any]) -> bool:
    """Whether a call reads more than the one token that was written last."""
    return bool("input_ids" not in call or call["input_ids"].shape[1] > 1)


def _source(call: Mapping[str, Any]) -> dict[str, Any]:
    """What a call reads or hears, without what `generate` adds to it."""
    names = ("input_ids", "input_features", "attention_mask")
    return {name: call[name] for name in names if name in call}


def _recorded(
    model: nn.Module, call: Callable[[Any], object], given: Iterable[Any]
) -> list[dict[str, Any]]:
    """What `model` is called with, by argument name, while `call` runs on each of `given`."""
    found: list[dict[str, Any]] = []
    inner, replaced = model.forward, model.__dict__.get("forward")
    signature = forward_signature(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        found.append(bind(signature, args, kwargs))
        return inner(*args, **kwargs)

    # Not a hook: sentence-transformers calls `forward` itself, past all hooks.
    model.__dict__["forward"] = forward
    try:
        for one in given:
            call(one)
    finally:
        if replaced is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = replaced
    return found
