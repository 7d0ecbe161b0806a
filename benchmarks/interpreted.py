"""The whole Triton path on real hidden states, in Triton's interpreter: how many entries are kept, and how exact it is.

    TRITON_INTERPRET=1 python benchmarks/interpreted.py     # about 5 minutes; results/interpreted.json, docs/kernels.md

Beside it the backend "torch", whose entries are those of the exact threshold; the scan keeps those above a lower bound.
Float32, so that only the method differs; truth is float64. No time is measured here: the interpreter's says nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch
from compiled import put_between
from sparse_states import load_states, save
from tqdm import tqdm

import fused_losses as fl
from fused_losses.backends import gpu_scan

TOKENS = 64
COLUMNS = ("text", "loss", "backend", "entries / token", "exact tokens", "bound", "dx", "dW")


def measure(text: str, hidden, labels, weight, reference) -> list[dict]:
    a = torch.ones(len(labels), dtype=torch.float64)

    def run(dtype: torch.dtype, **options):
        x, w = (t.to(dtype, copy=True).requires_grad_() for t in (hidden, weight))
        given = None if reference is None else fl.Reference(reference.to(dtype))
        out = fl.token_losses(x, w, labels, reference=given, **options)
        ((out.nll if reference is None else out.kl) * a.to(dtype)).sum().backward()
        return x.grad.double(), w.grad.double(), out

    dx, dw, truth = run(torch.float64, backend="reference")
    rows = []
    for backend in ("torch", "triton"):
        x, w, out = run(torch.float32, backend=backend, gradient="sparse")
        report = out.gradient_report
        rows.append({
            "text": text, "loss": "cross-entropy" if reference is None else f"KL {truth.kl.mean():.4f}",
            "backend": backend, "entries": report.entries / report.tokens, "exact_tokens": report.exact_tokens,
            "bound": report.bound, "dx": ((x - dx).norm() / dx.norm()).item(),
            "dW": ((w - dw).norm() / dw.norm()).item(), "nll": ((out.nll - truth.nll).norm() / truth.nll.norm()).item(),
        })  # fmt: skip
    return rows


def main() -> None:
    if not gpu_scan.INTERPRETED:
        raise SystemExit("set TRITON_INTERPRET=1: without a GPU the kernels run only in Triton's interpreter")
    gpu_scan.INTERPRETED_TILE = gpu_scan.INTERPRETED_TILE._replace(block_n=64, block_v=1024, block_d=64)
    states = load_states()
    weight = states["weight"].float()
    jobs = []
    for text in ("documentation", "generated"):
        hidden, labels = states["texts"][text]
        jobs.append((text, hidden[:TOKENS], labels[:TOKENS], None))
    for text, (hidden, reference, labels) in states["adapted"].items():
        jobs.append((text, hidden[:TOKENS], labels[:TOKENS], reference[:TOKENS]))
    rows = [row for text, x, y, r in tqdm(jobs) for row in measure(text, x, y, weight, r)]
    save("interpreted", {"tokens": TOKENS, "probe": gpu_scan.PROBE, "rows": rows})
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for r in rows:
        lines.append(
            f"| {r['text']} | {r['loss']} | {r['backend']} | {r['entries']:.0f} | {r['exact_tokens']} | "
            f"{r['bound']:.3f} | {r['dx']:.2%} | {r['dW']:.2%} |"
        )
    put_between(Path(__file__).parents[1] / "docs" / "kernels.md", "interpreted", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
