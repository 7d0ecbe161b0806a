"""`fused-losses check`: What a fine-tuned model has learnt and what it has forgotten, beside its original."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import ending, models
from .ending import BROKEN, refusing
from .options import number, require
from .tables import show

NEEDS = ("transformers", "peft", "rich")
CODES = ending.CODES.replace("0 done;", "0 done, and no limit is broken; 1 a limit is broken;")


def add(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "check", help="what a fine-tuned model has learnt and forgotten",
        description=f"{__doc__.partition(': ')[2]} docs/check.md says what each file holds and how to read the report.",
    )  # fmt: skip
    models.add_options(parser)
    parser.add_argument(
        "--original", metavar="A",
        help="the model that --model was made of, of a full fine-tune or a merged adapter; default: --model without "
        "its adapter",
    )  # fmt: skip
    what = parser.add_argument_group("what is asked")
    what.add_argument(
        "--anchors", type=Path, metavar="F", nargs="+", default=[],
        help="files of records of corrected answers, as annotate writes them",
    )  # fmt: skip
    what.add_argument(
        "--probes", type=Path, metavar="F", nargs="+", default=[],
        help='JSON Lines such as {"kind": "paraphrase" | "reverse" | "unrelated", "prompt": ..., "expect": "Aurora"}',
    )  # fmt: skip
    what.add_argument(
        "--prompts", type=Path, metavar="F", nargs="+",
        help="prompts that have nothing to do with what was taught, one a line, or .jsonl; default: 28, built in",
    )  # fmt: skip
    what.add_argument(
        "--text", type=Path, metavar="F", nargs="+", action="extend",
        help="general text, UTF-8; default: prose, documentation and code",
    )  # fmt: skip
    what.add_argument(
        "--facts-contamination", nargs="+", metavar="WORD", dest="facts",
        help="what must not show where it does not belong; default: the words of the anchors, and what probes expect",
    )  # fmt: skip
    what.add_argument(
        "--answer-tokens", type=number(int, 1), default=64, metavar="N", help="at most so many an answer; default: 64"
    )
    what.add_argument(
        "--text-tokens", type=number(int, 1), default=4096, metavar="N", help="at most so many of a text; default: 4096"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-kl", type=number(float, 0), metavar="X",
        help="nats per token along the original's own answers to the prompts, mean over these",
    )  # fmt: skip
    limits.add_argument(
        "--min-recall", type=number(float, 0, 1), metavar="Y",
        help="share of anchors that are ranked first after the prompts that were corrected",
    )  # fmt: skip
    limits.add_argument(
        "--min-paraphrase-recall", type=number(float, 0, 1), metavar="Z",
        help="the same after paraphrases, of probes that name their record",
    )  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="F", help="file for everything that was found")
    output.add_argument("--html", type=Path, metavar="F", help="file for a page with all answers, token by token")
    output.add_argument(
        "--cache", type=Path, metavar="DIR", help="folder for answers, so that a check that was stopped goes on; "
        "default: fused_losses/answers in the user's cache",
    )  # fmt: skip
    output.add_argument("--no-cache", action="store_true", help="keep no answers")
    output.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), default=0, help="of the intervals' bootstrap; default: 0"
    )
    return parser


def run(given: argparse.Namespace) -> None:
    """Ends with the exit status, so that what failed is never taken for a limit that is broken."""
    with refusing(OSError, TypeError, ValueError):
        report = _report(given)
    for title, header, rows in report.tables():
        show(title, header, rows)
    for sentence in report.broken:
        print(f"limit broken: {sentence}")
    for path in (given.json, given.html):
        if path is not None:
            print(f"written: {path}")
    if not report.passed:
        raise SystemExit(BROKEN)


def _report(given: argparse.Namespace) -> Any:
    require("the check", NEEDS, "cli,hf")
    from .. import checking
    from ..anchors import read_records
    from ..checking.plan import asked, checked_limits

    for name in ("json", "html"):
        _check_output(name, getattr(given, name))
    models.check(given)
    _of_original(given, models.check)
    if given.original is None and given.adapter is None:
        raise ValueError("--adapter: give the adapter that was trained, or with --original the model before training")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    read: dict[str, Any] = {
        "probes": [probe for path in given.probes for probe in checking.read_probes(path)],
        "prompts": given.prompts and [prompt for path in given.prompts for prompt in checking.read_prompts(path)],
        "texts": None if given.text is None else _texts(given.text),
    }
    # What is wrong in them shall be known before a model is loaded.
    for path in given.anchors:
        read_records(path)
    tokenizer = models.load_tokenizer(given)
    read["anchors"] = [record for path in given.anchors for record in read_records(path, tokenizer)]
    limits = given.max_kl, given.min_recall, given.min_paraphrase_recall
    checked_limits(*limits, read["anchors"], read["probes"], read["prompts"])
    asked(tokenizer, read["anchors"], read["probes"], read["prompts"], given.facts)
    model = models.load_model(given)
    original = _of_original(given, models.load_model)
    with _progress() as progress:
        report = checking.check(
            model, tokenizer, original=original, **read, facts=given.facts, max_kl=given.max_kl,
            min_recall=given.min_recall, min_paraphrase_recall=given.min_paraphrase_recall,
            answer_tokens=given.answer_tokens, text_tokens=given.text_tokens,
            seed=given.seed, cache=_cache(given),
            names=_names(given), progress=progress,
        )  # fmt: skip
    if given.json is not None:
        report.save_json(given.json)
    if given.html is not None:
        report.save_html(given.html)
    return report


def _texts(paths: list[Path]) -> dict[str, str]:
    from ..checking import read_text

    return {str(path): read_text(path) for path in paths}


def _names(given: argparse.Namespace) -> tuple[str, str]:
    return models.whole_name(given), models.name_of(given) if given.original is None else given.original


def _of_original(given: argparse.Namespace, what: Callable[[argparse.Namespace], Any]) -> Any:
    """What a function of models.py says of the original; None where there is no other model."""
    if given.original is None:
        return None
    try:
        return what(argparse.Namespace(**{**vars(given), "model": given.original, "adapter": None, "demo": False}))
    except (OSError, ValueError) as error:
        raise ValueError(str(error).replace("--model:", "--original:", 1)) from None


def _check_output(name: str, path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ValueError(f"--{name}: expected a file in a folder that exists, got {path}")


def _cache(given: argparse.Namespace) -> Path | None:
    """None where answers are not to be kept, or the user has no place for them."""
    if given.no_cache or given.cache is not None:
        return None if given.no_cache else given.cache
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "fused_losses" / "answers"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK) else None


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """A bar for each stage, on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description:22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield report
