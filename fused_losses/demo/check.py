"""The losses on real hidden states, fused and with full logits: value, error, peak memory, time; one process each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_losses as fl

LOSSES = ("cross-entropy", "TALR", "LAwF")


def compare(
    folder: Path, hidden: Tensor, reference: Tensor, weight: Tensor, labels: Tensor, advance: Any
) -> list[dict]:
    """Each loss with full logits and fused in float32, forward and backward with a trainable head, in processes of
    their own; errors are relative, against the same in float64."""
    inputs = folder / "inputs.pt"
    torch.save({"hidden": hidden, "reference": reference, "weight": weight.detach(), "labels": labels}, inputs)
    rows = []
    for loss in LOSSES:
        results, outcomes = {}, {}
        for name, backend in (("full", "reference"), ("fused", "torch"), ("truth", "float64")):
            output = folder / f"{name}.pt"
            command = [sys.executable, "-m", __name__, str(inputs), loss, backend, str(output)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the check of {loss} ({name}) failed:\n{done.stderr[-2000:]}")
            results[name], outcomes[name] = json.loads(done.stdout), torch.load(output)
            advance()
        truth = outcomes.pop("truth")
        for name, gradients in outcomes.items():
            value = results["truth"]["value"]
            results[name]["value_error"] = abs(results[name]["value"] - value) / abs(value)
            errors = [float((g - t).norm() / t.norm()) for g, t in zip(gradients, truth, strict=True)]
            results[name]["gradient_error"] = max(errors)
        rows.append({"loss": loss, "tokens": labels.numel(), **results})
    return rows


class PeakMemory:
    """The largest resident memory while it is open, sampled every millisecond, above that at the start; in MiB."""

    def __enter__(self) -> PeakMemory:
        import psutil

        self.read = lambda: psutil.Process(os.getpid()).memory_info().rss
        self.start = self.peak = self.read()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.stop.wait(0.001):
            self.peak = max(self.peak, self.read())

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.mib = (self.peak - self.start) / 2**20


def _measure(path: str, loss: str, backend: str, output: str) -> None:
    data = torch.load(path)
    if backend == "float64":
        data = {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
        backend = "torch"
    hidden, weight, labels = data["hidden"].requires_grad_(), data["weight"].requires_grad_(), data["labels"]
    module: fl.Objective
    options: dict[str, Any] = {}
    if loss == "cross-entropy":
        module = fl.CrossEntropyLoss(backend=backend)
    elif loss == "TALR":
        module = fl.TALRLoss(backend=backend)
    else:
        module = fl.LAwFLoss(backend=backend)
        options = {"confidence": (labels % 16 == 0).float(), "reference": fl.Reference(data["reference"])}
    (torch.randn(64, 64) @ torch.randn(64, 64)).sum()  # the libraries' own buffers
    with PeakMemory() as memory:
        start = time.perf_counter()
        value = module(hidden, weight, labels, **options)
        value.backward()
        seconds = time.perf_counter() - start
    assert hidden.grad is not None and weight.grad is not None
    gradients = weight.element_size() * (hidden.numel() + weight.numel()) / 2**20
    torch.save((hidden.grad.double(), weight.grad.double()), output)
    print(json.dumps({"value": value.item(), "seconds": seconds, "peak_mib": memory.mib - gradients}))


if __name__ == "__main__":
    _measure(*sys.argv[1:])
