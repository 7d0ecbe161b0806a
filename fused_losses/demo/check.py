"""The losses on real hidden states against full logits: value, gradient, peak memory, time; one process each."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_losses as fl

LOSSES = ("cross-entropy", "TALR", "LAwF")


def compare(folder: Path, hidden: Tensor, reference: Tensor, weight: Tensor, labels: Tensor, advance: Any) -> list[dict]:
    """Each loss with full logits and fused, forward and backward with a trainable head, in processes of their own."""
    inputs = folder / "inputs.pt"
    torch.save({"hidden": hidden, "reference": reference, "weight": weight.detach(), "labels": labels}, inputs)
    rows = []
    for loss in LOSSES:
        results = {}
        for backend in ("reference", "torch"):
            gradient = folder / f"{backend}.pt"
            command = [sys.executable, "-m", __name__, str(inputs), loss, backend, str(gradient)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the check of {loss} ({backend}) failed:\n{done.stderr[-2000:]}")
            results[backend] = json.loads(done.stdout) | {"gradient": torch.load(gradient)}
            advance()
        full, fused = results["reference"].pop("gradient"), results["torch"].pop("gradient")
        differences = [float((a - b).norm() / a.norm()) for a, b in zip(full, fused, strict=True)]
        value = results["reference"]["value"]
        rows.append(
            {
                "loss": loss,
                "tokens": labels.numel(),
                "full": results["reference"],
                "fused": results["torch"],
                "value_difference": abs(results["torch"]["value"] - value) / abs(value),
                "gradient_difference": max(differences),
            }
        )
    return rows


def _measure(path: str, loss: str, backend: str, output: str) -> None:
    import resource

    data = torch.load(path)
    hidden, weight = data["hidden"].requires_grad_(), data["weight"].requires_grad_()
    labels = data["labels"]
    module: fl.Objective
    options: dict[str, Any] = {}
    if loss == "cross-entropy":
        module = fl.CrossEntropyLoss(backend=backend)
    elif loss == "TALR":
        module = fl.TALRLoss(backend=backend)
    else:
        module = fl.LAwFLoss(backend=backend)
        options = {"confidence": (labels % 16 == 0).float(), "reference": fl.Reference(data["reference"])}
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    start = time.perf_counter()
    value = module(hidden, weight, labels, **options)
    value.backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before - 4 * (hidden.numel() + weight.numel())
    assert hidden.grad is not None and weight.grad is not None
    torch.save((hidden.grad, weight.grad), output)
    print(json.dumps({"value": value.item(), "seconds": seconds, "peak_mib": peak / 2**20}))


if __name__ == "__main__":
    _measure(*sys.argv[1:])
