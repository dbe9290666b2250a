"""Values that are written as text, as JSON or as a page: the suffix of a file's name says how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from typing_extensions import Self

from fxopt.errors import SaveError
from fxopt.rendering import json_document


class Document:
    """A dataclass that is written as JSON and read back. `SCHEMA` names it; its last part is what
    messages call it."""

    SCHEMA: ClassVar[str]

    def to_json(self) -> str:
        """The value as JSON with a schema version; `from_json` reads it back."""
        return json_document.dump(self, self.SCHEMA)

    @classmethod
    def from_json(cls, content: str) -> Self:
        """The value that `to_json` wrote; raises `SaveError` where it is damaged or newer."""
        return json_document.load(content, cls, cls.SCHEMA)


class Saved(Document, ABC):
    """A document that is written to a file: `str` gives its text, `PAGE` says what its page
    shows."""

    PAGE: ClassVar[str]

    @abstractmethod
    def to_html(self) -> str:
        """The value as one self-contained page without scripts."""

    def save(self, path: str | Path) -> None:
        """Write the value; the suffix says how: .html, .json or .txt. Raises `SaveError`."""
        path = Path(path)
        noun = self.SCHEMA.rpartition(".")[2]
        writers = {".html": self.to_html, ".json": self.to_json, ".txt": self.__str__}
        write = writers.get(path.suffix.lower())
        if write is None:
            raise SaveError(
                f"can't tell from the name {path.name!r} how to write the {noun}: end it in "
                f".html ({self.PAGE}), .json (for programs) or .txt (plain text)"
            )
        content = write().rstrip("\n") + "\n"
        try:
            path.write_text(content, encoding="utf-8")
        except OSError as error:
            raise SaveError(
                f"can't write the {noun} to {path}: {error.strerror}. Give a file in a folder that "
                "exists and can be written."
            ) from error
