"""The sweep with products of 8-bit numbers, `scan="int8"`.

Each token and each row of the head has a scale of its own, so an element of either is wrong by at most 1/254 of the
largest of its row. That is enough where only sums are wanted; logits whose p stands out are computed again from the
full numbers (`Sweep.operands`). Where a few channels are much larger than others, x and W share them between each
other: x·W = (x / c)·(c W), c by a sample. What is wrong with the nll then is measured on a few tokens, and where it is
more than `MOST_ERROR` the sweep goes on with full products.

Source: scales per row and per token, and c = √(max|x| / max|W|) per channel, are SmoothQuant's (arXiv 2211.10438).
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..kernels import schemas
from ..problem import Entries, Problem, Statistics, Tails
from . import chunks, half, row_passes
from .chunks import Chunk, Product

# Nats, of the sampled tokens' nll on average. Measured on real text: 0.0004 to 0.0024, and 0.013 to 0.025 with ordinary
# bfloat16 logits.
MOST_ERROR = 0.01
# Part of the mean KL, which is small and has to be right beside the nll.
MOST_KL_ERROR = 0.02
THRESHOLD = 1e-4  # of p, from which on logits are exact in a pass without gradients; times √(1 − p[label])
# Times the threshold of an entry, from which on logits are exact in csrc/cpu/refine.inc. GPUs have all entries' exact.
REFINED = 4
# Standard deviation of the error of a token's logits up to which 8 bits will do. On real text 0.13, and 0.23 at most.
MOST_SPREAD = 0.4
MOST_WIDE_ROWS = 1 / 16  # of the head, that have full products of their own
MEASURED = 16  # tokens, fewer in calls of less than 64 times as many
# Entropy of the sampled tokens, as part of the largest, log V, from which on gradients will be exact, from
# full products; the first may be full at once then.
FLAT = 0.85
FLAT_NOTE = "distributions are flat, and their gradients exact"
AT_A_TIME = 1 << 18  # numbers of the hidden states
SAMPLED_ROWS = 64, 256  # of x and W: what the channels' factors are chosen by
NO_OPERANDS = (*[None] * 7, 1.0)
BLOCK = 128  # rows of the head that are quantised together: INT8_VOCABULARY of csrc/cpu/kernels.h
# Of the head in 8 bits, for the chunks that follow; all of it where chunks can be so much smaller. Measured (D = 2048,
# 100 MB in 8 bits): 0.95 of the time. Chunks of up to 32 MiB are memory that glibc keeps, whose pages need not be
# given again in each call: 0.97 of the time that chunks of 64 MiB take.
KEPT_BYTES = 64 << 20
CHUNKS = 24 << 20, 30 << 20  # bytes of a chunk while all of the head is kept
HALF_CHUNK = 31 << 20, 37 << 20  # with logits in float16: of these, and with their entries
GATHERED = 1 << 20  # numbers of the head that are gathered at a time
LARGEST_WIDTH = 1 << 15  # 255 · 127 · D must stay below 2^31
GAIN = 0.9  # channels are shared where that makes the error of logits less than so much of it


def missing(problem: Problem, backend: str) -> str | None:
    """Why a sweep cannot take products of 8-bit numbers; None where it can."""
    if problem.head.shard is not None:
        return "the head is spread over ranks, for which there are no products of 8-bit numbers"
    on_gpu = backend in ("triton", "cuda")
    if not on_gpu and (backend != "cpu" or schemas.load() is not None):
        return f"the backend {backend} has no products of 8-bit numbers (cpu, triton and cuda have)"
    if problem.dtype not in (torch.float32, torch.bfloat16, *([torch.float16] if on_gpu else [])):
        taken = "float32, bfloat16 and float16" if on_gpu else "float32 and bfloat16"
        return f"the products are of {str(problem.dtype).removeprefix('torch.')}; those of 8 bits are for {taken}"
    if problem.head.weight.shape[1] > LARGEST_WIDTH:
        return f"hidden states have more than {LARGEST_WIDTH} numbers"
    if problem.reference_head is not None:
        return "there are two heads (reference and model), and p − p_ref would be the difference of two roundings"
    others = [name for name, there in (
        ("single logits (ids)", problem.ids is not None), ("a divergence (beta)", problem.beta is not None),
        ("a gradient of the entropy", problem.entropy_gradient), ("the rank of a label", "rank" in problem.wanted),
    ) if there]  # fmt: skip
    if others:
        return f"all logits are needed as they are, for {others[0]}"
    if on_gpu:
        from . import gpu_int8

        return gpu_int8.missing(problem)
    return None


class Int8Product:
    """x Wᵀ + b of 8-bit numbers; of full ones, by `whole`, while `full` is set.

    `kept_bytes`: so many of the head stay in 8 bits, for the products that follow.
    """

    def __init__(self, channel: Tensor | None, whole: Product, kept_bytes: int, logit_scale: float = 1.0) -> None:
        self.channel, self.logit_scale = channel, logit_scale
        self.inverse = None if channel is None else channel.reciprocal()
        self.whole = whole
        self.off = False  # by too much, where measured: full products from then on
        self.flat = False  # the chunk before got exact gradients
        self.kept_bytes = kept_bytes
        self.head: tuple[Tensor, ...] | None = None
        self.squares: tuple[float, float] | None = None
        self.mean: Tensor | None = None  # [D] of the head's rows, times the channel
        self.scales: Tensor | None = None  # [V] of the head's rows
        self.wide_rows: Tensor | None = None  # of the head, which have full products
        self.too_wide = 0  # hidden states, which got full products
        self.none_wide = False  # known of all that will come

    @property
    def full(self) -> bool:
        return self.off or self.flat

    @property
    def takes_wide(self) -> bool:
        return self.whole is chunks.project if self.full else True

    def __call__(self, out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        if self.full:
            self.whole(out, hidden, weight, bias)
            return
        self.sample(weight)
        none = torch.empty(0, dtype=torch.int64)
        wide = none if self.none_wide else too_wide(hidden, self.inverse, self.squares, self.logit_scale)
        self.too_wide += len(wide)
        if self.head is None:
            self.head = self._head(weight)
        exact = None if not len(wide) else self._exactly(hidden[wide], weight, bias, out.dtype)
        bias = None if bias is None else bias.float().contiguous()
        torch.ops.fused_losses.int8_logits(
            hidden.contiguous(), self.inverse, weight, self.channel, self.mean, *self.head, bias, out
        )  # fmt: skip
        if self.wide_rows is not None:
            of_rows = None if bias is None else bias[self.wide_rows]
            out[:, self.wide_rows] = self._exactly(hidden, weight[self.wide_rows], of_rows, out.dtype)
        if exact is not None:
            out[wide] = exact

    def sample(self, weight: Tensor, dtype: torch.dtype | None = None) -> None:
        """What products need to know of the head, in `dtype` where it is not in that of its weight."""
        if self.squares is None:
            rows = _spread(weight, SAMPLED_ROWS[1])
            self.squares, self.mean = squares_of(rows if dtype is None else rows.to(dtype), self.channel)

    def half(
        self, out: Tensor, largest: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float,
        label_logits: Tensor,
    ) -> None:  # fmt: skip
        """Logits in float16, less the labels'; see `half`."""
        if self.head is None:
            self.head = self._head(weight)
        torch.ops.fused_losses.half_logits(
            hidden, self.inverse, weight, self.channel, self.mean, *self.head, bias, scale, label_logits, out, largest
        )

    def _exactly(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Full products of some tokens."""
        out = torch.empty(len(hidden), len(weight), dtype=dtype)
        narrow = hidden.to(weight.dtype)
        self.whole(out, narrow.contiguous(), weight, bias)
        if hidden.dtype != narrow.dtype:  # a difference: its digits that bfloat16 has not, twice
            rest = hidden - narrow.to(hidden.dtype)
            more = torch.empty_like(out)
            for _ in range(2):
                part = rest.to(weight.dtype)
                self.whole(more, part.contiguous(), weight, None)
                out += more
                rest = rest - part.to(rest.dtype)
        return out

    def _head(self, weight: Tensor, few: tuple[Tensor | None, ...] | None = None) -> tuple[Tensor, ...]:
        quads, blocks_of_all = _shape_of(weight)
        count = min(blocks_of_all, self.kept_bytes // (4 * quads * BLOCK))
        blocks = torch.empty(count, quads, BLOCK, 4, dtype=torch.uint8)
        scales, sums = (torch.empty(count * BLOCK, dtype=dtype) for dtype in (torch.float32, torch.int32))
        if count or few is not None:
            torch.ops.fused_losses.int8_head(weight, self.channel, blocks, scales, sums, *few or (None,) * 4)
        return blocks, scales, sums

    def first(self, out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Full products of a few tokens, while the head, which is read for it, becomes 8 bits."""
        if self.head is not None or hidden.dtype == torch.float64 or len(hidden) > MEASURED:
            self.whole(out, hidden, weight, bias)
            return
        bias = None if bias is None else bias.float().contiguous()
        self.scales = torch.empty(len(weight), dtype=torch.float32)
        self.head = self._head(weight, (hidden.float().contiguous(), bias, out, self.scales))


class Sweep:
    """What a scan with 8-bit products needs besides those: exact logits that matter, and what the rest is off by."""

    def __init__(
        self, problem: Problem, whole: Product, exact: Callable[[Problem, Product], Statistics], gradients: bool
    ) -> None:
        self.problem, self.found = problem, problem.int8
        assert self.found is not None
        count, head = len(problem.labels), problem.head
        self._of_rows = ""
        product = self.product = Int8Product(channel_of(problem), whole, 0, head.logit_scale)
        if count and not problem.has_reference:
            product.sample(head.weight, problem.dtype)
            rows = problem.hidden[:, : head.weight.shape[1]]
            product.none_wide = not len(too_wide(rows, product.inverse, product.squares, product.logit_scale))
        self._halves = half.is_possible(problem, product.none_wide)
        # In one chunk a reference takes a second product, and there is nothing that smaller chunks would leave.
        kept, self._chunk_bytes = KEPT_BYTES if problem.has_reference else 0, chunks.CHUNK_BYTES
        if (2 if self._halves else 4) * count * head.vocabulary > chunks.CHUNK_BYTES:
            kept, self._chunk_bytes = _memory(head.weight, self._halves)
        product.kept_bytes = kept
        measured = min(MEASURED, max(2, count // 64), count)
        self.sample = torch.arange(measured) * count // max(1, measured)
        sampled = replace(problem.rows(self.sample).for_gradients(), int8=None, wanted=frozenset({"entropy"}))
        self.truth = exact(sampled, product.first) if count else None
        if product.scales is not None:
            self._set_wide_rows(product.scales)
        if gradients and count and float(self.truth.entropy.median()) > FLAT * math.log(problem.head.vocabulary):
            self.product.flat, self.found.note = True, FLAT_NOTE
        # As lists: a chunk takes one look at them, and each operation on a few numbers takes longer than all of it.
        self._at: list[int] = self.sample.tolist()
        self._true_nll: list[float] = self.truth.nll.tolist() if count else []
        self._true_kl: list[float] = self.truth.kl.tolist() if count and problem.has_reference else []
        self.errors: list[float] = []
        self.kl_errors: list[float] = []

    def _set_wide_rows(self, scales: Tensor) -> None:
        """Finds rows of the head that 8 bits are too few for; a few have full products, of many all have."""
        product, head = self.product, self.problem.head
        rows = too_wide_rows(self.problem.hidden[:, : head.weight.shape[1]], product.inverse, scales, head.logit_scale)
        if not len(rows):
            return
        self._of_rows = f"{len(rows)} of {len(scales)} rows of the head"
        if len(rows) <= MOST_WIDE_ROWS * len(scales):
            product.wide_rows, self._halves = rows, False
            others = scales.index_fill(0, rows, 0)  # tokens are not to be too wide for the sake of these rows
            product.squares = product.squares and (product.squares[0], float(others.square().mean()))
            return
        product.off, product.head = True, None
        self.found.note = f"8 bits are too few for {self._of_rows}"

    @property
    def chunk_bytes(self) -> int:
        """Of a chunk's logits, as `chunks.CHUNK_BYTES`."""
        return chunks.CHUNK_BYTES if self.product.full else self._chunk_bytes

    @property
    def halves(self) -> bool:
        """Whether logits are kept in float16."""
        return self._halves and not self.product.full

    def whole_chunks(self, tokens: slice) -> Callable[[], Iterator[Chunk]]:
        """Makes chunks of these tokens with full products."""
        return functools.partial(
            chunks.logit_chunks, self.problem, self.product.whole, narrow=True, budget=self._chunk_bytes,
            separate=False, tokens=tokens,
        )  # fmt: skip

    def operands(self, chunk: Chunk) -> tuple[Any, ...]:
        """What `compact` makes exact logits of a chunk from; nothing where they are exact already."""
        if self.product.full:
            return NO_OPERANDS
        problem, dim = self.problem, chunk.weight.shape[1]
        rows, head, keeps = problem.hidden[chunk.tokens], problem.head, chunks.keeps_difference(problem, chunk)
        reference = None if chunk.r is None else problem.reference_hidden[chunk.tokens]
        if keeps:
            rows = chunks.difference_of(problem, rows, reference)
        low_rank, bias = (None if t is None else t.float().contiguous() for t in (head.low_rank, head.bias))

        def split(part: Tensor | None, wide: bool) -> tuple[Tensor | None, Tensor | None]:
            """[x, u] in float32, x rounded as the full product would; `wide`: nor would that."""
            if part is None:
                return None, None
            x = part[:, :dim] if wide else part[:, :dim].to(chunk.weight.dtype)
            low = part[:, dim:] if part.shape[1] > dim and low_rank is not None else None
            return x.float().contiguous(), None if low is None else low.float().contiguous()

        (hidden, low_hidden), (of_reference, low_reference) = split(rows, keeps), split(reference, False)
        return (
            hidden, of_reference, chunk.weight, low_rank, low_hidden, low_reference, bias, head.logit_scale,
        )  # fmt: skip

    def top_entropies(self, chunk: Chunk) -> Tensor:
        """[C] of the `top_k` largest logits, of full products: where one p is nearly 1 they lie in the others, which
        `compact` leaves as they are. They are sought among twice as many of the logits that are there."""
        problem, head, dim = self.problem, self.problem.head, chunk.weight.shape[1]
        rows, vocabulary = problem.hidden[chunk.tokens], len(head.weight)
        k, sought = min(problem.top_k, vocabulary), min(2 * problem.top_k, vocabulary)
        out = torch.empty(len(rows), dtype=chunk.z.dtype)
        for at in chunks.slices(len(rows), max(1, GATHERED // max(1, sought * dim))):
            z = chunk.z[at] if not chunks.keeps_difference(problem, chunk) else chunk.z[at] + chunk.r[at]
            ids = z.topk(sought, dim=1).indices
            again = _picked(rows[at, :dim].to(chunk.weight.dtype), chunk.weight, ids)
            if head.low_rank is not None and rows.shape[1] > dim:
                again += _picked(rows[at, dim:], head.low_rank, ids)
            if head.bias is not None:
                again += head.bias.float()[ids]
            chunks.finish_logits(again, head)
            out[at] = row_passes.entropy_of(again.topk(k, dim=1).values)
        return out

    def is_off(self, out: Statistics, tokens: slice) -> bool:
        """Measures the statistics of a chunk, `out`; whether its products, and those that follow, are to be full."""
        if self.product.full:
            return False
        first, last = within(self._at, tokens)
        at = slice(first, last)
        here = self.sample[at] - tokens.start
        self.found.note = None
        self.errors += _errors(out.nll[here].tolist(), self._true_nll[at])
        nll, limit = sum(self.errors) / len(self.errors), MOST_ERROR
        self.found.value_error = nll
        what = f"the nll was off by {nll:.2g} nats on average, more than {limit:g}"
        too_much = not nll <= limit
        if not math.isfinite(nll):
            what = "the nll is not finite"
        if out.kl is not None and not too_much:
            self.kl_errors += _errors(out.kl[here].tolist(), self._true_kl[at])
            seen = self._true_kl[: len(self.kl_errors)]
            limit = MOST_KL_ERROR * sum(filter(math.isfinite, seen)) / max(1, len(seen)) + 1e-5
            limit *= 3 if len(seen) < 4 else 1  # a few tokens say little of the mean
            kl = sum(self.kl_errors) / len(self.kl_errors)
            too_much, what = not kl <= limit, f"the KL was off by {kl:.2g} nats on average, more than {limit:.2g}"
        if not (too_much and len(here)):
            wide = [f"{self.product.too_wide} hidden states"] if self.product.too_wide else []
            wide += [] if self.product.wide_rows is None else [self._of_rows]
            if wide:
                self.found.note = f"8 bits are too few for {' and '.join(wide)}, which alone have them"
            return False
        self.product.off, self.product.head = True, None
        self.found.note = f"{what}, measured on {len(self.errors)} of {len(self.problem.labels)} tokens"
        return True


def _picked(rows: Tensor, matrix: Tensor, ids: Tensor) -> Tensor:
    """rows[t] · matrix[ids[t]], in float32."""
    return torch.bmm(matrix[ids].float(), rows.float().unsqueeze(2)).squeeze(2)


def packed(counts: Tensor, buffers: Sequence[Tensor], tails: Tails) -> Entries:
    """The entries of tokens that have so many in buffers [C, capacity]: columns, values and, with a KL, its values."""
    total = int(counts.clamp(min=0).sum())
    columns, values, *kl_values = (torch.empty(total, dtype=source.dtype) for source in buffers)
    for source, target in zip(buffers, (columns, values, *kl_values), strict=True):
        torch.ops.fused_losses.pack(counts, source, target)
    return Entries(counts, columns, values, kl_values[0] if kl_values else None, tails)


def _shape_of(weight: Tensor) -> tuple[int, int]:
    """Of a head in 8 bits: [blocks, words, BLOCK, 4]; words, blocks."""
    return -(-weight.shape[1] // 4), -(-len(weight) // BLOCK)


def _memory(weight: Tensor, halves: bool) -> tuple[int, int]:
    """Bytes of the head that are kept, and of a chunk."""
    words, blocks = _shape_of(weight)
    all_bytes, (least, most), usual = 4 * words * BLOCK * blocks, CHUNKS, chunks.CHUNK_BYTES
    left = KEPT_BYTES + usual - all_bytes
    if left < min(least, usual):
        return KEPT_BYTES, usual
    if halves:
        most = HALF_CHUNK[1]
    elif weight.dtype == torch.bfloat16:
        most = most * 6 // 4  # counts a rounded copy of the logits, which only exact gradients touch
    return all_bytes, min(left, most, usual)


def within(ascending: Sequence[int], tokens: slice) -> tuple[int, int]:
    """From which to which of them are in a range."""
    return bisect.bisect_left(ascending, tokens.start), bisect.bisect_left(ascending, tokens.stop)


def _errors(found: list[float], truth: list[float]) -> list[float]:
    """|found − truth|; 0 where both are not finite."""
    pairs = zip(found, truth, strict=True)
    return [abs(f - t) if math.isfinite(f) or math.isfinite(t) else 0.0 for f, t in pairs]


@torch.no_grad()
def channel_of(problem: Problem) -> Tensor | None:
    """[D] c, what W is multiplied by and x divided by; None where that gains little."""
    weight = problem.head.weight
    dim = weight.shape[1]
    x, w = (
        _spread(rows, most)[:, :dim].to(problem.dtype).float()
        for rows, most in zip((problem.hidden, weight), SAMPLED_ROWS, strict=True)
    )
    if not len(x) or not len(w):
        return None
    of_x, of_w = x.abs().amax(0), w.abs().amax(0)
    channel = (of_x / of_w).sqrt()
    usable = (of_x > 0) & (of_w > 0) & channel.isfinite()
    if not bool(usable.any()):
        return None
    middle = channel[usable].log().mean().exp()
    channel = torch.where(usable, (channel / middle).clamp(1e-3, 1e3), 1.0)
    truth = x @ w.t()
    plain = (_rounded(x) @ _rounded(w).t() - truth).square().mean()
    shared = (_rounded(x / channel) @ _rounded(w * channel).t() - truth).square().mean()
    return channel if bool(shared < GAIN**2 * plain) else None


def squares_of(weight: Tensor, channel: Tensor | None) -> tuple[tuple[float, float], Tensor | None]:
    """Means over rows of the head, times their channel: of ‖W_v‖², and of the square of a step of their 8 bits; and the
    mean row."""
    rows = _spread(weight, SAMPLED_ROWS[1]).float()
    if not len(rows):
        return (0.0, 0.0), None
    rows = rows if channel is None else rows * channel
    squares = float(rows.square().sum(1).mean()), float((rows.abs().amax(1) / 127).square().mean())
    mean = rows.mean(0)
    return squares, mean if bool(mean.isfinite().all()) else None


def too_wide(
    hidden: Tensor, inverse: Tensor | None, squares: tuple[float, float], logit_scale: float
) -> Tensor:  # fmt: skip
    """Which tokens, finite ones, 8 bits are too few for, ascending: their largest number ruins the others, and with
    these all of their logits.

    An element of x or W is off by at most half a step, of its row's largest by 127, and evenly so within that: by
    step² / 12 in the mean square.
    """
    sizes = []
    # A few rows at a time: the memory of more would be new, and its pages would take longer than this.
    for rows in hidden.split(max(1, AT_A_TIME // max(1, hidden.shape[1]))):
        x = rows.float() if inverse is None else rows.float() * inverse
        sizes.append(torch.stack([x.abs().amax(1), torch.linalg.vector_norm(x, dim=1)]))
    largest, norm = torch.cat(sizes, 1)
    variance = (largest / 127).square() * squares[0] + norm.square() * squares[1]
    spread = (variance / 12).sqrt() * abs(logit_scale)
    return (~(spread <= MOST_SPREAD) & largest.isfinite()).nonzero().flatten()


def too_wide_rows(hidden: Tensor, inverse: Tensor | None, scales: Tensor, logit_scale: float) -> Tensor:
    """Which rows of a head with these scales, [V], 8 bits are too few for beside hidden states of the usual length,
    ascending; finite ones."""
    x = _spread(hidden, SAMPLED_ROWS[1]).float()
    norms = torch.linalg.vector_norm(x if inverse is None else x * inverse, dim=1)
    norms = norms[norms.isfinite()]
    if not len(norms):
        return scales.new_empty(0, dtype=torch.int64)
    spread = norms.median() * abs(logit_scale) * scales / math.sqrt(12)
    return ((spread > MOST_SPREAD) & scales.isfinite()).nonzero().flatten()


def _spread(rows: Tensor, most: int) -> Tensor:
    """At most so many of them, evenly spaced."""
    return rows[:: -(-len(rows) // most)] if len(rows) else rows


def _rounded(rows: Tensor) -> Tensor:
    scale = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(rows.dtype).tiny)
    return (rows / scale).round() * scale
