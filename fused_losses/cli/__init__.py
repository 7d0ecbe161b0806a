"""The command `fused-losses`: answers corrected token by token (`annotate`), the model's own answers
(`retain`), fine-tuning on both (`train`), what it changed (`check`), what runs here (`info`), this
package beside others (`bench`), a demonstration (`demo`), tiles (`tune`), a loss for ms-swift (`swift-plugin`).

One file a command: `add` declares it and its options, `run` does it. Needs nothing but torch; what a single command
needs besides, that command asks for.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .. import __version__
from . import annotate, bench, check, demo, info, retain, swift_plugin, train, tune
from .ending import CODES, WRONG, told, unread


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="fused-losses", description="Token-level losses fused with the LM head.")
    whole.add_argument("--version", action="version", version=f"fused_losses {__version__}")
    commands = whole.add_subparsers(title="commands", metavar="COMMAND")
    for command in (annotate, retain, train, check, info, bench, demo, tune, swift_plugin):
        added = command.add(commands)
        added.set_defaults(run=command.run, command=added.prog.split()[-1])
        added.epilog = "\n\n".join(filter(None, [added.epilog, getattr(command, "CODES", CODES)]))
    return whole


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process.

    SystemExit with the status that ending.py has, where that is not 0.
    """
    with unread():
        whole = parser()
        given = whole.parse_args(arguments)
        if not hasattr(given, "run"):
            whole.print_help()
            raise SystemExit(WRONG)
        with told(given.command):
            given.run(given)
