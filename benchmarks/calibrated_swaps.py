"""Which part of a real head the errors of sparse gradients come from: rows redrawn from a Gaussian, some of it kept.

    python benchmarks/calibrated_swaps.py    # a few minutes; prints how far errors of dx and dW are off, in per cent

Rows that are no label's get Gaussian coefficients with the covariance of real rows and their own length, but for their
coefficients along the mean hidden state and in the leading directions of the hidden states, which are kept.
"""

from __future__ import annotations

import argparse

import enlarged
import torch
from sparse_states import load_states
from torch import Tensor

from fused_losses.bench.calibrated import KINDS

KEPT = (0, 16, 64)


def redrawn(weight: Tensor, hidden: Tensor, labels: Tensor, count: int) -> Tensor:
    mean, mean_row = hidden.mean(0), weight.mean(0)
    spread = hidden - mean
    directions = torch.linalg.eigh(spread.T @ spread)[1].flip(1)[:, :count]
    basis = torch.linalg.qr(torch.cat([mean[:, None], directions], 1)).Q
    rows = weight - mean_row
    kept = rows @ basis
    rest = rows - kept @ basis.T
    predicted = kept @ torch.linalg.lstsq(kept, rest).solution
    left = rest - predicted
    values, vectors = torch.linalg.eigh(left.T @ left / len(left))
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    noise = (noise * values.clamp(min=0).sqrt()) @ vectors.T
    noise *= (left.norm(dim=1) / noise.norm(dim=1))[:, None]
    made = mean_row + kept @ basis.T + predicted + noise
    made[labels] = weight[labels]
    return made


def errors(hidden: Tensor, weight: Tensor, labels: Tensor, tuned: Tensor, original: Tensor) -> dict[str, float]:
    found = {"entropy": enlarged.statistics(hidden, weight, labels)["entropy"]}
    for case in (enlarged.Case(hidden, weight, labels), enlarged.Case(tuned, weight, labels, original)):
        for loss in case.losses:
            both = case.ours(loss, case.truth(loss), "full")["errors"]
            found |= dict(zip((f"{loss} dx", f"{loss} dW"), both, strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    tokens = parser.parse_args().tokens
    states = load_states()
    weight = states["weight"]
    for kind in KINDS:
        hidden, labels, *pair = enlarged.spaced(states, kind, tokens)
        real = errors(hidden, weight, labels, *pair)
        for count in KEPT:
            found = errors(hidden, redrawn(weight, hidden, labels, count), labels, *pair)
            print(kind, count, *(f"{name} {100 * (found[name] / real[name] - 1):+.0f}" for name in real), flush=True)


if __name__ == "__main__":
    main()
