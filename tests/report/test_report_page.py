import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from fxopt.program import Refusal
from fxopt.report import GraphPicture, PictureNode, Report
from fxopt.timing import Latency

_VOID = {"meta", "path", "rect", "br"}


class Page(HTMLParser):
    """Tags and text of a page; notes every tag that is opened and never closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.content = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _VOID or (tag == "path" and not self.get_starttag_text().endswith("/>")):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.content += data


def test_is_one_well_formed_page_that_fetches_nothing(report):
    html = report.to_html()
    page = Page(html)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not {"src", "href", "srcset", "xlink:href"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?:|url\(|@import|//[a-z]", html)
    assert "default-src 'none'" in html


def test_a_steps_details_are_shown_as_they_are(report):
    html = report.to_html()
    assert "\n".join(report.steps[2].details) in Page(html).content
    assert "<int8>" not in html
    assert "<pre>layer                     alone     kept\nencoder.layer.0.dense" in html


def test_hostile_names_are_text(report):
    evil = "</title><script>alert('x')</script><img src=x onerror=alert(1)> \" ' &"
    node = PictureNode("n", evil, f"{evil}.a", evil, (), weights=(evil,), source=evil)
    other = replace(node, name="m", inputs=("n",))
    shown = GraphPicture(evil, (node, other), {"": evil, evil: evil})
    step = replace(
        report.steps[0],
        name=evil,
        spec=evil,
        fired={evil: 1},
        refused=(Refusal(evil, evil),),
        claim=evil,
        measured=evil,
        warnings=(evil,),
        graph=evil,
    )
    html = Report(
        evil,
        1.0,
        (step,),
        end_to_end=evil,
        notes=(evil,),
        fingerprint={evil: evil},
        picture_before=shown,
        picture_after=shown,
    ).to_html()
    page = Page(html)
    assert page.open == []
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "onerror" not in {name for name, _ in page.attributes}
    assert "<script>alert('x')</script>" in page.content


def test_says_what_the_text_says(report):
    content = Page(report.to_html()).content
    for part in (
        "2.31x as fast",
        "438 MB → 181 MB",
        "drop_no_op_cast 12, fold_constant 2",
        "weight is tied to the embedding: cls.predictions.decoder (linear_73), lm_head (linear_74)",
        "4 × slower when fused here (M = 8, K = 384: 0.9x) (figures vary)",
        "Lower broke its claim.",
        "kernel fxopt::int8_linear of node linear_3 isn't in the generated code",
        "2 of 4claims measured and held",
        "the model was captured in eval mode",
        "torch 2.11.0",
        "%linear_0 = aten.linear(%x)",
    ):
        assert part in content, part


def test_slower_is_an_alarm(report):
    slower = replace(report, latency_after=Latency(160.0, 150.0, 170.0, 10))
    assert "The transformed model is slower than the original" in slower.to_html()
    assert "slower than the original" not in report.to_html()


@pytest.mark.parametrize("field", ["latency_after", "memory_before", "picture_after", "end_to_end"])
def test_anything_may_be_missing(report, field):
    assert Page(replace(report, **{field: None}).to_html()).open == []


def test_a_report_of_nothing():
    content = Page(Report("Tiny", 1.0, ()).to_html()).content
    assert "captured as it is, no passes" in content
    assert "not measured" in content


def test_equal_layers_are_drawn_once_and_rewritten_ones_are_marked(report):
    html = report.to_html()
    before, after = re.findall(r"<svg.*?</svg>", html, re.S)
    assert "encoder.layer.0 to 11 (Layer) × 12" in before
    assert "0 to 3 (Layer) × 4" in after
    assert "4 to 11 (Layer) × 8" in after
    assert before.count('class="op heavy changed"') == 0
    assert after.count('class="op heavy changed"') == 1
    assert "reads encoder.layer.0.dense.weight: float32[64, 64]" in after
