"""Names of tensors in generated code.

torch.fx writes `self.head.weight` for the tensor `head.weight`. A model's names are any text
without dots: keywords (`class`), other spellings of one identifier (Python reads a ligature as its
letters), quotes and line breaks. Those are written as `getattr(self, "...")`, with what could end
the text escaped, so that a name stays a name whatever it holds.
"""

from __future__ import annotations

import keyword

from torch import fx


class _Part(str):
    """One part of a dotted name, as torch.fx's printer of attributes asks and writes it."""

    def isidentifier(self) -> bool:
        return self.isascii() and super().isidentifier() and not keyword.iskeyword(self)

    def __format__(self, spec: str) -> str:
        return self.encode("unicode_escape").decode("ascii").replace('"', '\\"')


class _Name(str):
    """A dotted name whose parts are `_Part`s."""

    def split(self, *args: object, **kwargs: object) -> list[str]:
        return [_Part(part) for part in str(self).split(".")]


def quote_names(graph: fx.Graph) -> None:
    """Let the code that `graph` generates fetch every tensor by its name, whatever that holds."""
    for node in graph.find_nodes(op="get_attr"):
        node.target = _Name(node.target)
