"""Results on disk: bench.json, written anew after every row, from which a run goes on."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import __version__, backends
from ..anchors.writing import try_lock
from .contestants import Contestant
from .plan import Cell

NAME = "bench.json"
Row = dict[str, Any]


class Results:
    """`rows` by name: the settings that make it, then figures, or `reason` why there are none.

    Figures: seconds_alone and peak_mib of a process of its own; hidden_error, weight_error (relative L2), token_error,
    largest_token_error; of the rounds, of each a value: seconds, products (time in products of hidden states and head),
    of_ours (time in those of ours).
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.rows: dict[str, Row] = {}
        self.notes: list[str] = []
        self.machine: dict[str, Any] = {}
        if self.path.is_file():
            content = _read(self.path)
            self.rows, self.notes = content["rows"], content.get("notes", [])
            self.machine = content.get("machine", {})

    def known(self, cell: Cell, contestant: Contestant) -> Row | None:
        """The row, where it is of equal settings."""
        row = self.rows.get(cell.row(contestant.name))
        return row if row is not None and row["settings"] == settings(cell, contestant) else None

    def put(self, cell: Cell, contestant: Contestant, figures: Row) -> None:
        self.rows[cell.row(contestant.name)] = {"settings": settings(cell, contestant), **figures}
        self.save()

    def save(self) -> None:
        self.machine = facts() | {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
        temporary = self.path.with_name(f"{NAME}.{os.getpid()}")
        content = {"machine": self.machine, "notes": self.notes, "rows": self.rows}
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def open_results(folder: Path) -> tuple[Results, Callable[[], None]]:
    """And what lets others write there. ValueError where another run does."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    if not try_lock(descriptor, lock):
        os.close(descriptor)
        raise ValueError(f"--output: another run writes to {folder}; wait for it, or give another folder")
    return Results(folder), lambda: os.close(descriptor)


def seconds(row: Row) -> float | None:
    """The median of the rounds; where there are none the time alone."""
    return statistics.median(row["seconds"]) if row.get("seconds") else row.get("seconds_alone")


def settings(cell: Cell, contestant: Contestant) -> dict[str, Any]:
    """All that the figures of a row depend on, as far as it is known."""
    version = contestant.version() + (f" ({code()})" if contestant.ours else "")
    return cell.settings() | {
        "contestant": contestant.name, "version": version, "torch": torch.__version__,
        "on": facts()["gpu"] or f"{facts()['cpu']}, {facts()['capability']}", "threads": torch.get_num_threads(),
    }  # fmt: skip


@functools.cache
def code() -> str:
    """A digest of the code that computes losses, so that a change of it measures anew."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for pattern in ("*.py", "objectives/*.py", "sparse/*.py", "backends/*.py", "kernels/**/*.py", "*.so"):
        for path in sorted(root.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def facts() -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    return {
        "cpu": _cpu_name(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "gpu_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if gpu else None,
        "cuda": torch.version.cuda, "system": platform.platform(), "python": platform.python_version(),
        "torch": torch.__version__, "fused_losses": __version__,
        "backend": backends.choose("auto", "cuda" if gpu else "cpu"),
    }  # fmt: skip


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content["rows"], dict):
            return content
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"--output: {path} is not what fused-losses bench has written; give another folder")
