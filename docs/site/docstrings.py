"""Docstrings as Markdown reads them, for the API reference: an extension of griffe, by which mkdocstrings reads code.

They are written for readers of the code: `::` announces a block, and a sign such as > may begin a description.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


class AsMarkdown(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    text = re.sub(r"::$", ":", text, flags=re.M)
    return re.sub(r"^( +\w+: )(?=[>#*+-] )", r"\1\\", text, flags=re.M)  # else a quotation, a heading or a list
