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
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
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
_IN_ORDER = (MANIFEST, GRAPH, TENSORS, REPORT)
_FILES = frozenset(_IN_ORDER)
_PARTIAL = ".fxopt-partial-"
_OF_FILE_SYSTEMS = frozenset({"lost+found", ".DS_Store"})
_LARGEST_MANIFEST = 1 << 16
_LARGEST_TEXT = 1 << 28
_FREE_BYTES = 48 << 20
_BYTES_A_VALUE = 100


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A new empty folder, whose files become those of `folder` when the block ends without error.

    A `folder` that doesn't exist appears complete or not at all. One that does, be it a link, a
    mount point or the working directory, stays and gets the files, in the place of those of the
    program that it held, which are put back where that fails. Raises `SaveError`, before the block
    is entered, where `folder` can't be written or holds anything but a saved program.
    """
    place = Path(os.path.realpath(folder))
    partial, made = _partial(folder, place)
    try:
        yield partial
        _write_manifest(partial)
        _refuse_foreign(folder, place)
        if place.exists():
            _replace_files(place, partial)
        else:
            partial.rename(place)
        made.clear()
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(made)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, after every file was found to be what was saved."""
    if not folder.is_dir():
        raise SaveError(f"there is no folder {folder}; give the folder that opt.save() wrote")
    if not (folder / MANIFEST).is_file():
        left = next((path.name for path in folder.glob(f"{_PARTIAL}*")), None)
        hint = f"; a save was interrupted, and what it had moved is in {left}" if left else ""
        raise SaveError(f"{folder} holds no saved program: it has no {MANIFEST}{hint}")
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
    """The JSON document at `path`, of at most `largest` bytes; else `SaveError`.

    It is refused, too, if its values would take much more memory than the files of its folder.
    """
    try:
        if path.stat().st_size > largest:
            raise SaveError(f"{path} has {path.stat().st_size} bytes; at most {largest} are read")
        content = path.read_bytes()
        _check_memory(path, content)
        return json.loads(content)
    except OSError as error:
        raise SaveError(f"{path} can't be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise SaveError(f"{path} is damaged: {type(error).__name__}: {error!s:.200}") from error


def allowance(folder: Path) -> int:
    """The bytes that may be taken for what the files of `folder` hold."""
    return _FREE_BYTES + sum(path.stat().st_size for path in folder.iterdir())


def _check_memory(path: Path, content: bytes) -> None:
    values = sum(content.count(mark) for mark in (b",", b":", b"[", b"{"))
    needed = values * _BYTES_A_VALUE + len(content) * (1 if content.isascii() else 8)
    if needed > allowance(path.parent):
        raise SaveError(
            f"{path} holds about {values} values, which take more memory than its folder's files "
            "allow; only a damaged or hostile folder holds as many"
        )


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


def _partial(folder: Path, place: Path) -> tuple[Path, list[Path]]:
    """A new empty folder in `place`, or beside it where there is none, and the parents made for it.

    Its name is short, whatever the length of the folder's own.
    """
    try:
        _refuse_foreign(folder, place)
        around = place if place.exists() else place.parent
        made = [path for path in (around, *around.parents) if not path.exists()]
        partial = around / f"{_PARTIAL}{uuid.uuid4().hex[:12]}"
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        partial.mkdir(parents=True)
        return partial, made
    except OSError as error:
        _remove_empty(made)
        raise _unwritable(folder, error) from error


def _replace_files(place: Path, partial: Path) -> None:
    """Move the files of `partial` to `place`, the manifest last; on failure, all is as it was."""
    old = partial / "old"
    old.mkdir()
    moved: list[tuple[Path, Path]] = []
    pairs = [(place / name, old / name) for name in _IN_ORDER if (place / name).exists()]
    pairs += [(partial / name, place / name) for name in reversed(_IN_ORDER)]
    try:
        for source, target in pairs:
            if source.exists():
                source.rename(target)
                moved.append((source, target))
    except OSError:
        for source, target in reversed(moved):
            target.rename(source)
        raise


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _unwritable(folder: Path, error: OSError) -> SaveError:
    reason = error.strerror or str(error)
    return SaveError(f"{folder} can't be written: {reason}. Give a folder that can be.")


def _refuse_foreign(folder: Path, place: Path) -> None:
    if not place.exists():
        return
    if not place.is_dir():
        raise SaveError(f"{folder} exists and is no folder; give another name")
    names = {path.name for path in place.iterdir() if not path.name.startswith(_PARTIAL)}
    names -= _OF_FILE_SYSTEMS
    if names and (MANIFEST not in names or not names <= _FILES):
        others = sorted(names - _FILES) or sorted(names)
        raise SaveError(
            f"{folder} exists and holds something other than a saved program "
            f"({', '.join(others[:3])}); it is not overwritten. Give a new or empty folder."
        )
