"""What the steps of a model are captured and judged on: text that it has written itself.

Random tokens behind an empty prefix are nothing that a language model meets, and its activations on
them are nothing that a quantized one has to keep. A model's own samples are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import InputError
from fxopt.generation.cache import PrefixCache, append
from fxopt.generation.prefix import (
    PREFIX,
    LayerShape,
    device_of,
    empty_cache,
    positions_of,
    prefix,
)

ROWS = 2
"""Rows of an example: one would be a size of its own."""
_PREFIX, _NEW = 6, 18
"""Slots before the example that reads many tokens, and its tokens."""
OWN_LENGTH = _PREFIX + _NEW
"""Tokens that a model writes itself."""
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_LIKELIEST = 20
"""The best tokens, of which one is drawn: among all are many that no text goes on with."""


def step_inputs(
    shapes: tuple[LayerShape, ...],
    ids: Tensor,
    seen: Tensor,
    cache: PrefixCache | None = None,
    keep: int = 2,
    source: Mapping[str, Any] = _NOTHING,
) -> dict[str, Any]:
    """The arguments with which a step reads `ids` [B, S] behind what `cache` holds.

    `seen` [B, P + S] is false at padding; positions count what is seen, as `generate` does. The
    logits asked for are those of the first `keep` slots. `source` are the arguments that tell a
    decoder of its source.
    """
    length = ids.shape[1]
    past_seen, sides = prefix(shapes, cache, seen[:, :-length])
    named = dict(zip(PREFIX, sides, strict=False))
    return {
        "input_ids": ids.contiguous(),
        "position_ids": positions_of(seen)[:, -length:].contiguous(),
        "keep": torch.arange(min(keep, length), device=ids.device),
        "seen": seen[:, -length:].contiguous(),
        "past_seen": past_seen.contiguous(),
        **{name: tuple(one.clone() for one in side) for name, side in named.items()},
        **source,
    }


class Reader:
    """Reads text with a step, any number of tokens at a time, and remembers it.

    `source` are the arguments that tell a decoder of its source.
    """

    def __init__(
        self, step: Any, shapes: tuple[LayerShape, ...], source: Mapping[str, Any] = _NOTHING
    ) -> None:
        self.step, self.shapes, self.source = step, shapes, source
        self.cache = empty_cache(shapes)
        self.seen: Tensor | None = None

    def read(self, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        """The logits [B, S, V] of all of `ids` [B, S]; `seen` [B, S] is false at padding."""
        new = torch.ones_like(ids, dtype=torch.bool) if seen is None else seen
        self.seen = new if self.seen is None else torch.cat([self.seen, new], 1)
        length = ids.shape[1]
        inputs = step_inputs(self.shapes, ids, self.seen, self.cache, length, self.source)
        with torch.no_grad():
            logits, keys, values = self.step(**inputs)
        append(self.cache, keys, values)
        return logits  # type: ignore[no-any-return]


def own_text(reader: Reader, first: Tensor, length: int = OWN_LENGTH) -> Tensor:
    """What the model of `reader` writes after the token `first` int64 [B, 1], the same each time.

    With that it is int64 [B, length].
    """
    generator = torch.Generator().manual_seed(0)
    text = [first]
    for _ in range(length - 1):
        logits = reader.read(text[-1])[:, -1].float().cpu()
        best = logits.topk(min(_LIKELIEST, logits.shape[-1]))
        drawn = torch.multinomial(best.values.softmax(-1), 1, generator=generator)
        text.append(best.indices.gather(1, drawn).to(first.device))
    return torch.cat(text, 1)


def first_tokens(model: nn.Module) -> Tensor:
    """The token int64 [2, 1] with which text of `model` begins."""
    return torch.full((ROWS, 1), _first_token(model), device=device_of(model))


def _first_token(model: nn.Module) -> int:
    config: Any = model.config
    for holder in (getattr(model, "generation_config", None), config):
        for name in ("bos_token_id", "decoder_start_token_id"):
            found = getattr(holder, name, None)
            if isinstance(found, int) and 0 <= found < config.get_text_config().vocab_size:
                return found
    return 0


def reading(
    reader: Reader, text: Tensor, seen: Tensor, prefix_length: int, keep: int = 2
) -> dict[str, Any]:
    """A step that reads the rest of `text` [B, T] behind its prefix; `seen` is false at padding.

    The `reader` has read nothing yet.
    """
    reader.read(text[:, :prefix_length], seen[:, :prefix_length])
    new = text[:, prefix_length:]
    return step_inputs(reader.shapes, new, seen, reader.cache, keep, reader.source)


def reading_many(reader: Reader, text: Tensor, seen: Tensor) -> dict[str, Any]:
    """A step that reads the later part of `text` [B, T] behind the rest; `seen` is its padding."""
    return reading(reader, text, seen, max(1, min(_PREFIX, text.shape[1] - 2)))


def reading_one(reader: Reader, text: Tensor, seen: Tensor) -> dict[str, Any]:
    """A step that reads the last token of each row of `text` [B, T] behind the others."""
    return reading(reader, text, seen, text.shape[1] - 1)


def reading_resized(
    step: Any, shapes: tuple[LayerShape, ...], text: Tensor, seen: Tensor
) -> tuple[dict[str, Any], ...]:
    """Steps of both kinds at other sizes: of one row of `text` [B, T], and of a row more, shorter.

    What they read is a part of the text, since a prefix that is cut or repeated is none.
    """
    rows, length = text.shape
    short = max(4, 2 * length // 3)
    one_row, shorter = (text[:1], seen[:1]), _part(text, seen, rows + 1, short)
    less = _part(text, seen, 1, max(3, length - 3))

    def reader() -> Reader:
        return Reader(step, shapes)

    return (
        reading(reader(), *one_row, max(1, length // 8), keep=length),
        reading(reader(), *shorter, short - short // 3),
        reading_one(reader(), *less),
        reading_one(reader(), *shorter),
    )


def _part(text: Tensor, seen: Tensor, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """So many rows, the first ones again, and tokens: the first, or behind padding the last."""
    order = torch.arange(rows, device=text.device) % len(text)
    kept = slice(length) if bool(seen.all()) else slice(-length, None)
    return text[order][:, kept], seen[order][:, kept]


@dataclass(frozen=True)
class StepBatches:
    """Calibration texts, ids with an attention mask each, as what steps are given."""

    shapes: tuple[LayerShape, ...]
    batches: Iterable[Any]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.batches:
            ids, seen = text_of(batch)
            yield step_inputs(self.shapes, ids, seen)


def text_of(given: Any) -> tuple[Tensor, Tensor]:
    """Ids int64 [B, T] and what of them is seen bool [B, T], of inputs that hold text.

    Raises `InputError` for anything else than ids and an attention mask.
    """
    named = given if isinstance(given, Mapping) else {"input_ids": given}
    ids = named.get("input_ids")
    if isinstance(ids, (tuple, list)) and len(ids) == 1:
        ids = ids[0]
    others = [name for name in named if name not in ("input_ids", "attention_mask")]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or others:
        raise InputError(
            "a model that generates is given text: input_ids [batch, length] and, where rows are "
            f"padded, attention_mask; not {', '.join(map(str, named)) or 'nothing'}"
            + (f" ({', '.join(others)} has no place)" if others else "")
            + ". With generation=False the graph answers single calls, with any arguments."
        )
    mask = named.get("attention_mask")
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return ids, seen
