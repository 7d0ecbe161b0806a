"""`fused-losses retain`: Write the model's own answers to prompts, which `train --retain` holds to what they are."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import models
from .ending import going_on, refusing
from .options import number, require

NEEDS = ("transformers", "peft")
EPILOG = """example:
  fused-losses retain --model ./my-model --prompts near.txt --output retain.jsonl

Read the answers: each is held as it is, the wrong ones too. The same command goes on where it was stopped, and adds
what is new in the prompts. With --adapter the answers are those of the model without it."""


def add(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "retain", help="the model's own answers, to be held while it is trained",
        description=__doc__.partition(": ")[2], epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    models.add_options(parser)
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="F",
        help='text with a prompt a line, or JSON Lines: {"prompt": ...} or {"messages": [...]}',
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="F", help="the file of records; is appended to")
    parser.add_argument(
        "--max-new-tokens", type=number(int, 1, 100_000), default=64, metavar="N",
        help="after which an answer is cut; default: 64",
    )  # fmt: skip
    return parser


def run(given: argparse.Namespace) -> None:
    require("retain", NEEDS, "hf")
    if given.demo:
        require("retain --demo", ("gguf",), "demo")
    go_on = "the same command goes on where it was"
    with refusing(OSError, ValueError, TypeError), going_on("retain", lambda: go_on):
        _run(given)


def _run(given: argparse.Namespace) -> None:
    """What can be refused without the model comes before it."""
    from ..anchors.files import RecordFile
    from ..anchors.jsonl import printable
    from ..anchors.page.tasks import read_prompts
    from ..anchors.walks import retain_rows

    models.check(given)
    tasks = read_prompts(given.prompts)
    for at, task in enumerate(tasks, 1):
        if task.tools:
            raise ValueError(
                f"--prompts: prompt {at} of {given.prompts} has tools, which are not read here; leave it out"
            )
    RecordFile(given.output).close()  # of records, and open nowhere else
    model, tokenizer = models.load(given)
    records = retain_rows(
        model, tokenizer, [task.messages for task in tasks], max_new_tokens=given.max_new_tokens, output=given.output,
        reference="base" if given.adapter else None,
    )  # fmt: skip
    for record in records:
        print(f"{printable(record.messages[-1]['content'])} → {printable(record.completion.text)}")
    print(f"written: {given.output}, with {len(records)} answers")
