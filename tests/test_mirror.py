"""The tests mirror the rooms: who opens a long file finds its tests by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "fxopt"
LONG = 200
"""Lines from which on a file has tests of its own."""

ELSEWHERE = {
    "analyses/channel_scaling.py": "passes/quantization/test_smooth_quant.py",
    "analyses/dead_channels.py": "passes/pruning/test_fold_pruned.py",
    "capture/dialect.py": "capture/test_capture.py",
    "comparison/plots.py": "comparison/test_page.py",
    "export/graph.py": "export/test_to_onnx.py",
    "guards.py": "capture/test_size_guards.py",
    "lower/compilation.py": "lower/test_lower.py",
    "observation/gram.py": "weights/test_reconstruction.py",
    "passes/kernel_selection/prepack.py": "passes/kernel_selection/test_kernel_passes.py",
    "passes/kernel_selection/select_kernels.py": "passes/kernel_selection/test_kernel_passes.py",
    "passes/mixed_precision/autocast_planning.py": "passes/mixed_precision/test_autocast.py",
    "passes/pruning/cut_channels.py": "passes/pruning/test_prune_channels.py",
    "passes/quantization/quantize_linear.py": "passes/quantization/test_int8_linear.py",
    "passes/quantization/smoothing_rule.py": "passes/quantization/test_smooth_quant.py",
    "program.py": "rewriting/test_driver.py",
    "report/graph_picture/rows.py": "report/graph_picture/test_picture.py",
    "report/page.py": "report/test_report_page.py",
    "rewriting/option_types.py": "test_options.py",
    "saving/call_types.py": "saving/test_hostile.py",
    "saving/folder.py": "saving/test_saving.py",
    "saving/trees.py": "saving/test_saving.py",
    "train/run.py": "train/test_distill.py",
}
"""Long files whose tests bear another name, and where most of them are. No file is added here."""


def own_tests(name: str) -> list[Path]:
    """The files of tests that a file of the package may call its own: its, or its folder's."""
    path = Path(name)
    beside = TESTS / path.parent / f"test_{path.stem}.py"
    folder = TESTS / path.parent.parent / f"test_{path.parent.name}.py"
    return [found for found in (beside, folder) if found.exists()]


def long_files(package: Path) -> list[str]:
    return sorted(
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if len(path.read_text(encoding="utf-8").splitlines()) > LONG
    )


def without_tests(package: Path) -> list[str]:
    return [name for name in long_files(package) if not own_tests(name) and name not in ELSEWHERE]


def test_each_long_file_has_tests_of_its_own() -> None:
    assert without_tests(PACKAGE) == []


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_exception_is_still_one(name: str) -> None:
    assert name in long_files(PACKAGE), f"{name} is long no more: take it off the list"
    assert not own_tests(name), f"{name} has tests of its own by now: take it off the list"
    assert (TESTS / ELSEWHERE[name]).exists()


def test_a_long_file_without_tests_is_found(tmp_path: Path) -> None:
    (tmp_path / "wellformed").mkdir()
    for name, lines in (("new.py", LONG + 1), ("short.py", LONG), ("wellformed/new.py", LONG + 1)):
        (tmp_path / name).write_text("\n" * lines)
    assert without_tests(tmp_path) == ["new.py"]
