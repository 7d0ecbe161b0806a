"""`fused-losses swift-plugin`: Write the plug-in file with which ms-swift trains with a loss of this package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .ending import refusing
from .options import require

AFTER = """Then:

  swift sft --external_plugins FILE --callbacks fused_losses ...
"""


def add(commands: Any) -> argparse.ArgumentParser:
    from ..objectives.named import NAMED

    parser = commands.add_parser(
        "swift-plugin", help="a plug-in file for ms-swift", description=__doc__.partition(": ")[2], epilog=AFTER,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("path", metavar="FILE", help="the file to write, such as fused_losses_plugin.py")
    parser.add_argument("--loss", default="talr", help=f"one of {', '.join(NAMED)}; default: talr")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the loss, such as temperature=2.0"
    )
    parser.add_argument("--reference", help="the frozen original: base, start, or the folder of a model")
    parser.add_argument("--reference-cache", metavar="DIR", help="a folder for the original's hidden states")
    parser.add_argument(
        "--keep-logits", choices=("true", "eval"), help="real logits, of full size: always, or in evaluation"
    )
    parser.add_argument("--eval-loss", choices=("nll", "objective"), help="what evaluation computes; default: nll")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    return parser


def run(given: argparse.Namespace) -> None:
    require("swift-plugin", ("transformers",), "hf")
    from ..anchors.writing import write_lines
    from ..integrations.swift import source

    with refusing(OSError, ValueError, TypeError):
        options = dict(_option(text) for text in given.option)
        text = source(
            given.loss, options, _written, reference=given.reference, reference_cache=given.reference_cache,
            keep_logits=True if given.keep_logits == "true" else given.keep_logits, eval_loss=given.eval_loss,
        )  # fmt: skip
        path = Path(given.path)
        if path.suffix != ".py":
            raise ValueError(f"{path}: expected a file that ends in .py, which ms-swift imports")
        if path.exists() and not given.force:
            raise ValueError(f"{path}: is there already; give another name, or --force")
        write_lines(path, [text.encode()])
    print(f"written: {path}; swift sft --external_plugins {path} --callbacks fused_losses ...")


def _written(setting: str) -> str:
    """As an option of the command, for messages."""
    return "--option" if setting == "options" else "--" + setting.replace("_", "-")


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--option {text}: expected NAME=VALUE, such as temperature=2.0")
    from ..objectives.named import read_option

    return name.replace("-", "_"), {"true": True, "false": False}.get(value.lower(), read_option(value))
