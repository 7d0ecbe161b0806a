"""What the commands have in common: numbers with bounds, and packages that an extra brings."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterable


def number(kind: type, least: float, most: float = float("inf")) -> Callable[[str], float]:
    """A type for argparse: an int or a float between the two."""
    bounds = f"at least {least}" if most == float("inf") else f"from {least} to {most}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {_KINDS[kind]} {bounds}, got {text!r}")
        return value

    return parse


def require(what: str, packages: Iterable[str], extra: str) -> None:
    """End with the remedy where one of the packages is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"{what} needs {', '.join(missing)}; install with: pip install 'fused_losses[{extra}]'")


_KINDS = {int: "a whole number", float: "a number"}
