"""The softmax of a batch as a sparse matrix plus one of rank one, P ≈ S + m qᵀ, and the gradients that follow from it.

S keeps the entries with p > θ_t = θ·√(1 − p[label]) (a confident token's gradient is small, so its entries are finer), m[t]
is the exact mass of the rest, and q, Σq = 1, the mean profile of that rest over evenly spaced sampled tokens. With
S' and m' for S and m times the upstream weights, labels subtracted:

    dx = S' W + m' (qᵀW)        dW = S'ᵀ x + q (m'ᵀx)

Two sparse products instead of two GEMMs, and nothing but S is kept for backward. For the KL the same entries carry
∂kl/∂z = p − p_ref, and the rest is (m − m_ref) qᵀ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend
from ..problem import Entries, Problem, Statistics, Tails
from .certificate import HALF_SCALE, parameters, shares, weighted

ROWS = 1024  # tokens whose rows are in fp32 at a time
# A finer θ asks for entries in more than half precision.
FINEST_HALF = 1e-6


@dataclass
class SparseSoftmax:
    """S, m and q of N tokens, and whatever of their gradient was computed densely on the way."""

    offsets: Tensor  # [N + 1] int64
    columns: Tensor  # [entries] int32
    nll: Tensor  # [entries] ∂nll/∂z: p, and p − 1 at the label; after `with_weights` a ∂nll/∂z + b ∂kl/∂z
    kl: Tensor | None  # [entries] ∂kl/∂z = p − p_ref
    tails: Tails  # [N] each
    profile: Tensor  # [V]
    full: Tensor  # [N] bool: more entries than the capacity, none stored
    done: Tensor  # [N] bool: gradient computed densely in forward
    # [N, D] what dx takes from the entries (SW), where the backend formed it; after `with_weights` S'W
    nll_rows: Tensor | None = None
    kl_rows: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        t = self.tails
        return (
            self.offsets, self.columns, self.nll, self.kl, t.nll, t.nll_l1, t.kl, t.kl_left, t.kl_l1, t.error,
            self.profile, self.full, self.done, self.nll_rows, self.kl_rows,
        )  # fmt: skip

    @staticmethod
    def of_tensors(tensors: tuple[Tensor | None, ...]) -> SparseSoftmax:
        offsets, columns, nll, kl, *tails, profile, full, done, nll_rows, kl_rows = tensors
        return SparseSoftmax(offsets, columns, nll, kl, Tails(*tails), profile, full, done, nll_rows, kl_rows)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors() if t is not None)

    def halved(self) -> SparseSoftmax:
        """The same in less memory where an entry is two float32 numbers; `shares` counts what that rounds."""
        if self.kl is None or self.nll.dtype != torch.float32:
            return self
        nll, kl = (entries.mul(HALF_SCALE).half() for entries in (self.nll, self.kl))
        return replace(self, nll=nll, kl=kl)

    def values(self, a: Tensor | None, b: Tensor | None) -> Tensor:
        """The entries of S' = a ∂nll/∂z + b ∂kl/∂z."""
        return weighted(self.offsets.diff(), self.nll, self.kl, a, b)

    def with_weights(self, a: Tensor | None, b: Tensor | None) -> SparseSoftmax:
        """The same with upstream weights that are known put in, so that an entry is one number also where there is a KL."""
        if a is None and b is None:
            a = torch.zeros_like(self.tails.nll)
        error, norm = self.shares(a, b)
        parts = [w * tail for w, tail in ((a, self.tails.nll), (b, self.tails.kl)) if w is not None]
        tail = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        tails = Tails(nll=tail, nll_l1=norm, error=error)
        rows = None if self.nll_rows is None else self.rows(a, b)
        return replace(self, nll=self.values(a, b), kl=None, tails=tails, nll_rows=rows, kl_rows=None)

    def rows(
        self, a: Tensor | None, b: Tensor | None, tail: Tensor | None = None, mean: Tensor | None = None
    ) -> Tensor:
        """a·nll_rows + b·kl_rows + tail·mean in the dtype of the rows, computed in fp32, some tokens at a time."""
        out = torch.empty_like(self.nll_rows)
        for at in (slice(i, i + ROWS) for i in range(0, len(out), ROWS)):
            parts = [
                w[at, None] * rows[at]
                for w, rows in ((a, self.nll_rows), (b, self.kl_rows))
                if w is not None and rows is not None
            ]
            if tail is not None:
                parts.append(tail[at, None] * mean)
            out[at] = sum(parts)
        return out

    def shares(self, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
        return shares(self.tails, self.offsets.diff(), self.nll, self.kl, a, b)


class Builder:
    """Collects the entries of one chunk after the other."""

    def __init__(self, problem: Problem, backend: Backend, rows: bool) -> None:
        self.problem, self.backend, self.rows = problem, backend, rows
        self.threshold, self.capacity = parameters(problem.tolerance, problem.head.vocabulary)
        n, device = len(problem.labels), problem.hidden.device
        most = min(n, backend.SAMPLED_TOKENS)
        self.sampled = torch.arange(most, device=device) * n // max(1, most)
        self.profile = torch.zeros(problem.head.vocabulary, dtype=problem.accumulator, device=device)
        self.chunks: list[Entries] = []
        self.done: list[Tensor] = []

    def scan(self, out: Statistics) -> Iterator[tuple[Any, Entries]]:
        """The chunks of the backend's sweep, each to be given to `add`."""
        return self.backend.scan(
            self.problem, out, self.threshold, self.capacity, self.sampled, self.profile, self.rows
        )

    def add(self, entries: Entries, done: bool) -> None:
        """`done`: the chunk's gradient has been computed densely, so its entries are dropped."""
        if done:
            none = entries.columns[:0]
            kl = None if entries.kl is None else entries.kl[:0]
            entries = Entries(
                torch.zeros_like(entries.counts), none, entries.nll[:0], kl, entries.tails, entries.nll_rows,
                entries.kl_rows,
            )  # fmt: skip
        self.chunks.append(entries)
        self.done.append(torch.full_like(entries.counts, done, dtype=torch.bool))

    def finish(self) -> SparseSoftmax:
        """All chunks as one."""
        chunks = self.chunks
        counts = torch.cat([c.counts for c in chunks])
        offsets = counts.new_zeros(len(counts) + 1)
        torch.cumsum(counts.clamp(min=0), 0, out=offsets[1:])
        tails = [c.tails for c in chunks]
        with_kl = chunks[0].kl is not None

        def join(name: str) -> Tensor | None:
            return torch.cat([getattr(t, name) for t in tails]) if with_kl or name.startswith("nll") else None

        # The sum is of the same value however many threads take part in it.
        total = self.profile.sum(dtype=torch.float64).to(self.profile.dtype)
        return SparseSoftmax(
            offsets=offsets,
            columns=torch.cat([c.columns for c in chunks]),
            nll=torch.cat([c.nll for c in chunks]),
            kl=torch.cat([c.kl for c in chunks]) if with_kl else None,
            tails=Tails(*(join(name) for name in ("nll", "nll_l1", "kl", "kl_left", "kl_l1"))),
            profile=torch.where(total > 0, self.profile / total, 0),
            full=counts < 0,
            done=torch.cat(self.done),
            nll_rows=None if chunks[0].nll_rows is None else torch.cat([c.nll_rows for c in chunks]),
            kl_rows=None if chunks[0].kl_rows is None else torch.cat([c.kl_rows for c in chunks]),
        )
