"""The softmax of a batch as a sparse matrix plus one of rank one, P ≈ S + m qᵀ, and the gradients that follow from it.

S keeps the entries with p > θ_t = θ·√(1 − p[label]) (a confident token's gradient is small, so its entries are finer), m[t]
is the exact mass of the rest, and q, Σq = 1, the mean profile of that rest over evenly spaced sampled tokens. With
S' and m' for S and m times the upstream weights, labels subtracted:

    dx = S' W + m' (qᵀW)        dW = S'ᵀ x + q (m'ᵀx)

Two sparse products instead of two GEMMs, and nothing but S is kept for backward. For the KL the same entries carry
∂kl/∂z = p − p_ref, and the rest is (m − m_ref) qᵀ.

Certificate. What replaces the rest of a row, m q, differs from it by at most m + m in L1 norm; a row's whole gradient of the
logits has L1 norm 2(1 − p[label]). Both are known exactly, so the relative L1 error of the gradient of all logits is bounded
by Σ|a_t| 2 m[t] / Σ|a_t| 2(1 − p_t[label]). Tokens with the largest share get exact gradients, from logits computed
once more, until the bound is within the tolerance. docs/method.md has the derivation and what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .backends import Backend
from .backends.torch import by_column
from .problem import Entries, Gradients, Problem, Statistics, Tails

# Measured on SmolLM2 (docs/method.md): at this tolerance no token of ordinary text needs exact gradients, the
# relative L2 error of dx is below 0.8 % for cross-entropy and 2 % for a KL of 0.003.
TOLERANCE = 0.15
THRESHOLD = 1.1e-4
CAPACITY = 2048
ROWS = 1024  # tokens whose rows are in fp32 at a time
# Where an entry is two numbers, in [−1, 1], they are kept as float16 of HALF_SCALE times them, so that it takes 8 bytes as others do.
# Rounding: at most HALF_UNIT of the number, and HALF_FLOOR near 0. A θ finer than FINEST_HALF asks for better.
HALF_SCALE, HALF_UNIT, HALF_FLOOR = 2.0**15, 2.0**-11, 2.0**-40
FINEST_HALF = 1e-6
# Of "auto": below, most entries could be above the threshold, and there is little to save.
SMALLEST_VOCABULARY = 8192


def parameters(tolerance: float, vocabulary: int) -> tuple[float, int]:
    """θ and the most entries per token. The bound falls with √θ, measured; a coarser θ than the default saves little."""
    finer = max(min(1.0, tolerance / TOLERANCE) ** 2, 1e-12)
    return THRESHOLD * finer, min(vocabulary, max(CAPACITY, min(int(CAPACITY * finer**-0.65), vocabulary // 8)))


@dataclass
class GradientReport:
    """How the gradient of one call was formed. The certified numbers come with backward, which knows the upstream weights.

    Attributes:
        mode: "sparse"; "exact", where nothing is approximated; "none", where no gradient was asked for.
        tolerance: the bound asked for, None but in sparse mode.
        tokens: N, without ignored ones. It and the numbers below are None where `torch.compile` has made `token_losses` part
            of a graph; those of objectives are filled in also there.
        entries: kept in S, all tokens together.
        saved_bytes: kept for backward besides the inputs: S, what belongs to it, and gradients taken in forward of tokens that
            are too flat for it.
        exact_tokens: how many got exact gradients; None before backward.
        bound: certified bound of ‖error‖₁ / ‖gradient‖₁ for the gradient of the logits as computed; rounding comes on top. At
            most `tolerance`; 0 where all tokens are exact, NaN where a loss or an upstream gradient is not finite, None
            before backward. It does not bound the errors of dx and dW in other norms: docs/method.md has what these were.
    """

    mode: str
    tokens: int | None
    tolerance: float | None = None
    entries: int | None = 0
    saved_bytes: int | None = 0
    exact_tokens: int | None = None
    bound: float | None = None

    def begin(self, tolerance: float | None, wanted: bool) -> bool:
        """Whether gradients will be sparse; notes it. `wanted`: whether there will be any."""
        sparse = tolerance is not None and wanted and self.tokens != 0
        if sparse:
            self.mode, self.tolerance = "sparse", tolerance
        elif wanted:
            self.mode, self.exact_tokens, self.bound = "exact", self.tokens, 0.0
        return sparse

    def __str__(self) -> str:
        if self.mode != "sparse":
            kind = "exact" if self.mode == "exact" else "no"
            return f"{kind} gradients" + ("" if self.tokens is None else f" for {self.tokens} tokens")
        limit = f"tolerance {100 * self.tolerance:.3g} %"
        if self.tokens is None:
            return f"sparse gradients ({limit})"
        if self.bound is not None and math.isnan(self.bound):
            return f"sparse gradients: no bound, as a loss or an upstream gradient is not finite ({limit})"
        if self.exact_tokens == self.tokens:
            return f"sparse gradients: all {self.tokens} tokens exact, as too few of their entries stand out ({limit})"
        text = f"sparse gradients: {self.tokens} tokens, {self.entries / max(1, self.tokens):.0f} entries each, "
        text += f"{self.saved_bytes / 2**20:.1f} MiB saved"
        if self.bound is None:
            return f"{text}; bound known after backward ({limit})"
        text += f"; {self.exact_tokens} of them exact, L1 error of the logits' gradient ≤ {100 * self.bound:.3g} %"
        return f"{text} ({limit})"


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


def weighted(counts: Tensor, nll: Tensor, kl: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
    """a·nll + b·kl, entry by entry; `counts` per token."""
    parts = [
        torch.repeat_interleave(weight, counts, output_size=len(nll)).mul_(_single(entries))
        for weight, entries in ((a, nll), (b, kl))
        if weight is not None
    ]
    return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])


def _single(entries: Tensor) -> Tensor:
    return entries.float().div_(HALF_SCALE) if entries.dtype == torch.float16 else entries


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


def shares(
    tails: Tails, counts: Tensor, nll: Tensor, kl: Tensor | None, a: Tensor | None, b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Per token: what the error of its logits' gradient is at most, and what the gradient's L1 norm is at least."""
    if tails.error is not None:
        return a.abs() * tails.error, a.abs() * tails.nll_l1
    rounding: Tensor | float = 0.0
    if nll.dtype == torch.float16:
        norms = ((a, tails.nll_l1), (b, tails.kl_l1))
        rounding = sum(w.abs() * (HALF_UNIT * l1 + HALF_FLOOR * counts) for w, l1 in norms if w is not None)
    if b is None:
        return 2 * a.abs() * tails.nll + rounding, a.abs() * tails.nll_l1
    if a is None:
        return b.abs() * (tails.kl_left + tails.kl.abs()) + rounding, b.abs() * tails.kl_l1
    together = (a * tails.nll + b * tails.kl).abs()
    error = a.abs() * tails.nll + b.abs() * tails.kl_left + together + rounding
    norm = (a.abs() * tails.nll_l1 - b.abs() * tails.kl_l1).abs()  # exact where one of a and b is 0
    if bool(((a != 0) & (b != 0)).any()):
        kept = torch.segment_reduce(weighted(counts, nll, kl, a, b).abs(), "sum", lengths=counts, initial=0)
        norm = torch.maximum(norm, kept - rounding + together)
    return error, norm


def select(error: Tensor, norm: Tensor, forced: Tensor, tolerance: float) -> tuple[Tensor, float]:
    """The fewest tokens without which Σ error ≤ tolerance · Σ norm, ascending, and the bound that then holds.

    `forced` tokens are among them, and so is every token whose error is not a number.
    """
    finite = error.isfinite()
    forced = forced | ~finite
    left = torch.where(forced, 0, error).double()
    total = torch.where(norm.isfinite(), norm, 0).clamp(min=0).double().sum()
    numbers = (left.sum(), total, forced.any(), (finite & norm.isfinite()).all())
    everything, total, some_forced, all_finite = torch.stack([n.double() for n in numbers]).tolist()
    exact, bound = forced[:0].long(), everything
    if some_forced or not everything <= tolerance * total:
        # Rare. On the CPU: on a GPU a running sum is not the same from run to run.
        chosen, left = forced.cpu(), left.cpu()
        order = left.argsort(descending=True, stable=True)
        # What is left when the k largest are taken out; from the small end, so that it does not cancel.
        remaining = torch.cat([left[order].flip(0).cumsum(0).flip(0), left.new_zeros(1)])
        count = int((remaining > tolerance * total).sum())
        chosen[order[:count]] = True
        exact, bound = chosen.nonzero().flatten().to(error.device), float(remaining[count])
    if not all_finite:
        return exact, float("nan")
    return exact, bound / total if len(exact) < len(error) and total > 0 else 0.0


def mostly_exact(entries: Entries, a: Tensor | None, b: Tensor | None, tolerance: float) -> bool:
    """Whether more than half of a chunk's tokens would need exact gradients, taken by itself."""
    if a is None and b is None:
        return False
    error, norm = shares(entries.tails, entries.counts.clamp(min=0), entries.nll, entries.kl, a, b)
    exact, _ = select(error, norm, entries.counts < 0, tolerance)
    return len(exact) > len(error) / 2


def gradients(
    problem: Problem,
    backend: Backend,
    sparse: SparseSoftmax,
    a: Tensor | None,
    b: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
    report: GradientReport,
    dense: Gradients | None = None,
    factor: Tensor | None = None,
) -> Gradients:
    """Σ_t a_t ∂nll_t + b_t ∂kl_t for hidden, weight, bias and low_rank, in the inputs' dtypes.

    `dense`: that of the tokens that are done. `factor`: a common factor of all weights, where `sparse` has them in itself
    (`with_weights`) and so has `dense`.
    """
    dense_scale = 1.0 if factor is None or dense is None else float(factor)
    if factor is not None:
        factor = factor.to(sparse.tails.nll.dtype).expand_as(sparse.tails.nll)
        a, b = (None if w is None else w * factor for w in (a, b))
    need_hidden, need_weight, need_bias, need_low_rank = needs
    head = problem.head
    if a is None and b is None:
        a = torch.zeros_like(sparse.tails.nll)
    error, norm = sparse.shares(a, b) if factor is None else sparse.shares(factor, None)
    exact, report.bound = select(torch.where(sparse.done, 0, error), norm, sparse.full, problem.tolerance)
    todo = int((~sparse.done).sum())
    if len(exact) > todo / 2:
        exact, report.bound = (~sparse.done).nonzero().flatten(), 0.0 * report.bound
    report.exact_tokens = len(exact) + len(sparse.done) - todo

    out = dense
    if len(exact):
        out = _exact(problem, backend, exact, a, b, needs, dense, dense_scale)
        dense_scale = 1.0
    if len(exact) == todo:
        assert out is not None or not todo
        return _finished(problem, out, dense_scale, needs)

    skip = sparse.done.clone()
    skip[exact] = True
    scale = head.logit_scale
    if factor is not None:
        a, b = factor, None
    a, b = (None if w is None else torch.where(skip, 0, w * scale) for w in (a, b))
    values = sparse.values(a, b)
    parts = [w * tail for w, tail in ((a, sparse.tails.nll), (b, sparse.tails.kl)) if w is not None]
    tail = torch.where(skip, 0, sum(parts))
    result = Gradients()
    rows, dim = problem.hidden.to(problem.dtype), head.weight.shape[1]
    if need_hidden:
        factors = [f.to(problem.dtype) for f in (head.weight, head.low_rank) if f is not None]
        means = [backend.weighted_sum(factor, sparse.profile) for factor in factors]
        if sparse.nll_rows is not None:
            result.hidden = sparse.rows(a, b, tail, torch.cat(means)).to(problem.hidden.dtype)
        else:
            products = [
                backend.rows_product(
                    sparse.offsets, sparse.columns, values, factor, tail, mean, problem.hidden.dtype
                )
                for factor, mean in zip(factors, means, strict=True)
            ]  # fmt: skip
            result.hidden = products[0] if len(products) == 1 else torch.cat(products, 1)
        if out is not None and out.hidden is not None:
            at = skip.nonzero().flatten()
            result.hidden.index_copy_(0, at, (out.hidden[at] * dense_scale).to(result.hidden.dtype))

    def columns_product(matrix: Tensor, base: Tensor | None, dtype: torch.dtype) -> Tensor:
        return backend.columns_product(
            sparse.offsets, sparse.columns, values, matrix, sparse.profile, backend.weighted_sum(matrix, tail),
            base, dense_scale, dtype,
        )  # fmt: skip

    if need_weight:
        result.weight = columns_product(rows[:, :dim], None if out is None else out.weight, head.weight.dtype)
    if need_low_rank:
        result.low_rank = columns_product(rows[:, dim:], None if out is None else out.low_rank, head.low_rank.dtype)
    if need_bias:
        bias = sparse.profile * tail.sum()
        starts, _, order = by_column(sparse.offsets, sparse.columns, len(bias))
        bias += torch.segment_reduce(values[order], "sum", offsets=starts, initial=0)
        if out is not None and out.bias is not None:
            bias.add_(out.bias, alpha=dense_scale)
        result.bias = bias.to(head.bias.dtype)
    return result


def _exact(
    problem: Problem, backend: Backend, exact: Tensor, a: Tensor | None, b: Tensor | None,
    needs: tuple[bool, bool, bool, bool], dense: Gradients | None, dense_scale: float,
) -> Gradients:  # fmt: skip
    """The exact gradients of some tokens, their logits computed once more, plus what is there already; hidden at its rows."""
    upstream: Callable = lambda _, at: tuple(None if w is None else w[exact[at]] for w in (a, b))  # noqa: E731
    _, some = backend.gradients(replace(problem.rows(exact), wanted=frozenset()), upstream, *needs)
    out = Gradients(weight=some.weight, bias=some.bias, low_rank=some.low_rank)
    if needs[0]:
        out.hidden = torch.zeros_like(problem.hidden, dtype=some.hidden.dtype)
        if dense is not None and dense.hidden is not None:
            torch.mul(dense.hidden, dense_scale, out=out.hidden)
        out.hidden[exact] = some.hidden
    if dense is not None:
        pairs = (out.weight, dense.weight), (out.bias, dense.bias), (out.low_rank, dense.low_rank)
        for total, before in pairs:
            if total is not None and before is not None:
                total.add_(before, alpha=dense_scale)
    return out


def _finished(
    problem: Problem, total: Gradients | None, scale: float, needs: tuple[bool, bool, bool, bool]
) -> Gradients:
    """New tensors of the inputs' dtypes, so that backward may run again."""
    like = (problem.hidden, problem.head.weight, problem.head.bias, problem.head.low_rank)
    parts = (None,) * 4 if total is None else (total.hidden, total.weight, total.bias, total.low_rank)
    results: list[Tensor | None] = []
    for need, part, tensor in zip(needs, parts, like, strict=True):
        if not need:
            results.append(None)
        elif part is None:
            results.append(torch.zeros_like(tensor))
        else:
            results.append(torch.mul(part, scale, out=torch.empty_like(part, dtype=tensor.dtype)))
    return Gradients(*results)
