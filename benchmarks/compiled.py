"""What the kernels take of registers and shared memory, by compiling them ahead of time: no GPU needed, but nvcc.

python benchmarks/compiled.py [--missing]

It prints the tables, puts them into docs/kernels.md, and writes results/compiled-kernels.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cuda_resources
import triton
from tqdm import tqdm

from fused_losses.kernels.triton import ahead

ROOT = Path(__file__).parents[1]


def title(architecture: int | str) -> str:
    return architecture if isinstance(architecture, str) else f"sm_{architecture}"


def uses() -> list[tuple[ahead.Specimen, int | str]]:
    """Every kernel with every architecture that it may run on."""
    found: list[tuple[ahead.Specimen, int | str]] = []
    for specimen in ahead.specimens():
        found += [(specimen, architecture) for architecture in specimen.architectures]
        found += [(specimen, architecture) for architecture in ahead.AMD if 80 in specimen.architectures]
    return found


def triton_table(found: dict[tuple[str, int | str], ahead.Resources]) -> str:
    """Registers / shared memory in KiB, one column an architecture; all without spills."""
    names = list(dict.fromkeys(name for name, _ in found))
    columns = (*ahead.ARCHITECTURES, *ahead.AMD)
    lines = ["| kernel | " + " | ".join(map(title, columns)) + " |", "|---" * (1 + len(columns)) + "|"]
    for name in names:
        cells = []
        for architecture in columns:
            r = found.get((name, architecture))
            spilled = f", {r.spilled} B spilled" if r and r.spilled else ""
            cells.append(f"{r.registers} / {r.shared / 1024:.0f}{spilled}" if r else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cuda_table(records: list[dict]) -> str:
    """Of each kernel of csrc/cuda the variant with the most registers / bytes of static shared memory."""
    architectures = sorted({r["architecture"] for r in records}, key=lambda a: int("".join(filter(str.isdigit, a))))
    lines = ["| kernel | source | " + " | ".join(architectures) + " |", "|---|---|" + "---|" * len(architectures)]
    for source, name in sorted({(r["source"], r["kernel"].partition("<")[0]) for r in records}):
        cells = []
        for architecture in architectures:
            mine = [r for r in records if r["kernel"].partition("<")[0] == name and r["architecture"] == architecture]
            most = max(mine, key=lambda r: r["registers"])
            cells.append(f"{most['registers']} / {most['shared']}")
        lines.append(f"| {name} | {source} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def put_between(path: Path, marker: str, text: str) -> None:
    """Replace what stands between <!-- marker --> and <!-- /marker -->."""
    before, _, rest = path.read_text().partition(f"<!-- {marker} -->\n")
    _, end, after = rest.partition(f"<!-- /{marker} -->")
    if not end:
        raise ValueError(f"{path}: expected the markers <!-- {marker} --> and <!-- /{marker} -->, found none")
    written = path.with_suffix(".new")
    written.write_text(f"{before}<!-- {marker} -->\n{text}\n{end}{after}")
    written.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missing", action="store_true", help="only the kernels that the results lack")
    results = ROOT / "benchmarks" / "results" / "compiled-kernels.json"
    known = {}
    if parser.parse_args().missing:
        for row in json.loads(results.read_text())["kernels"]:
            numbers = (row["registers"], row["spilled_bytes"], row["shared_bytes"])
            known[row["kernel"], row["architecture"]] = ahead.Resources(*numbers, "")
    found = {
        (s.name, a): known.get((s.name, title(a))) or ahead.compile_for(s, a) for s, a in tqdm(uses(), unit="kernel")
    }
    table = triton_table(found)
    print(table)
    put_between(ROOT / "docs" / "kernels.md", "triton", table)
    cuda = cuda_resources.resources()
    table = cuda_table(cuda)
    print(table)
    put_between(ROOT / "docs" / "kernels.md", "cuda", table)
    rows = [
        dict(kernel=name, architecture=title(a), registers=r.registers, spilled_bytes=r.spilled, shared_bytes=r.shared)
        for (name, a), r in found.items()
    ]
    written = results.with_suffix(".new")
    content = dict(triton=triton.__version__, kernels=rows, nvcc=cuda_resources.version(), cuda=cuda)
    written.write_text(json.dumps(content, indent=1) + "\n")
    written.replace(results)


if __name__ == "__main__":
    main()
