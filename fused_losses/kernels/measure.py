"""What `tune`, the benchmarks and the checks on a GPU share: inputs as a fine-tuned language model has them, and a
clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Logits are −PRIOR log(rank) + noise of deviation NOISE, and CANDIDATES ids a token that are raised by up to BOOST ±
# SPREAD: chosen so that about 150 to 300 entries a token matter and the mean nll is about 2, at V of 50,000 to 150,000
# (`Inputs.figures` says).
PRIOR, NOISE, CANDIDATES, BOOST, SPREAD = 1.3, 2.5, 4, 12.5, 4.0
# Noise of the reference's hidden states, for a KL of a few thousandths.
APART = 0.1
# Numbers of a temporary on the way.
TEMPORARY = 1 << 27
# More than any GPU's L2 cache.
FLUSH_BYTES = 256 << 20


@dataclass
class Inputs:
    """Of one call; the head has neither bias nor scale."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [N]
    reference_hidden: Tensor  # [N, D]

    def figures(self, threshold: float, most: int = 2048) -> dict[str, float]:
        """Mean nll, kl, and entries per token above `threshold`, of evenly spaced tokens."""
        every = max(1, len(self.labels) // most)
        nll, entries, kl = [], [], []
        weight = self.weight.double()  # 1 − p[label] of certain tokens is far below the rounding of float32
        for x, r, y in _chunks(len(weight), self.hidden[::every], self.reference_hidden[::every], self.labels[::every]):
            log_p, log_r = ((h.double() @ weight.T).log_softmax(1) for h in (x, r))
            nll.append(-log_p.gather(1, y[:, None])[:, 0])
            least = threshold * torch.expm1(-nll[-1]).neg().sqrt()
            entries.append((log_p.exp() > least[:, None]).sum(1))
            kl.append((log_r.exp() * (log_r - log_p)).sum(1))
        found = {"nll": nll, "entries": entries, "kl": kl}
        return {name: torch.cat(parts).double().mean().item() for name, parts in found.items()}


def language_like(n: int, d: int, v: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Inputs:
    """Logits like those of a fine-tuned language model, labels drawn from them.

    The first hidden dimension is 1 and its weights are the ids' log-frequencies, by Zipf's law over a ragged order; the
    others make noise, and raise a few ids a token by pointing along their rows of the weight.
    """
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    weight = normal(v, d).mul_(max(1, d - 1) ** -0.5)
    order = (torch.arange(1, v + 1, device=device).log() + 0.5 * normal(v)).argsort().argsort()
    weight[:, 0] = -PRIOR * (order + 2.7).log()
    weight = weight.to(dtype)
    frequency = weight[:, 0].float().mul(0.6).softmax(0)
    candidates = torch.multinomial(frequency, n * CANDIDATES, replacement=True, generator=g).view(n, CANDIDATES)
    boost = (BOOST + SPREAD * normal(n, 1)).clamp(min=0) * torch.rand(n, CANDIDATES, generator=g, device=device)
    boost[:, 0] = (BOOST + SPREAD * normal(n)).clamp(min=0)
    hidden = normal(n, d).mul_(NOISE)
    for k in range(CANDIDATES):
        rows = weight[candidates[:, k]].float()
        rows[:, 0] = 0
        hidden.addcmul_(rows, boost[:, k, None] / rows.square().sum(1, keepdim=True).clamp(min=1e-6))
    moved = hidden + APART * normal(n, d)
    hidden[:, 0] = moved[:, 0] = 1
    hidden, moved = hidden.to(dtype), moved.to(dtype)
    return Inputs(hidden, weight, _drawn(hidden, weight, g), moved)


def flat(n: int, d: int, v: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Inputs:
    """Those of a model at random initialisation."""
    g = torch.Generator(device).manual_seed(seed)
    hidden, moved = (torch.randn(n, d, generator=g, device=device) for _ in range(2))
    weight = torch.randn(v, d, generator=g, device=device).mul_(0.02).to(dtype)
    labels = torch.randint(v, (n,), generator=g, device=device)
    return Inputs(hidden.to(dtype), weight, labels, (hidden + APART * moved).to(dtype))


DISTRIBUTIONS: dict[str, Callable[..., Inputs]] = {"language-like": language_like, "flat": flat}


def _drawn(hidden: Tensor, weight: Tensor, g: torch.Generator) -> Tensor:
    columns = weight.float().T
    parts = [
        torch.multinomial((x.float() @ columns).softmax(1), 1, generator=g)[:, 0]
        for (x,) in _chunks(len(weight), hidden)
    ]
    return torch.cat(parts)


def _chunks(vocabulary: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    size = max(1, TEMPORARY // vocabulary)
    return list(zip(*(t.split(size) for t in tensors), strict=True))


class Clock:
    """Milliseconds of calls on a device, from events on its stream; on a CPU those of the wall clock, for dry runs
    only."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES if self.cuda else 1, dtype=torch.int8, device=self.device)

    def once(self, function: Callable[[], object], cold: bool = False) -> float:
        """One call. `cold`: the L2 cache is filled with something else before; this also hides the time of the
        launch."""
        if cold:
            self._flush.zero_()
        if not self.cuda:
            start = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def rounds(
        self, functions: dict[str, Callable[[], object]], rounds: int, warm: int = 2, cold: bool = False
    ) -> dict[str, list[float]]:
        """Every round runs each function once, in turn, so that all see the same state of the machine."""
        times: dict[str, list[float]] = {name: [] for name in functions}
        for number in range(-warm, rounds):
            for name, function in functions.items():
                taken = self.once(function, cold)
                if number >= 0:
                    times[name].append(taken)
        return times


def median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
