"""What mkdocs does beyond its defaults: pages that are optional, links out of docs/, and the page of all messages.

- A glob in the navigation of mkdocs.yml stands for the pages there are, also for none.
- A file outside docs/ that a page links to (`../csrc/README.md`) becomes a page of the site, below source/; so does
  what that one links to. A link to nothing is a warning, which `mkdocs build --strict` makes an error.
- Where the text of a link is the name of a page's file, the site shows the page's title.
- messages.md is made of the messages in the code (messages.py).
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

sys.path.insert(0, str(Path(__file__).parent))
import messages

ROOT = Path(__file__).parents[2]
NAMED_AS_ITS_FILE = re.compile(r"\[`?([\w./-]+\.md)`?\](?=\(([^)\s#:]+))")
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^(`{3,})[^\n]*\n.*?^\1$", re.M | re.S)
LANGUAGES = {".py": "python", ".jsonl": "json", ".json": "json", ".toml": "toml", ".yml": "yaml", ".yaml": "yaml"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    docs = Path(config.docs_dir)
    config.nav = [found for entry in config.nav for found in expanded(entry, docs, named(config.nav))]
    return config


def named(entry: Any) -> set[str]:
    """The pages that the navigation names one by one; no glob brings them a second time."""
    if isinstance(entry, str):
        return set() if "*" in entry else {entry}
    return {page for value in (entry.values() if isinstance(entry, dict) else entry) for page in named(value)}


def expanded(entry: Any, docs: Path, taken: set[str]) -> list[Any]:
    """An entry of the navigation with the pages that its globs find; nothing where they find none."""
    if isinstance(entry, str):
        if "*" not in entry:
            return [entry]
        return sorted(page for path in docs.glob(entry) if (page := path.relative_to(docs).as_posix()) not in taken)
    ((title, value),) = entry.items()
    if isinstance(value, list):
        value = [found for inner in value for found in expanded(inner, docs, taken)]
        return [{title: value}] if value else []
    return [{title: found} for found in expanded(value, docs, taken)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    waiting = [Path(file.abs_src_path) for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for target in linked(page):
            uri = place(target)
            if target.is_relative_to(config.docs_dir) or files.get_file_from_path(uri) is not None:
                continue
            files.append(File.generated(config, uri, content=shown(target), inclusion=InclusionLevel.NOT_IN_NAV))
            if target.suffix == ".md":
                waiting.append(target)
    files.append(File.generated(config, "messages.md", content=messages.page(ROOT / "fused_losses")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    uri = page.file.src_uri
    home = ROOT / uri.removeprefix("source/") if uri.startswith("source/") else ROOT / "docs" / uri

    def titled(match: re.Match[str]) -> str:
        """A page is named by its title where the text, for readers of the file, names the file."""
        target = Path(os.path.normpath(home.parent / match[2]))
        same = target.is_file() and match[1].endswith(target.name)
        return f"[{title(target)}]" if same and target.is_relative_to(ROOT / "docs") else match[0]

    def moved(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(home.parent / match[1]))
        if not target.exists():
            return match[0]  # mkdocs itself says so
        there = place(target)
        return posixpath.relpath(there, posixpath.dirname(uri) or ".") + (match[2] or "")

    return outside_of_code(markdown, lambda text: LINK.sub(moved, NAMED_AS_ITS_FILE.sub(titled, text)))


def title(page: Path) -> str:
    found = re.search(r"^# (.*)$", page.read_text(), re.M)
    return found[1] if found else page.stem


def outside_of_code(text: str, change: Any) -> str:
    parts, last = [], 0
    for fence in FENCE.finditer(text):
        parts += [change(text[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*parts, change(text[last:])])


def linked(page: Path) -> list[Path]:
    """The files and folders of this repository that a page links to."""
    if not page.is_file():
        return []  # made by another hook
    found = [Path(os.path.normpath(page.parent / match[1])) for match in LINK.finditer(FENCE.sub("", page.read_text()))]
    return [path for path in found if path.exists() and path.is_relative_to(ROOT)]


def place(target: Path) -> str:
    """Where a file of the repository is on the site."""
    path = target.relative_to(ROOT).as_posix()
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def shown(target: Path) -> str:
    if target.suffix == ".md":
        return target.read_text()
    files = sorted(path for path in target.iterdir() if path.is_file()) if target.is_dir() else [target]
    name = target.relative_to(ROOT).as_posix()
    parts = [f"# `{name}`"]
    for file in files:
        parts += [f"## `{file.name}`"] if target.is_dir() else []
        parts.append(f"````{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text().rstrip()}\n````")
    return "\n\n".join(parts) + "\n"
