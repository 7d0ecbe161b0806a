"""Registers, spilled bytes and shared memory of every CUDA kernel on every architecture, as ptxas reports them.

`python benchmarks/cuda_resources.py [FILE]` writes them as JSON. Needs nvcc, no GPU; about a minute on 2 cores. Warnings are errors.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fused_losses import build

STRICT = ("-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror")


def resources() -> list[dict]:
    """One record a kernel and architecture: source, kernel, architecture, registers, spill_stores, spill_loads, stack and shared
    (bytes; shared memory without what is asked for at launch)."""
    nvcc, reason = build.find_nvcc()
    if nvcc is None:
        raise RuntimeError(f"the CUDA kernels cannot be compiled: {reason}")
    chosen = build.architectures(nvcc)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=2) as pool:

        def compile_one(name: str) -> list[dict]:
            extra = ("-Xptxas=-v", *STRICT)
            command = build.kernel_command(nvcc, chosen, name, Path(folder) / f"{name}.o", extra)
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
            return [{"source": f"{name}.cu"} | record for record in parse(result.stderr)]

        return [record for records in pool.map(compile_one, build.KERNELS) for record in records]


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
