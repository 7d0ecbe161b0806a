"""`fused-losses annotate`: Correct a model's answers token by token, in a browser or a terminal."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import models
from .ending import refusing
from .options import number, require

NEEDS = ("transformers", "peft")
OF_THE_PAGE = ("starlette", "uvicorn")
EPILOG = """examples:
  fused-losses annotate --demo --output anchors.jsonl
  fused-losses annotate --model ./my-model --prompts questions.txt --output anchors.jsonl
  fused-losses annotate --model ./my-model --adapter ./trained --prompts questions.txt --output round2.jsonl

An accepted answer is on the disk at once. The same command goes on where it was: prompts that have a record are done.
On another machine: ssh -L 8000:127.0.0.1:8000 machine fused-losses annotate --port 8000 --no-browser ..."""


def add(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "annotate", help="correct a model's answers token by token", description=__doc__.partition(": ")[2],
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    models.add_options(parser)
    parser.add_argument(
        "--prompts", type=Path, metavar="F",
        help='text with a prompt a line, or JSON Lines: {"prompt": ...} or {"messages": [...]}; more can be typed',
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="F", help="the file of records; is appended to")
    parser.add_argument(
        "--max-new-tokens", type=number(int, 1, 100_000), default=256, metavar="N",
        help="after which an answer pauses; default: 256",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=number(float, 0, 100), default=0.0, metavar="T",
        help="0: the likeliest token, the default; above: drawn",
    )  # fmt: skip
    parser.add_argument(
        "--top-p", type=number(float, 1e-6, 1), default=1.0, metavar="P", help="of the draws; default: 1"
    )
    parser.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0, help="of the draws; default: 0")
    parser.add_argument(
        "--round", type=number(int, 1, 10_000), metavar="N",
        help="of correction, noted in the records; default: 1, with --adapter 2",
    )  # fmt: skip
    page = parser.add_argument_group("the page")
    page.add_argument("--host", default="127.0.0.1", help="address to serve on; default: 127.0.0.1")
    page.add_argument(
        "--allow-remote", action="store_true",
        help="a --host other than loopback: whoever has the printed address gets in, and nothing is encrypted",
    )  # fmt: skip
    page.add_argument("--port", type=number(int, 0, 65535), default=0, help="default: a free one")
    page.add_argument("--no-browser", action="store_true", help="print the address only")
    page.add_argument("--terminal", action="store_true", help="no page: type here, as over ssh")
    return parser


def run(given: argparse.Namespace) -> None:
    require("annotate", NEEDS if given.terminal else (*NEEDS, *OF_THE_PAGE), "annotate")
    if given.demo:
        require("annotate --demo", ("gguf",), "demo")
    with refusing(OSError, ValueError, TypeError):
        _run(given)


def _run(given: argparse.Namespace) -> None:
    """What can be refused without the model comes before it."""
    from ..anchors.files import RecordFile
    from ..anchors.page.tasks import read_prompts

    models.check(given)
    tasks = [] if given.prompts is None else read_prompts(given.prompts)
    with RecordFile(given.output) as file:
        page = None if given.terminal else _page(given)
        desk = _desk(given, file, tasks)
        try:
            if page is None:
                from ..anchors.page.terminal import Terminal

                Terminal(desk).run()
                return
            page.show(desk)
            print(f"Correct answers at\n  {page.address}", flush=True)
            print(f"Ctrl-C ends; what was accepted is in {given.output}.", flush=True)
            desk.begin()
            page.run(browser=not given.no_browser)
        finally:
            unsaved = desk.unsaved
            desk.close()
            if unsaved:
                print(f"An answer was not accepted: its corrections are in {desk.draft}, and here again next time.")


def _page(given: argparse.Namespace) -> Any:
    from ..anchors.page.server import Page, is_loopback

    if not is_loopback(given.host) and not given.allow_remote:
        raise ValueError(
            f"--host: expected a loopback address such as 127.0.0.1, got {given.host}; to let others of the network "
            "in, who then see and change the answers, add --allow-remote; better: ssh -L"
        )
    return Page(given.host, given.port)


def _desk(given: argparse.Namespace, file: Any, tasks: list) -> Any:
    from ..anchors.files import read_records
    from ..anchors.page.desk import Desk
    from ..anchors.page.original import original_answers
    from ..anchors.session import AnchorSession

    model, tokenizer = models.load(given)
    if file.records:
        read_records(file.path, tokenizer)  # refuses those of another tokenizer
    session = AnchorSession(
        model, tokenizer, max_new_tokens=given.max_new_tokens, temperature=given.temperature, top_p=given.top_p,
        seed=given.seed, reference="base" if given.adapter else None, round=given.round or (2 if given.adapter else 1),
    )  # fmt: skip
    return Desk(session, file, tasks, original=original_answers(session), name=models.whole_name(given, brief=True))
