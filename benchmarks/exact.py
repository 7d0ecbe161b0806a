"""Exact forward + backward against full logits and `torch.nn.functional.linear_cross_entropy`, side by side.

    python benchmarks/exact.py [--runs 5] [--dtype float32] [--hidden 576 2048]

Every round runs each contestant once, in turn, so that what else the machine does hits all of them; figures are
medians, ratios are medians of the rounds' ratios. Distributions are peaked as a language model's: the label's logit stands
out on most rows. Results go to benchmarks/results/ as JSON; the tables in docs/benchmarks.md are its output.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import fused_losses as fl
from fused_losses import reference as full

RESULTS = Path(__file__).parent / "results"


def inputs(n: int, v: int, d: int, dtype: torch.dtype):
    """Hidden states that point to their label more or less: mean nll about 2, as on ordinary text."""
    torch.manual_seed(0)
    weight = torch.randn(v, d)
    labels = torch.randint(v, (n,))
    push = 3 + 10 * torch.rand(n, 1)
    hidden = (torch.randn(n, d) + push * weight[labels] / d**0.5) / d**0.5
    reference = hidden + 0.02 * torch.randn(n, d) / d**0.5
    return hidden.to(dtype), weight.to(dtype), labels, reference.to(dtype)


def contestants(labels, reference):
    """name: (loss of hidden and weight, head is frozen). In groups that are compared with each other."""
    rows = labels.view(8, -1)
    anchors = (torch.arange(len(labels)) % 20 == 0).float()

    def eager_talr(x, w):
        nll = F.cross_entropy((x @ w.T).float(), labels, reduction="none")
        tau = nll.detach().view(rows.shape).mean(1).quantile(0.5)
        return ((-nll.detach() / tau).exp().clamp(min=0.01) * nll).mean()

    def eager_lawf(x, w):
        with torch.no_grad():
            z_ref = (reference @ w.T).float()
        z = (x @ w.T).float()
        return (anchors * full.nll(z, labels) + (1 - anchors) * full.kl(z_ref, z)).mean()

    def talr(x, w):
        return fl.TALRLoss()(x.view(8, -1, x.shape[1]), w, rows)

    def lawf(x, w):
        return fl.LAwFLoss()(x, w, labels, confidence=anchors, reference=fl.Reference(reference))

    options = torch.nn.LinearCrossEntropyOptions()
    cross_entropy = {
        "eager, full logits": lambda x, w: F.cross_entropy((x @ w.T).float(), labels),
        "F.linear_cross_entropy, chunked": lambda x, w: F.linear_cross_entropy(x, w, labels, options=options),
        "fused_losses": lambda x, w: fl.CrossEntropyLoss()(x, w, labels),
    }
    return {
        "cross-entropy": {name: (loss, False) for name, loss in cross_entropy.items()},
        "cross-entropy, frozen head": {name: (loss, True) for name, loss in cross_entropy.items()},
        "TALR, median temperature": {"eager, full logits": (eager_talr, False), "fused_losses": (talr, False)},
        "TALR, frozen head": {"eager, full logits": (eager_talr, True), "fused_losses": (talr, True)},
        "LAwF, frozen shared head": {"eager, full logits": (eager_lawf, True), "fused_losses": (lawf, True)},
    }


def measure(n: int, v: int, d: int, dtype: torch.dtype, runs: int) -> list[dict]:
    hidden, weight, labels, reference = inputs(n, v, d, dtype)
    rows = []
    for group, members in contestants(labels, reference).items():
        times: dict[str, list[float]] = {name: [] for name in members}
        values, gemm = {}, []
        for _ in range(runs):
            start = time.perf_counter()
            hidden @ weight.T
            gemm.append(time.perf_counter() - start)
            for name, (loss, frozen) in members.items():
                x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
                start = time.perf_counter()
                value = loss(x, w)
                value.backward()
                times[name].append(time.perf_counter() - start)
                values[name] = value.item()
                del x, w, value
        ours = times["fused_losses"]
        for name, seconds in times.items():
            row = {
                "group": group, "N": n, "V": v, "D": d, "dtype": str(dtype).removeprefix("torch."), "name": name,
                "seconds": statistics.median(seconds),
                "gemm_seconds": statistics.median(gemm),
                "speed_of_ours": statistics.median(a / b for a, b in zip(seconds, ours, strict=True)),
                "loss": values[name],
                "runs": seconds,
            }  # fmt: skip
            rows.append(row)
            print(
                f"| {group} | {d} | {row['dtype']} | {name} | {row['seconds']:.2f} | "
                f"{row['seconds'] / row['gemm_seconds']:.1f} | {row['speed_of_ours']:.2f} | {row['loss']:.4f} |",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, nargs="+", default=[576, 2048])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, default=RESULTS / "exact-cpu.json")
    options = parser.parse_args()
    print("| loss | D | dtype | implementation | s | in forward GEMMs | time / ours | value |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for dtype in options.dtype:
        for d in options.hidden:
            rows += measure(options.tokens, options.vocabulary, d, getattr(torch, dtype), options.runs)
    machine = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fused_losses": fl.__version__,
    }
    options.output.parent.mkdir(exist_ok=True)
    temporary = options.output.with_suffix(".tmp")
    temporary.write_text(json.dumps({"device": machine, "rows": rows}, indent=1))
    os.replace(temporary, options.output)
    print(f"written to {options.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
