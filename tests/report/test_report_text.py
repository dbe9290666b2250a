from dataclasses import replace

import pytest

from fxopt.program import Refusal
from fxopt.rendering.units import duration, size, span
from fxopt.report import Report
from fxopt.timing import Latency


def test_golden(report, snapshot):
    assert str(report) == snapshot


def test_golden_of_a_report_of_nothing(snapshot):
    assert str(Report("Tiny", 12.3, ())) == snapshot


def test_fits_a_terminal_whatever_the_names(report):
    long = "a_very_long_module_name_" * 8
    step = replace(
        report.steps[1],
        name=long,
        spec=f"Pass({long!r})",
        refused=(Refusal(long, long), Refusal("no", long)),
    )
    for shown in (report, replace(report, model="Tiny", steps=(step,), notes=(long,))):
        assert max(len(line) for line in str(shown).splitlines()) <= 100


def test_a_pass_that_fired_nowhere_says_so_and_why(report):
    text = str(replace(report, steps=report.steps[1:2]))
    assert "nowhere; every candidate was refused, see the reasons" in text
    idle = replace(report.steps[1], refused=())
    assert "nowhere; the graph holds nothing that this pass rewrites" in str(
        replace(report, steps=(idle,))
    )


def test_a_pass_that_changes_without_counting_is_not_called_idle(report):
    step = replace(report.steps[3], changed=("linear_0",))
    assert "the pass changed the graph without counting by rule" in str(
        replace(report, steps=(step,))
    )


def test_slower_is_flagged_and_as_fast_is_not(report):
    slower = replace(report, latency_after=Latency(160.0, 150.0, 170.0, 10))
    assert "WARNING" in str(slower)
    assert "slower than the original on this machine" in str(slower)
    assert "latency      1.08x as slow: 148 ms (140 to 171 in 10 runs) -> 160 ms" in str(slower)
    assert "slower than the original" not in str(report)
    assert "slower than the original" not in str(replace(report, latency_after=None))


def test_times_from_a_crowded_machine_are_doubted(report):
    def shown(load):
        return " ".join(str(replace(report, fingerprint={"load": load, "cores": 2})).split())

    assert "other work ran on this machine (load 5.4 on 2 cores): trust ratios" in shown(5.4)
    assert "other work" not in shown(2.1)
    assert "other work" not in shown(None)
    assert "other work" not in str(Report("Tiny", 1.0, (), fingerprint={"load": 9.0, "cores": 2}))


def test_what_was_not_measured_is_said(report):
    text = str(replace(report, latency_before=None, latency_after=None, memory_before=None))
    assert "latency      not measured" in text
    assert "peak memory  not measurable here -> 31.0 MB" in text


def test_details_keep_their_columns_and_further_ones_are_counted(report):
    rows = tuple(f"layer.{number:<10} {number:5.1f} dB" for number in range(30))
    text = str(replace(report, steps=(replace(report.steps[0], details=rows),)))
    assert f"   planned      {rows[0]}\n                {rows[1]}\n" in text
    assert rows[23] in text
    assert rows[24] not in text
    assert "6 further lines, listed in the JSON and HTML" in text


def test_further_reasons_are_counted_not_dropped(report):
    reasons = [chr(ord("a") + number) * 3 for number in range(12)]
    step = replace(report.steps[0], refused=tuple(Refusal(why, "node") for why in reasons))
    text = str(replace(report, steps=(step,)))
    assert "1 x hhh (node)" in text
    assert "iii" not in text
    assert "4 x 4 further reasons, listed in the JSON and HTML" in text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (437_935_104, "438 MB"),
        (1_240_000_000, "1.24 GB"),
        (5_600_000_000_000, "5.60 TB"),
        (-31_000_000, "-31.0 MB"),
    ],
)
def test_size(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0.0123, "0.01 ms"),
        (9.996, "10.0 ms"),
        (41.23, "41.2 ms"),
        (999.6, "1.00 s"),
        (21034.0, "21.0 s"),
    ],
)
def test_duration(milliseconds, text):
    assert duration(milliseconds) == text


def test_duration_in_the_unit_of_another():
    assert duration(980.0, like=1020.0) == "0.98"
    assert duration(1100.0, like=900.0) == "1100"


def test_span():
    assert span("1 MB", "2 MB") == "1 MB -> 2 MB"
    assert span("1 MB", "1 MB") == "1 MB"
