"""What the pages say of `fused-losses bench` is what its results say."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pages(from_benchmarks):
    return from_benchmarks("bench_pages")


@pytest.mark.parametrize("name, text", [("README.md", "short"), ("docs/benchmarks.md", "page")])
def test_pages_are_those_of_the_results(pages, name, text):
    import json

    content = json.loads(pages.RESULTS.read_text())
    page = (ROOT / name).read_text()
    assert pages.filled(page, getattr(pages, text)(content), name, pages.BEGIN, pages.END) == page


@pytest.mark.parametrize("name, link", [("README.md", "docs/forgetting.md"), ("docs/README.md", "forgetting.md")])
def test_the_study_is_quoted_as_it_is(monkeypatch, name, link):
    import json

    monkeypatch.syspath_prepend(ROOT)
    study = importlib.import_module("benchmarks.forgetting.page")
    found = json.loads((ROOT / "benchmarks" / "results" / "forgetting.json").read_text())
    page = (ROOT / name).read_text()
    assert study.filled(page, study.short(study.Study(found["runs"]), link), name, study.BEGIN, study.END) == page


def test_a_page_without_marks_is_told(pages):
    with pytest.raises(SystemExit, match=r"x\.md has no <!-- bench"):
        pages.filled("# Title\n", "text", "x.md", pages.BEGIN, pages.END)


def test_leaders_are_named_with_what_they_lead_in(pages):
    def row(contestant, seconds):
        settings = {
            "distribution": "real", "hidden": 576, "vocabulary": 49152, "tokens": 2048, "dtype": "float32",
            "loss": "TALR", "device": "cpu", "seed": 0, "purpose": "decision", "contestant": contestant,
        }  # fmt: skip
        return {
            "settings": settings,
            "seconds": [seconds],
            "peak_mib": 10.0,
            "hidden_error": 1e-3,
            "weight_error": 1e-3,
        }

    ours = row("fused_losses, sparse", 1.0)
    (clear,) = pages.leaders({"a": ours, "b": row("TRL", 2.0)})
    assert clear == "In 1 of 1 cases nobody is ahead of ours in time, memory or error of gradients."
    (other,) = pages.leaders({"a": ours, "b": row("TRL", 0.5)})
    assert other.startswith("In 0 of 1 cases") and "Ahead of ours are TRL in time (TALR, float32, D = 576)" in other
