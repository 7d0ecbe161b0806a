"""Files that a kill leaves whole: written beside, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def write_json(path: Path, value: Any) -> None:
    _replaced(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1)))


def save(path: Path, value: Any) -> None:
    _replaced(path, lambda temporary: torch.save(value, temporary))


def _replaced(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(temporary)
    os.replace(temporary, path)


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def once(path: Path, make: Callable[[], Any]) -> Any:
    """The JSON of the file, made and written where there is none."""
    if not path.is_file():
        write_json(path, make())
    return json.loads(path.read_text())


def in_parts(folder: Path, items: list, size: int, make: Callable[[list], list]) -> list:
    """`make` of all items, `size` at a time, each part in a file: a kill loses one part."""
    found: list = []
    for at in range(0, len(items), size):
        path = folder / f"{at:05d}.pt"
        if not path.is_file():
            save(path, make(items[at : at + size]))
        found += load(path)
    return found
