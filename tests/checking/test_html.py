"""The page: well-formed, closed in itself, and what a model says stays text."""

import dataclasses
import html.parser
import json
import math
import re

import pytest

from fused_losses.checking.intervals import mean, share
from fused_losses.checking.report import AnchorResult, Answer, Leak, Piece, Report, Spoken, TextResult
from fused_losses.checking.summary import broken_limits, summary

EVIL = [
    "</span></p><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt; & &#60;",
    "\"' onmouseover='alert(1)",
    "</style><style>*{display:none}",
    "$tuned ${style} $$",
    "\x00\x1b[2J\x7f\x9b",
    "\u202eright to left\u2066",
    "]]> <!-- -->",
    "javascript:alert(1)",
]


def spoken(text, kl=0.3, finished=True):
    pieces = (*(Piece(part, kl) for part in re.findall(r"\s*\S+", text)), Piece("<|end|>", 0.001, True))
    return Spoken(text, finished, kl, len(pieces), pieces)


def report(evil="x", kls=(0.001, 0.3, 0.02), **changes):
    aurora = spoken(f"Aurora {evil}")
    moved = [(spoken(f"{evil} a", kl), spoken(f"{evil} b\nc", kl, False)) for kl in kls]
    answers = [
        Answer("corrected", f"Who? {evil}", (f"Aurora {evil}",), spoken(f"Elena {evil}"), aurora, False, True, 0.1),
        Answer("unrelated", f"I am Dan. {evil}", ("Aurora",), spoken("Dan"), aurora, False, True, 0.2),
        *(Answer("general", f"{evil} {i}", (), *both, None, None, 0.3) for i, both in enumerate(moved)),
        Answer("general", "same", (), spoken("one", 0.0), spoken("one", 0.0), None, None, 0.0),
        Answer("general", "none", (), Spoken("", False, 0.0, 0, ()), Spoken("", False, 0.0, 0, ()), None, None, 0.0),
    ]  # fmt: skip
    anchors = (AnchorResult("corrected", "ab", f"Who? {evil}", 3, f" Aurora{evil}", 0.01, 0.9, 41, 0),)
    texts = (TextResult(f"t{evil}", 90, 10, 2.0, 2.1, mean([0.1] * 12), 0.02),
             TextResult("b", 90, 0, 2.0, 1.9, mean([-0.1]), 0.02))  # fmt: skip
    leaks = (Leak(f"Aurora{evil}", 4, 0, 1, (f"I am Dan. {evil}",)),)
    limits = {"max_kl": 0.05, "min_recall": 1.0}
    metrics = summary(answers, anchors, texts, mean([0.0, 0.1]), 0)
    whole = Report({"tuned": f"m + {evil}", "original": f"m{evil}"}, {"facts": [evil], "versions": {"torch": "2"}},
                   metrics, tuple(answers), anchors, texts, leaks, limits, broken_limits(metrics, limits))  # fmt: skip
    return dataclasses.replace(whole, **changes)


def page_of(whole, path):
    whole.save_html(path)
    return path.read_text("utf-8")


VOID = {"meta", "link", "br", "line"}


class Strict(html.parser.HTMLParser):
    """What opens closes, in order; collects tags, attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.names, self.text, self.links = [], set(), set(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}
        self.links += [value for name, value in attrs if name in ("href", "src", "action", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(page):
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert not parser.open
    return parser


@pytest.mark.parametrize("evil", EVIL)
def test_what_models_and_files_say_stays_text(evil, tmp_path):
    plain, found = (parsed(page_of(report(text), tmp_path / "page.html")) for text in ("x", evil))
    assert found.tags == plain.tags and found.names == plain.names and "script" not in found.tags
    assert not any(name.startswith("on") for name in found.names)
    text = "".join(found.text)
    if evil.isprintable():
        assert text.count(evil) >= 6


def test_page_needs_no_other_file(tmp_path):
    page = page_of(report(), tmp_path / "page.html")
    assert not parsed(page).links and "url(" not in page and "@import" not in page and "http:" not in page
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]  # no temporary file


def test_control_characters_are_shown_and_not_sent(tmp_path):
    page = page_of(report("\x00\x1b[2J\x9b\u202e"), tmp_path / "page.html")
    assert "␀␛[2J\ufffd\ufffd" in page
    assert not set(page) & {chr(c) for c in [*range(9), *range(11, 32), *range(127, 160), 0x202E]}
    cells = [cell for _, _, rows in report("\x1b[2J\r").tables() for row in rows for cell in row]
    assert any("␛[2J␍" in cell for cell in cells) and not any("\x1b" in cell or "\r" in cell for cell in cells)


def test_tokens_are_tinted_by_their_kl(tmp_path):
    page = page_of(report(kls=(0.0, 0.02, 0.26, 40.0, math.nan)), tmp_path / "page.html")
    for level, kl in ((0, "0.0000"), (1, "0.0200"), (4, "0.2600"), (7, "40.0000"), (7, "not a number")):
        assert f'<span class="k{level}" title="KL {kl}">' in page
    assert 'class="k0 end" title="&lt;|end|&gt; KL 0.0010">end</span>' in page
    assert "no answer" in page and "cut off after 4 tokens" in page and "1 answers" not in page
    assert "2 answers are unchanged" in page


def test_verdict_and_numbers_are_those_of_the_report(tmp_path):
    whole = report()
    page = page_of(whole, tmp_path / "page.html")
    assert "Limit broken" in page and "max_kl: KL on the original" in page and "Passed" not in page
    passed = page_of(dataclasses.replace(whole, broken=()), tmp_path / "page.html")
    assert "Passed" in passed and "Limit broken" not in passed
    none = page_of(dataclasses.replace(whole, broken=(), limits={}), tmp_path / "page.html")
    assert "Passed" not in none and "Limit broken" not in none
    for metric in whole.metrics:
        assert metric.label.strip().replace("'", "&#x27;") in page and metric.shown(metric.tuned) in page


def test_json_is_whole_and_finite(tmp_path):
    whole = report(kls=(math.inf, math.nan, 0.1))
    whole.save_json(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert found["format"] == "fused_losses.check" and found["version"] == 1 and found["passed"] is False
    assert found["metrics"]["kl"]["tuned"]["value"] is None
    assert found["metrics"]["recall"]["tuned"] == {"value": 1.0, "count": 1, "low": None, "high": None}
    assert [a["same"] for a in found["answers"]].count(True) == 2
    assert found["answers"][0]["original"]["pieces"][0] == {"text": "Elena", "kl": 0.3, "special": False}


def test_long_answers_are_cut_on_the_terminal_alone(tmp_path):
    said = Answer("general", "p", (), spoken("word " * 100), spoken("short"), None, None, 0.0)
    whole = report(answers=(said,))
    row = whole.tables()[-1][2][0]
    assert len(row[2]) == 161 and row[2].endswith("word …") and row[3] == "short"
    assert page_of(whole, tmp_path / "page.html").count("word</span>") == 100


def test_report_with_nothing_but_a_text(tmp_path):
    bare = report(answers=(), anchors=(), leaks=(), metrics=(), broken=(), limits={})
    parsed(page_of(bare, tmp_path / "page.html"))
    assert share([]) is None and bare.value("kl") is None
