"""The folder of a saved program: written at once or not at all, checked byte for byte when read.

manifest.json         format, versions of fxopt and torch, size and SHA-256 of the other files
graph.json            nodes, signature, state entries
tensors.safetensors   state and example tensors
report.json           the report, where there is one
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fxopt.errors import SaveError
from fxopt.saving.values import field

FORMAT = 1
MANIFEST, GRAPH, TENSORS, REPORT = (
    "manifest.json",
    "graph.json",
    "tensors.safetensors",
    "report.json",
)
_FILES = frozenset((MANIFEST, GRAPH, TENSORS, REPORT))
_LARGEST_MANIFEST = 1 << 16
_LARGEST_TEXT = 1 << 28


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A new empty folder beside `folder`, which takes its place when the block ends without error.

    Raises `SaveError` where `folder` exists and holds anything but a saved program.
    """
    _refuse_foreign(folder)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    old = partial.with_suffix(".old")
    try:
        partial.mkdir(parents=True)
        yield partial
        _write_manifest(partial)
        _refuse_foreign(folder)
        if folder.exists():
            folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    except OSError as error:
        raise SaveError(f"{folder} can't be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, after every file was found to be what was saved."""
    if not folder.is_dir():
        raise SaveError(f"there is no folder {folder}; give the folder that opt.save() wrote")
    if not (folder / MANIFEST).is_file():
        raise SaveError(f"{folder} holds no saved program: it has no {MANIFEST}")
    manifest = read_json(folder / MANIFEST, _LARGEST_MANIFEST)
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if type(version) is not int or version != FORMAT:
        raise SaveError(
            f"{folder} is of format {version!r:.40}, and this fxopt reads format {FORMAT}. Save it "
            "again with this version of fxopt."
        )
    files: dict[str, Any] = field(manifest, "files", dict)
    if not {GRAPH, TENSORS} <= set(files) <= _FILES - {MANIFEST}:
        raise SaveError(f"the manifest of {folder} lists the files {sorted(files)!r:.80}")
    for name, entry in files.items():
        _verify_file(folder / name, entry)
    if (folder / REPORT).exists() and REPORT not in files:
        raise SaveError(f"{folder / REPORT} isn't listed in the manifest; the folder is damaged")
    return {
        **manifest,
        "fxopt": field(manifest, "fxopt", str),
        "torch": field(manifest, "torch", str),
    }


def read_json(path: Path, largest: int = _LARGEST_TEXT) -> Any:
    """The JSON document at `path`, of at most `largest` bytes; else `SaveError`."""
    try:
        if path.stat().st_size > largest:
            raise SaveError(f"{path} has {path.stat().st_size} bytes; at most {largest} are read")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SaveError(f"{path} can't be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise SaveError(f"{path} is damaged: {type(error).__name__}: {error!s:.200}") from error


def write_json(path: Path, data: Any) -> None:
    """Write `data` to `path`, one node or entry a line, so that two can be compared."""
    lines = [f"{json.dumps(key)}: {_rows(value)}" for key, value in data.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _rows(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(json.dumps(v, allow_nan=False) for v in value) + "\n]"
    if isinstance(value, dict) and value:
        rows = [f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in value.items()]
        return "{\n" + ",\n".join(rows) + "\n}"
    return json.dumps(value, allow_nan=False)


def _write_manifest(folder: Path) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.iterdir())
    }
    versions = {"format": FORMAT, "fxopt": _own_version(), "torch": str(torch.__version__)}
    write_json(folder / MANIFEST, {**versions, "files": files})


def _own_version() -> str:
    try:
        return importlib.metadata.version("fxopt")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _verify_file(path: Path, entry: Any) -> None:
    size: int = field(entry, "bytes", int)
    digest: str = field(entry, "sha256", str)
    if not path.is_file():
        raise SaveError(f"{path} is missing; copy the whole folder")
    if path.stat().st_size != size:
        raise SaveError(
            f"{path} has {path.stat().st_size} bytes, and {size} were saved: truncated?"
        )
    if _digest(path) != digest:
        raise SaveError(
            f"{path} is damaged: its SHA-256 isn't the one that was saved. Copy the folder again, "
            "or save the program again."
        )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise SaveError(f"{path} can't be read: {error}") from error
    return digest.hexdigest()


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise SaveError(f"{folder} exists and is no folder; give another name")
    names = {path.name for path in folder.iterdir()}
    if names and (MANIFEST not in names or not names <= _FILES):
        others = sorted(names - _FILES) or sorted(names)
        raise SaveError(
            f"{folder} exists and holds something other than a saved program "
            f"({', '.join(others[:3])}); it is not overwritten. Give a new or empty folder."
        )
