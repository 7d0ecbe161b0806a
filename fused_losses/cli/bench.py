"""`fused-losses bench`: This package beside others on this machine: errors, memory, then time in interleaved rounds."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import meant
from .ending import going_on, refusing
from .options import number, require
from .tables import show

if TYPE_CHECKING:
    from ..bench.plan import Plan
    from ..bench.store import Results

NEEDS = ("tqdm", "matplotlib")
EPILOG = """examples:
  fused-losses bench                                       # under 15 minutes on 2 cores
  fused-losses bench --model qwen3-4b --losses TALR JSD
  fused-losses bench --row 'TALR/bfloat16/real/D576-V49152-N2048/TRL'

The same command goes on where it was stopped. --row measures one row anew, as bench.json has it, and prints both."""


def add(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "bench", help="this package beside others on this machine: should one switch?",
        description=__doc__.partition(": ")[2], epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("bench-results"), metavar="F",
        help="folder for bench.json, decision.png, ...; default: bench-results",
    )  # fmt: skip
    inputs = parser.add_argument_group("inputs")
    inputs.add_argument("--model", metavar="M", help="D and V by name; default: smollm2-135m, on a GPU llama-3.1-8b")
    inputs.add_argument("--hidden", type=number(int, 1), metavar="D", help="with --vocabulary, in place of --model")
    inputs.add_argument("--vocabulary", type=number(int, 2), metavar="V")
    inputs.add_argument(
        "--tokens", type=number(int, 8), metavar="N", help="a multiple of 8; default: 2048, on a GPU 8192"
    )
    inputs.add_argument(
        "--distribution", metavar="X", help="real, calibrated or flat; default: real, on a GPU calibrated"
    )
    inputs.add_argument("--dtypes", nargs="+", metavar="X", help="default: bfloat16 float32, on a GPU bfloat16")
    inputs.add_argument("--device", metavar="X", help="cpu or cuda; default: cuda where there is a GPU")
    what = parser.add_argument_group("what is measured")
    what.add_argument("--losses", nargs="+", metavar="X", help="default: all")
    what.add_argument("--contestants", nargs="+", metavar="X", help="names, or parts of names; default: all")
    what.add_argument("--backends", action="store_true", help="ours by each backend that can run here, too")
    what.add_argument("--add", type=Path, metavar="F", help="Python file with a list CONTESTANTS of your own")
    what.add_argument(
        "--sweep", action=argparse.BooleanOptionalAction, default=None,
        help="time against N and memory against V; default: where time is left",
    )  # fmt: skip
    what.add_argument("--all", action="store_true", help="every dtype, and D = 2048 too, without a limit of minutes")
    what.add_argument("--row", metavar="NAME", help="this row of bench.json alone, anew")
    how = parser.add_argument_group("how long")
    how.add_argument("--minutes", type=number(float, 0), metavar="M", help="for the whole run; default: 14")
    how.add_argument(
        "--limit", type=number(float, 0.1), default=120.0, metavar="S", help="seconds a call; default: 120"
    )
    how.add_argument("--rounds", type=number(int, 1), default=5, metavar="R", help="at most; default: 5")
    parser.add_argument("--markdown", type=Path, metavar="F", help="file for the tables, as Markdown")
    return parser


def run(given: argparse.Namespace) -> None:
    require("bench", NEEDS, "bench")
    go_on = "the same command goes on where it was"
    with refusing(OSError, ValueError), going_on("bench", lambda: go_on):
        if given.row is not None:
            _reproduce(given)
        else:
            _run(given)


def _run(given: argparse.Namespace) -> None:
    from ..bench import run as running

    plan = _plan(given)
    _check_folder(given.output)
    with _Bar() as progress:
        results = running.run(plan, progress)
    _report(given, plan, results)


def _plan(given: argparse.Namespace) -> Plan:
    from ..bench import inputs, measure
    from ..bench.losses import LOSSES, SEQUENCES
    from ..bench.plan import Plan, cells

    device = _device(given)
    losses = [_one_of("--losses", name, LOSSES) for name in given.losses or LOSSES]
    dtypes = None if given.dtypes is None else [_one_of("--dtypes", name, inputs.DTYPES) for name in given.dtypes]
    for option, names in (("model", inputs.MODELS), ("distribution", ("real", "calibrated", "flat"))):
        if getattr(given, option) is not None:
            setattr(given, option, _one_of(f"--{option}", getattr(given, option), names))
    if (given.hidden is None) != (given.vocabulary is None):
        there, other = ("--hidden", "--vocabulary") if given.vocabulary is None else ("--vocabulary", "--hidden")
        raise ValueError(f"{there}: expected {other} with it, got {there} alone; give both, or --model")
    if given.hidden is not None and given.model is not None:
        raise ValueError(f"--model: expected a model or --hidden and --vocabulary, got both; leave {given.model} out")
    if given.tokens is not None and given.tokens % SEQUENCES:
        raise ValueError(
            f"--tokens: expected a multiple of {SEQUENCES}, TALR's sequences, got {given.tokens}; give "
            f"{given.tokens // SEQUENCES * SEQUENCES or SEQUENCES}"
        )
    for option in ("add", "markdown"):
        path = getattr(given, option)
        if path is not None and not (path.is_file() if option == "add" else path.absolute().parent.is_dir()):
            raise ValueError(f"--{option}: nothing at {path if option == 'add' else path.parent}; check the path")
    shape = None if given.hidden is None else (given.hidden, given.vocabulary)
    found, notes = cells(device, given.model, shape, given.tokens, losses, dtypes, given.distribution, given.all)
    registry = measure.Registry(device, given.add, given.backends)
    minutes = given.minutes if given.minutes is not None else None if given.all else 14.0
    return Plan(
        given.output, found, _chosen(given.contestants, registry), device, given.rounds, minutes, given.limit,
        given.sweep, registry, notes,
    )  # fmt: skip


def _check_folder(folder: Path) -> None:
    """Before any work: results can be written there."""
    nearest = folder.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ValueError(f"--output: expected a folder, got {folder}, of which {nearest} is a file; give another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"--output: nothing can be written to {folder} ({error.strerror}); give another folder"
        ) from None


def _chosen(names: Sequence[str] | None, registry: Any) -> list[Any]:
    every = registry.contestants()
    for name in names or ():
        if not any(name.lower() in known.lower() for known in every):
            raise ValueError(f"--contestants: expected (parts of) {'; '.join(every)}, got {name!r}{meant(name, every)}")
    return [
        each for known, each in every.items() if names is None or any(name.lower() in known.lower() for name in names)
    ]


def _one_of(option: str, name: str, names: Any) -> str:
    """As it is written in `names`, whatever the case."""
    alike = [known for known in names if known.lower() == name.lower()]
    if not alike:
        raise ValueError(f"{option}: expected one of {', '.join(names)}, got {name!r}{meant(name, names)}")
    return alike[0]


def _device(given: argparse.Namespace) -> str:
    import torch

    if given.device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if _one_of("--device", given.device, ("cpu", "cuda")) == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: no GPU is visible to torch; give --device cpu, or install torch with CUDA")
    return given.device


# --- what is printed


class _Bar:
    """tqdm, as the function that a run calls."""

    def __enter__(self) -> _Bar:
        from tqdm import tqdm

        self.bar = tqdm(total=1, bar_format="{percentage:3.0f}% |{bar:20}| {elapsed} {desc}", file=sys.stderr)
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        self.bar.total, self.bar.n = total, done
        self.bar.set_description_str(what)

    def __exit__(self, *_: Any) -> None:
        self.bar.close()


def _report(given: argparse.Namespace, plan: Plan, results: Results) -> None:
    """Of the rows that were asked for; others of the folder are in bench.json alone."""
    from ..bench import pictures, report

    rows = plan.rows_of(results)
    for where, lines in report.decision(rows).items():
        show(f"Ours (sparse; of JSD exact) beside others: {where}", report.HEADER, lines)
    print(report.RULE)
    if missing := report.left_out(rows):
        show("Without figures", ("contestant", "why", "losses"), missing)
    for note in results.notes:
        print(f"Note: {note}")
    if others := len(results.rows) - len(rows):
        print(f"Note: {results.path} has {others} rows of other inputs, contestants, versions or machines; not shown.")
    print(f"\n{report.answer(rows)}")
    drawn = pictures.draw(rows, plan.folder)
    print(f"written: {', '.join(map(str, [results.path, *drawn]))}")
    if given.markdown is not None:
        given.markdown.write_text(report.markdown({**vars(results), "rows": rows}), encoding="utf-8")
        print(f"written: {given.markdown}")


def _reproduce(given: argparse.Namespace) -> None:
    from ..bench import report, reproduce

    before, after = reproduce.reproduce(given.output, given.row, given.add, given.rounds, given.limit)
    show(given.row, ("figure", "in bench.json", "now"), report.side_by_side(before, after))
