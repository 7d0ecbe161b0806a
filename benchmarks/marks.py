"""Parts of a page that a script writes, between two marks."""

from __future__ import annotations


def filled(page: str, text: str, name: str, begin: str, end: str) -> str:
    """The page with the text between its marks; SystemExit where it has none."""
    before, found, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise SystemExit(f"{name} has no {begin} and {end}; put them where the figures shall stand")
    return f"{before}{begin}\n{text.strip()}\n{end}{after}"
