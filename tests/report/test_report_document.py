import json
from dataclasses import replace

import pytest

from fxopt.errors import SaveError
from fxopt.report import Report


def test_round_trip(report):
    assert Report.from_json(report.to_json()) == report


def test_round_trip_of_a_report_of_nothing():
    bare = Report("Tiny", 1.0, ())
    assert Report.from_json(bare.to_json()) == bare


def test_schema_is_stable(report):
    data = json.loads(report.to_json())
    assert (data["schema"], data["version"]) == ("fxopt.report", 1)
    assert list(data) == [
        *("schema", "version", "model", "capture_ms", "steps", "end_to_end"),
        *("latency_before", "latency_after", "memory_before", "memory_after"),
        *("notes", "fingerprint", "picture_before", "picture_after"),
        *("domains", "most_programs"),
    ]
    assert list(data["steps"][0]) == [
        *("name", "spec", "fired", "refused", "reverted", "nodes_before", "nodes_after"),
        *("bytes_before", "bytes_after", "claim", "measured", "holds", "milliseconds"),
        *("warnings", "graph", "changed", "details"),
    ]


def test_a_report_of_before_details_were_kept_can_be_read(report):
    data = json.loads(report.to_json())
    for step in data["steps"]:
        del step["details"]
    assert all(step.details == () for step in Report.from_json(json.dumps(data)).steps)


def edited(report, **changes):
    return json.dumps({**json.loads(report.to_json()), **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"schema": "other"}, 'it has no "schema": "fxopt.report"'),
        ({"version": 2}, "schema version 2, and this fxopt reads version 1"),
        ({"extra": 1}, "report has unknown extra"),
        ({"model": 3}, "report.model holds 3, which is no str"),
        ({"steps": None}, "report.steps holds None"),
        ({"steps": [{"name": "A"}]}, r"report.steps\[0\] lacks bytes_after, bytes_before"),
        ({"notes": ["a", 1]}, r"report.notes\[1\] holds 1"),
        ({"capture_ms": True}, "report.capture_ms holds True"),
        ({"fingerprint": {"cpu": []}}, r"report.fingerprint.cpu holds \[\]"),
        ({"latency_after": "fast"}, "report.latency_after holds 'fast'"),
    ],
)
def test_damage_is_named(report, changes, text):
    with pytest.raises(SaveError, match=text):
        Report.from_json(edited(report, **changes))


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "not json"])
def test_no_json(content):
    with pytest.raises(SaveError, match="this is no report"):
        Report.from_json(content)


@pytest.mark.parametrize("content", ["[]", "3", '"report"', "null", "{}"])
def test_other_json(content):
    with pytest.raises(SaveError, match="this JSON is no report"):
        Report.from_json(content)


def test_a_missing_field_is_named(report):
    data = json.loads(report.to_json())
    del data["model"]
    with pytest.raises(SaveError, match="report lacks model"):
        Report.from_json(json.dumps(data))


def test_save_by_suffix(report, tmp_path):
    for name in ("r.json", "r.txt", "R.HTML"):
        report.save(tmp_path / name)
    assert Report.from_json((tmp_path / "r.json").read_text(encoding="utf-8")) == report
    assert (tmp_path / "r.txt").read_text(encoding="utf-8") == str(report) + "\n"
    assert (tmp_path / "R.HTML").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("name", ["report", "report.pdf", ".html"])
def test_other_suffix_names_the_three(report, tmp_path, name):
    with pytest.raises(SaveError, match=r"\.html .*, \.json .* or \.txt"):
        report.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(report, tmp_path):
    with pytest.raises(SaveError, match="No such file or directory"):
        report.save(tmp_path / "missing" / "report.txt")


def test_values_are_frozen_and_apart_from_the_caller(report):
    fired = {"rule": 1}
    step = replace(report.steps[0], fired=fired)
    fired["rule"] = 2
    assert step.firings == 1
    with pytest.raises(AttributeError):
        step.name = "other"
