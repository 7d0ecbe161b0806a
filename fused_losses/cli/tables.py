"""Tables on the terminal: drawn by rich where it is installed (extra `cli`), else aligned by spaces."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table. Text that is too long for the terminal is wrapped in the last column."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(plain(title, header, rows, shutil.get_terminal_size((120, 24)).columns) + "\n")
        return
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(Text, row))  # square brackets are meant, they are no markup
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def plain(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """The table as text, without a line longer than `width` unless a column needs it."""
    indents = [max(len(row[i]) for row in (header, *rows)) + 2 for i in range(len(header) - 1)]
    room = max(width - sum(indents) - 2, 20)
    lines = [title]
    for row in (header, *rows):
        start = "".join(cell.ljust(indent) for cell, indent in zip(row, indents, strict=False))
        first, *others = textwrap.wrap(row[-1], room, break_long_words=False, break_on_hyphens=False) or [""]
        lines += [f"  {start}{first}".rstrip(), *("  " + " " * sum(indents) + line for line in others)]
    return "\n".join(lines)
