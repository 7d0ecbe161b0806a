"""What a small call costs beside full logits: `python -m pytest benchmarks/small_calls.py` (pytest-benchmark).

64 tokens of a small head, where the products take next to nothing: what remains is what a call does besides. Forward
and backward; the last column of interest is the median. `eager` is the same in PyTorch's own operations.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_losses as fl

TOKENS, DIM = 64, 64
SEQUENCES = 4


def eager_cross_entropy(x: Tensor, w: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
    return F.cross_entropy(x @ w.T, labels)


def eager_talr(x: Tensor, w: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
    nll = F.cross_entropy(x @ w.T, labels, reduction="none")
    tau = nll.detach().view(SEQUENCES, -1).mean(1).quantile(0.5)
    return ((-nll.detach() / tau).exp().clamp(min=0.01) * nll).mean()


def eager_lawf(x: Tensor, w: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
    with torch.no_grad():
        log_r = (reference @ w.T).log_softmax(1)
    log_p = (x @ w.T).log_softmax(1)
    kl = F.kl_div(log_p, log_r, log_target=True, reduction="none").sum(1)
    c = (torch.arange(TOKENS) % 20 == 0).float()
    return (c * -log_p.gather(1, labels[:, None])[:, 0] + (1 - c) * kl).mean()


cross_entropy, talr, lawf = fl.CrossEntropyLoss(), fl.TALRLoss(), fl.LAwFLoss()
CALLS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "cross-entropy": (eager_cross_entropy, lambda x, w, y, r: cross_entropy(x, w, y)),
    "TALR": (eager_talr, lambda x, w, y, r: talr(x.view(SEQUENCES, -1, DIM), w, y.view(SEQUENCES, -1))),
    "LAwF": (
        eager_lawf,
        lambda x, w, y, r: lawf(
            x, w, y, confidence=(torch.arange(TOKENS) % 20 == 0).float(), reference=fl.Reference(r)
        ),
    ),
    "token_losses": (eager_cross_entropy, lambda x, w, y, r: fl.token_losses(x, w, y).nll.mean()),
}


@pytest.mark.parametrize("vocabulary", [1000, 49152])
@pytest.mark.parametrize("who", ["eager", "fused_losses"])
@pytest.mark.parametrize("call", CALLS)
def test_call(benchmark, call: str, who: str, vocabulary: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, r = (torch.randn(TOKENS, DIM, generator=g) for _ in range(2))
    w = torch.randn(vocabulary, DIM, generator=g) * 0.3
    labels = torch.randint(vocabulary, (TOKENS,), generator=g)
    x.requires_grad_()
    w.requires_grad_()
    function = CALLS[call][who == "fused_losses"]
    benchmark.group = f"{call}, V = {vocabulary}"

    def step() -> None:
        x.grad = w.grad = None
        function(x, w, labels, r).backward()

    benchmark.pedantic(step, rounds=30 if vocabulary < 10000 else 8, warmup_rounds=3)
