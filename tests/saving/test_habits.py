"""Saving as people call it: into the working directory, a link, a long name; by pickle."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.errors import NotCapturedError, SaveError

X = torch.randn(3, 4)


class Spaced(nn.Module):
    """A module whose name is no identifier."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"my part": nn.Linear(4, 4), "größe-2": nn.Linear(4, 2)})

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["größe-2"](self.parts["my part"](x).relu())


@pytest.fixture(scope="module")
def opt() -> fxopt.Optimized:
    torch.manual_seed(0)
    return fxopt.transform(Spaced().eval(), "canonicalize", example_inputs=(X,))


@pytest.fixture(scope="module")
def trained() -> fxopt.Optimized:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    return fxopt.transform(model, "canonicalize", example_inputs=(X,), mode="train")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_saved(opt: fxopt.Optimized, folder: Path) -> None:
    assert torch.equal(fxopt.load(folder)(X), opt(X))
    assert all(not name.startswith(".") for name in names_in(folder))


def test_the_working_directory(
    opt: fxopt.Optimized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        opt.save(".")
        assert_saved(opt, Path())
    assert Path.cwd() == tmp_path, "the directory is the one that the process stands in"


def test_an_existing_folder_stays_the_same_one(opt: fxopt.Optimized, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "lost+found").mkdir()
    before = volume.stat().st_ino
    for _ in range(2):
        opt.save(volume)
        assert torch.equal(fxopt.load(volume)(X), opt(X))
    assert volume.stat().st_ino == before, "a mount point can't be renamed over"


def test_a_linked_folder_is_followed(opt: fxopt.Optimized, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "new").symlink_to(tmp_path / "not yet")
    for name, real in (("link", "real"), ("new", "not yet")):
        opt.save(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert_saved(opt, tmp_path / real)


@pytest.mark.parametrize("length", [250, 255])
def test_long_names(opt: fxopt.Optimized, tmp_path: Path, length: int) -> None:
    opt.save(tmp_path / ("n" * length))
    assert_saved(opt, tmp_path / ("n" * length))


@pytest.mark.parametrize(
    ("folder", "text"),
    [
        ("n" * 256, "File name too long"),
        ("file/below", "Not a directory"),
        ("file", "is no folder"),
    ],
)
def test_what_can_not_be_written_is_found_before_the_work(
    opt: fxopt.Optimized,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    text: str,
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("fxopt.saving.saving.write_tensors", pytest.fail)
    with pytest.raises(SaveError, match=text):
        opt.save(tmp_path / folder)
    assert names_in(tmp_path) == ["file"]


def test_a_failure_while_files_move_puts_the_old_ones_back(
    opt: fxopt.Optimized, trained: fxopt.Optimized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt.save(tmp_path / "saved")
    rename = Path.rename

    def failing(source: Path, target: Path) -> Path:
        if source.name == "graph.json" and source.parent.name.startswith(".fxopt-partial-"):
            raise OSError(28, "No space left on device")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(SaveError, match="No space left on device"):
        trained.save(tmp_path / "saved")
    assert_saved(opt, tmp_path / "saved")


def test_what_load_would_refuse_is_not_saved(
    opt: fxopt.Optimized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt.save(tmp_path / "saved")

    def refused(*args: Any) -> None:
        raise SaveError("the saved graph can't be typed")

    monkeypatch.setattr("fxopt.saving.saving.decode_nodes", refused)
    with pytest.raises(SaveError, match="nothing was saved, since load would refuse it"):
        opt.save(tmp_path / "saved")
    monkeypatch.undo()
    assert_saved(opt, tmp_path / "saved")


def test_an_interrupted_save_is_named(opt: fxopt.Optimized, tmp_path: Path) -> None:
    (tmp_path / ".fxopt-partial-0").mkdir()
    with pytest.raises(SaveError, match="a save was interrupted, and what it had moved is in"):
        fxopt.load(tmp_path)


def pickled(opt: fxopt.Optimized) -> Any:
    return pickle.loads(pickle.dumps(opt))


def saved_by_torch(opt: fxopt.Optimized) -> Any:
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [pickled, saved_by_torch, copy.copy, copy.deepcopy])
def test_pickles(opt: fxopt.Optimized, trained: fxopt.Optimized, through: Any) -> None:
    twin = through(opt)
    assert type(twin).__name__ == "OptimizedSpaced"
    assert torch.equal(twin(X), opt(X))
    assert str(twin.report) == str(opt.report)
    twin = through(trained.eval())
    assert torch.equal(twin(X), trained(X))
    assert not twin.training
    assert twin.train()(X).requires_grad, "both modes are there"


def test_a_pickle_of_code_is_refused_where_weights_alone_are_read(opt: fxopt.Optimized) -> None:
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(file)


def test_a_module_without_a_graph_has_no_pickle() -> None:
    with pytest.raises(NotCapturedError, match="Call the module once"):
        pickle.dumps(fxopt.transform(nn.Linear(4, 4), "canonicalize"))


def test_a_config_of_no_registered_class_is_left_out(tmp_path: Path) -> None:
    from transformers import PretrainedConfig

    class Own(PretrainedConfig):
        model_type = "my own"

    model = nn.Linear(4, 4).eval()
    model.config = Own()  # type: ignore[assignment]
    opt = fxopt.transform(model, "canonicalize", example_inputs=(X,))
    opt.save(tmp_path / "saved")
    assert torch.equal(fxopt.load(tmp_path / "saved")(X), opt(X))
