"""The store: hits, another machine, damage, and two processes that write at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.timing import timing_cache
from fxopt.timing.timing_cache import TimingStore

ANSWER = {"ms": 1.5}


def file_of(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_an_answer_outlives_the_store(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    store = TimingStore(folder)
    assert store.get("q") is None
    store.put("q", ANSWER)
    assert store.get("q") == TimingStore(folder).get("q") == ANSWER
    assert TimingStore(folder).get("another") is None
    assert file_of(folder).suffix == ".json", "a draft was left behind"


def test_what_is_not_to_be_kept_stays_in_memory(tmp_path: Path) -> None:
    for store in (TimingStore(None), TimingStore(tmp_path)):
        store.put("q", ANSWER, keep=False)
        assert store.get("q") == ANSWER
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"cpu": "another"}, {"torch": "9.0"}, {"gpu": "H100"}])
def test_another_machine_has_other_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    store = TimingStore(tmp_path)
    store.put("q", ANSWER)
    here = timing_cache.machine()
    monkeypatch.setattr(timing_cache, "machine", lambda: {**here, **change})
    assert store.get("q") is None
    assert TimingStore(tmp_path).get("q") is None


def test_the_number_of_threads_belongs_to_the_machine(tmp_path: Path) -> None:
    store = TimingStore(tmp_path)
    store.put("q", ANSWER)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert timing_cache.machine()["threads"] == threads + 1
        assert store.get("q") is None
    finally:
        torch.set_num_threads(threads)
    assert store.get("q") == ANSWER


def test_the_load_of_the_moment_does_not() -> None:
    assert set(timing_cache.machine()) == {"cpu", "cores", "threads", "isa", "gpu", "os", "torch"}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '{"machine": 1}', "\udcff", '{"answer": {"ms": 1}}', "[" * 5000],
)
def test_damage_counts_as_nothing_and_is_overwritten(tmp_path: Path, text: str) -> None:
    TimingStore(tmp_path).put("q", ANSWER)
    file_of(tmp_path).write_bytes(text.encode("utf-8", "surrogatepass"))
    store = TimingStore(tmp_path)
    assert store.get("q") is None
    store.put("q", ANSWER)
    assert TimingStore(tmp_path).get("q") == ANSWER


def test_an_answer_that_is_no_answer_to_the_question_is_ignored(tmp_path: Path) -> None:
    TimingStore(tmp_path).put("q", ANSWER)
    path = file_of(tmp_path)
    whole = json.loads(path.read_text())
    for part, wrong in (("question", "p"), ("machine", {}), ("answer", [1])):
        path.write_text(json.dumps({**whole, part: wrong}))
        assert TimingStore(tmp_path).get("q") is None
    path.write_text(json.dumps(whole))
    assert TimingStore(tmp_path).get("q") == ANSWER


def test_where_nothing_can_be_written_memory_does(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    store = TimingStore(blocked / "folder")
    store.put("q", ANSWER)
    assert store.get("q") == ANSWER


def test_a_write_that_fails_leaves_the_answer_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TimingStore(tmp_path).put("q", ANSWER)

    def fail(draft: Path, target: Path) -> None:
        assert json.loads(draft.read_text())["answer"] == {"ms": 9.0}, "the draft is whole by now"
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    TimingStore(tmp_path).put("q", {"ms": 9.0})
    assert TimingStore(tmp_path).get("q") == ANSWER
    assert file_of(tmp_path).suffix == ".json", "the draft was left behind"


_WRITER = """
import sys
from pathlib import Path
from fxopt.timing.timing_cache import TimingStore
folder, mine = Path(sys.argv[1]), sys.argv[2]
for count in range(100):
    TimingStore(folder).put("q", {"who": mine, "count": count, "long": "x" * 20000})
    seen = TimingStore(folder).get("q")
    assert seen is not None and len(seen["long"]) == 20000, (count, seen)
"""


def test_two_processes_write_at_once_and_read_whole_answers(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path), name],
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    errors = [writer.communicate(timeout=300)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], errors
    answer = TimingStore(tmp_path).get("q")
    assert answer is not None
    assert answer["count"] == 99
    assert file_of(tmp_path).suffix == ".json"
