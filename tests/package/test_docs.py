"""The documentation: its snippets run, its links lead somewhere, it has every name and message, the site builds."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_losses as fl
from fused_losses import anchors, checking, huggingface, training

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "fused_losses/README.md", "csrc/README.md")]
SITE = ("mkdocs", "material", "mkdocstrings_handlers.python")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


@pytest.fixture(scope="module")
def messages():
    """docs/site/messages.py, which needs the standard library alone."""
    spec = importlib.util.spec_from_file_location("messages_of_the_docs", DOCS / "site" / "messages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def page(messages):
    return messages.page(ROOT / "fused_losses")


# Snippets


def snippets():
    """Those that can be run as they are; others need a model or files of the reader's."""
    for path in PAGES:
        for code in re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.M | re.S):
            if "import torch\n" in code and "__main__" not in code:
                yield path.relative_to(ROOT).as_posix(), code


RUN = """
import json, sys
for name, code in json.loads(SNIPPETS):
    exec(compile(code, f"<snippet of {name}>", "exec"), {"__name__": "__main__"})
"""


def test_snippets_run(tmp_path):
    """In one process, as transformers takes seconds to import."""
    found = list(snippets())
    assert {"docs/README.md", "docs/own-loop.md", "docs/gradients.md", "docs/domain.md", "docs/distil.md",
            "docs/huggingface.md"} <= {name for name, _ in found}  # fmt: skip
    code = f"SNIPPETS = {json.dumps(found)!r}\n{RUN}"
    ignored = ("ignore:'pin_memory' argument:UserWarning", "ignore:`is_gradient_checkpointing`:FutureWarning")
    command = [sys.executable, *(word for kind in ("error", *ignored) for word in ("-W", kind)), "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]


# Links


def anchor(heading):
    """As GitHub and mkdocs make it of a heading, where they agree."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", [*PAGES, *OUTSIDE], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    text = FENCE.sub("", path.read_text())
    for target, _, place in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text)):
        if re.match(r"\w+:", target):
            continue
        there = path.parent / target if target else path
        if there.name == "messages.md":  # made when the site is built
            continue
        assert there.exists(), f"{target} is not there"
        if place:
            assert place in {anchor(h) for h in re.findall(r"^#+ (.*)$", there.read_text(), re.M)}, f"{target}#{place}"


def test_the_readme_has_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


# The reference


@pytest.mark.parametrize("module", [fl, anchors, checking, huggingface, training], ids=lambda module: module.__name__)
def test_the_reference_has_every_public_name(module):
    text = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    found = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", text, re.M)}
    public = getattr(module, "__all__", None) or {
        name for name, value in vars(module).items() if name[0] != "_" and hasattr(value, "__module__")
    }
    assert set(public) - found - {"METHODS", "PROMPTS", "annotations"} == set()


# Messages


def test_every_file_that_raises_has_a_place(messages, page):
    for message in messages.messages(ROOT / "fused_losses"):
        assert messages.area(message.file), f"{message.file}: give it a place in AREAS of docs/site/messages.py"
        assert f"- {messages.code(message.text)} " in page


def test_every_raise_with_words_is_there(page):
    """Counted in another way than the page does: by the longest piece of text in each raise."""
    told = " ".join(page.split())
    for path in (ROOT / "fused_losses").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue
            texts = [n.value for n in ast.walk(node.exc) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            longest = " ".join(max(texts, key=len, default="").split())
            if len(longest.split()) >= 4:
                assert longest in told, f"{path.name}:{node.lineno}"


def wrong_calls(tmp_path):
    hidden, weight, labels = torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 2, dtype=torch.int64)
    (tmp_path / "bad.jsonl").write_text('{"format": "fused_losses.anchors", "version": 99}\n')
    return [
        lambda: fl.TALRLoss()(hidden, weight, labels),
        lambda: fl.TALRLoss(gradient="some"),
        lambda: fl.LAwFLoss()(hidden, weight, torch.zeros(2, 3, dtype=torch.int64), confidence=torch.zeros(2, 3)),
        lambda: fl.patch(torch.nn.Linear(2, 2), fl.TALRLoss()),
        lambda: fl.huggingface.AnchorCollator(pad_token_id=0)([{"input_ids": [1, 2]}]),
        lambda: anchors.read_records(tmp_path / "bad.jsonl"),
    ]


@pytest.mark.parametrize("number", range(6))
def test_what_is_really_said_is_found_there(number, page, tmp_path):
    with pytest.raises((ValueError, TypeError)) as caught:
        wrong_calls(tmp_path)[number]()
    said = " ".join(str(caught.value).split())
    lines = [line[2:].rpartition("`")[0] for line in page.splitlines() if line.startswith("- ")]
    entries = [line.strip("`").strip() for line in lines]
    patterns = [".+?".join(map(re.escape, entry.split("…"))) for entry in entries if len(entry.strip("…:. ")) > 12]
    assert any(re.search(pattern, said) for pattern in patterns), said


def test_what_troubleshooting_quotes_is_said(page):
    """`...` stands for what a message puts in."""
    code = "".join(path.read_text() for path in (ROOT / "fused_losses").rglob("*.py"))
    told = re.sub(r"\s+", " ", re.sub(r'"\s*\n\s*f?"', "", code + page))
    rows = [line.split(" | ")[0] for line in (DOCS / "troubleshooting.md").read_text().splitlines() if line[:1] == "|"]
    quoted = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row) if " " in quote]
    assert len(quoted) > 25
    for quote in quoted:
        pieces = [piece.strip(" :;,'") for piece in quote.split("...")]
        assert all(piece in told for piece in pieces), quote


# The site


@pytest.mark.skipif(
    any(importlib.util.find_spec(name.partition(".")[0]) is None for name in SITE),
    reason="mkdocs is not installed: pip install 'fused_losses[docs]'",
)
def test_the_site_builds_without_a_warning(tmp_path):
    """Of a copy with a page of a trainer and one of a study, which the navigation takes where they are there."""
    for name in ("docs", "fused_losses", "csrc", "examples"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "trainers")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("mkdocs.yml", "CONTRIBUTING.md", "CHANGELOG.md", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "docs" / "trainers").mkdir()
    (tmp_path / "docs" / "forgetting.md").write_text("# A study, which a script writes\n")
    (tmp_path / "docs" / "trainers" / "some.md").write_text("# Some trainer\n\n[map](../../fused_losses/README.md)\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q"]
    options = dict(cwd=tmp_path, capture_output=True, text=True, timeout=600)
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, env=environment, **options)
    assert done.returncode == 0 and not done.stderr, done.stderr
    site = tmp_path / "build" / "site"
    assert {"trainers/some.html", "forgetting.html"} <= set(
        re.findall(r'href="(\S+?)"', (site / "index.html").read_text())
    )
    assert "source/fused_losses/index.html" in (site / "trainers" / "some.html").read_text().replace("../", "")
    assert "gradient: expected one of" in (site / "messages.html").read_text()
    assert 'id="fused_losses.token_losses"' in (site / "reference" / "op.html").read_text()
    assert not re.search(r'(?:src|href)="https?://(?!arxiv|github)', (site / "index.html").read_text())  # no network
