"""What docs/benchmarks.md and README.md say of `fused-losses bench`, from its results.

    fused-losses bench --all --output FOLDER
    fused-losses bench --losses cross-entropy --dtypes float32 --sweep --output SWEPT
    python benchmarks/bench_pages.py [FOLDER] [--sweep SWEPT]

Copies FOLDER/bench.json to benchmarks/results/bench-cpu.json, and that of SWEPT to bench-sweep-cpu.json, where they are
given; then writes the pictures in docs, the part of docs/benchmarks.md and that of README.md between the marks, from
these files alone.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from marks import filled

from fused_losses.bench import pictures, report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "bench-cpu.json"
SWEPT = RESULTS.with_name("bench-sweep-cpu.json")
PICTURES = {"tokens.png": "bench-tokens.png", "vocabulary.png": "bench-vocabulary.png"}
BEGIN, END = "<!-- bench: written by benchmarks/bench_pages.py -->", "<!-- end of bench -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of a run of fused-losses bench")
    parser.add_argument("--sweep", type=Path, metavar="SWEPT", help="folder of a run with --sweep")
    options = parser.parse_args()
    for name, folder, file in (("folder", options.folder, RESULTS), ("--sweep", options.sweep, SWEPT)):
        if folder is not None:
            if not (folder / "bench.json").is_file():
                parser.error(
                    f"{name}: expected one with bench.json, as `fused-losses bench --output` makes, got {folder}"
                )
            write(file, json.dumps(json.loads((folder / "bench.json").read_text()), indent=1) + "\n")
    content = json.loads(RESULTS.read_text())
    draw(content["rows"], {"decision.png": "bench.png"})
    if SWEPT.is_file():
        draw(json.loads(SWEPT.read_text())["rows"], PICTURES)
    for name, text in (("README.md", short(content)), ("docs/benchmarks.md", page(content))):
        write(ROOT / name, filled((ROOT / name).read_text(), text, name, BEGIN, END))


def draw(rows: dict[str, Any], names: dict[str, str]) -> None:
    """{picture of fused_losses.bench: file in docs}."""
    with tempfile.TemporaryDirectory() as drawn:
        pictures.draw(rows, Path(drawn))
        for name, target in names.items():
            (ROOT / "docs" / target).write_bytes((Path(drawn) / name).read_bytes())


def short(content: dict[str, Any]) -> str:
    """Of README.md: the picture and one sentence."""
    return (
        f"![Time and memory of each contestant](docs/bench.png)\n\n{answer(content)} [All tables](docs/benchmarks.md)."
    )


def answer(content: dict[str, Any]) -> str:
    machine = content["machine"]
    device = machine["gpu"] or f"{machine['threads']} CPU cores"
    said = report.answer(content["rows"])
    return f"On {device} {said.removeprefix('Switch: ')}" if said.startswith("Switch: ") else f"On {device}: {said}"


def page(content: dict[str, Any]) -> str:
    rows = content["rows"]
    lines = [answer(content), *leaders(rows), "", "![Time and memory of each contestant](bench.png)", ""]
    for where, found in report.decision(rows).items():
        lines += [f"**{where}**", "", f"| {' | '.join(report.HEADER)} |", "|" + "---|" * len(report.HEADER)]
        lines += [*(f"| {' | '.join(line)} |" for line in found), ""]
    lines += [report.RULE[0].upper() + report.RULE[1:], ""]
    _, _, tables = report.markdown({**content, "notes": []}).partition("\n\n")
    return "\n".join([*lines, *grown(), tables])


def grown() -> list[str]:
    """How time and memory grow, by a run of its own."""
    if not SWEPT.is_file():
        return []
    content = json.loads(SWEPT.read_text())
    machine = content["machine"]
    tables = report.growth(content["rows"])
    return [
        "![Time against the number of tokens](bench-tokens.png)", "",
        "![Memory against the size of the vocabulary](bench-vocabulary.png)", "",
        f"{machine['cpu']} ({machine['capability']}), {machine['threads']} threads; torch {machine['torch']}, "
        f"{machine['date'][:10]}. Each contestant in a process of its own; time: the median of three calls after "
        "the first.",
        "", *tables,
    ]  # fmt: skip


def leaders(rows: dict[str, Any]) -> list[str]:
    """Two sentences: in how many of the cells nobody is ahead of ours, and who is."""
    cells = report.groups(rows)
    ahead = {
        cell: {n: lost for n, (_, lost) in report.ahead(members).items() if lost} for cell, members in cells.items()
    }
    clear = sum(not found for found in ahead.values())
    text = f"In {clear} of {len(cells)} cases nobody is ahead of ours in time, memory or error of gradients."
    others = [
        f"{name} in {' and '.join(lost)} ({cell.loss}, {cell.dtype}, D = {cell.hidden})"
        for cell, found in ahead.items() for name, lost in found.items()
    ]  # fmt: skip
    return [text + (f" Ahead of ours are {'; '.join(others)}." if others else "")]


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
