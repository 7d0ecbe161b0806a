"""Registers, spilled bytes and shared memory of every CUDA kernel on every architecture, as ptxas reports them.

`python benchmarks/cuda_resources.py [FILE]` writes them as JSON. Needs nvcc and ninja, no GPU; about a minute
on 2 cores. Warnings are errors.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fused_losses.kernels import build

STRICT = ("-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror")


def resources(folder: Path | None = None) -> list[dict]:
    """One record a kernel and architecture: source, kernel, architecture, registers, spill_stores, spill_loads, stack
    and shared (bytes; shared memory without what is asked for at launch). `folder`: where to leave the library."""
    nvcc, reason = build.find_nvcc()
    if nvcc is None:
        raise RuntimeError(f"the CUDA kernels cannot be compiled: {reason}")
    with tempfile.TemporaryDirectory() as temporary:
        library = build.cuda_library(
            Path(torch.__file__).parent, nvcc, build.architectures(nvcc), ("-Xptxas=-v", *STRICT)
        )
        report = build.build(library, (folder or Path(temporary)) / library.name, Path(temporary))
    steps = [(re.search(r" -o (\w+)\.o", step), step) for step in re.split(r"^\[\d+/\d+\] ", report, flags=re.M)]
    return [{"source": f"{made[1]}.cu"} | record for made, step in steps if made for record in parse(step)]


def version() -> str:
    """Of nvcc, "13.0"."""
    nvcc, reason = build.find_nvcc()
    if nvcc is None:
        raise RuntimeError(f"the CUDA kernels cannot be compiled: {reason}")
    return re.search(r"release (\S+),", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)[1]


def parse(report: str) -> list[dict]:
    """What `ptxas -v` prints."""
    records = []
    for part in report.split("Compiling entry function ")[1:]:
        name, architecture = re.match(r"'(\w+)' for '(\w+)'", part).groups()
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        shared = re.search(r"(\d+) bytes smem", part)
        records.append({
            "kernel": readable(name),
            "architecture": architecture,
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "spill_stores": int(stores),
            "spill_loads": int(loads),
            "stack": int(stack),
            "shared": int(shared[1]) if shared else 0,
        })  # fmt: skip
    return records


def readable(mangled: str) -> str:
    """attention_kernel<bf16, 1, true> from the mangled name of a template over element types, integers and booleans."""
    name, arguments = re.search(r"\d([a-z_]+_kernel)(?:I(.*?)EEv)?", mangled).groups()
    if not arguments:
        return name
    kinds = r"(?P<fp32>f)|(?P<bf16>\d+__nv_bfloat16)|(?P<fp16>\d+__half)|Li(?P<int>\d+)E?|Lb(?P<bool>[01])E?"
    words = []
    for match in re.finditer(kinds, arguments):
        kind, value = match.lastgroup, match[match.lastgroup]
        words.append({"int": value, "bool": "true" if value == "1" else "false"}.get(kind, kind))
    return f"{name}<{', '.join(words)}>"


def main() -> None:
    text = "[\n" + ",\n".join(f" {json.dumps(record)}" for record in resources()) + "\n]\n"
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
