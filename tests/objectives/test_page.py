"""Where objectives are listed: the README, docs/objectives.md, and fused_losses.objectives itself."""

import sys
from pathlib import Path

import pytest

import fused_losses as fl
from fused_losses import objectives

ROOT = Path(__file__).parents[2]
NAMES = [name for name in objectives.__all__ if name.endswith("Loss")]


@pytest.fixture
def page(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import objectives as written

    yield written
    sys.modules.pop("objectives", None)


def test_the_page_is_what_the_docstrings_say(page):
    assert page.page() == (ROOT / "docs" / "objectives.md").read_text(), "run benchmarks/objectives.py"


def test_each_curve_is_that_of_its_objective(page):
    """Cross-entropy pulls by 1 − p."""
    ((_, plain, call), *_) = page.CURVES["CrossEntropyLoss"]()
    assert (page.pull(plain, call) - (1 - page.P)).abs().max() < 1e-12
    for name in page.names():
        for label, objective, call in page.CURVES[name]():
            assert page.pull(objective, call).isfinite().all(), (name, label)


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_is_listed(name):
    assert name in fl.__all__ and f"`{name}`" in (ROOT / "README.md").read_text()
    lines = [line for line in objectives.__doc__.splitlines() if line.strip().startswith(f"{name} ")]
    assert len(lines) == 1, f"one line on {name} in the docstring of fused_losses.objectives"


@pytest.mark.parametrize("name", NAMES)
def test_every_docstring_says_when_to_take_it_what_it_costs_and_whence(name):
    text = getattr(fl, name).__doc__
    assert "Take it" in text, "when to take it, and when not"
    assert "GEMM" in text and (
        "Source:" in text or name in ("CrossEntropyLoss", "WeightedLoss", "SFTKLLoss", "ReverseKLLoss")
    )
