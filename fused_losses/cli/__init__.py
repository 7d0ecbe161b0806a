"""The command `fused-losses`: correct answers (`annotate`), fine-tune on them (`train`), and `info`, `demo`, `tune`.

One file a command: `add` declares it and its options, `run` does it. Needs nothing but torch; what a single command
needs besides, that command asks for.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .. import __version__
from . import annotate, demo, info, train, tune


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="fused-losses", description="Token-level losses fused with the LM head.")
    whole.add_argument("--version", action="version", version=f"fused_losses {__version__}")
    commands = whole.add_subparsers(title="commands", metavar="COMMAND")
    for command in (annotate, train, info, demo, tune):
        command.add(commands).set_defaults(run=command.run)
    return whole


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process. SystemExit where it is wrong or the command cannot run."""
    whole = parser()
    given = whole.parse_args(arguments)
    if not hasattr(given, "run"):
        whole.print_help()
        raise SystemExit(2)
    given.run(given)
