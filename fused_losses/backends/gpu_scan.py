"""Around the scan kernels: their operands, what a probe bounds, and how the sums of the parts become statistics.

Beside kernels/triton/scan.py, whose sums (`Sum`) are read here, and those of `Left` in `gpu_tails`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import devices
from ..kernels.schemas import Row
from ..kernels.triton import scan as scans
from ..kernels.triton import tiles
from ..kernels.triton.scan import Known, Left, Sum
from ..problem import Head, Problem, Statistics, in_half_precision

# Ids of the probe. On SmolLM2 its bound lets 1.3 times the final entries through.
PROBE = 4096
# Architectures where chunks of logits take less time than the scan with a reference. On an H200 that scan takes 3.0
# times its two products, 16.0 ms for 2,048 tokens at (D, V) = (4096, 128256) on one head, whose logits take 5.9 ms by
# cuBLAS and 1.8 ms more for statistics and bits.
LOGITS_FASTER = frozenset({90})
INTERPRETED = type(scans.scan).__name__ == "InterpretedFunction"
# For Triton's interpreter, which runs on CPU tensors; the shape does not matter there.
INTERPRETED_TILE = tiles.Scan(0, "any", 16, 64, 32, 2, 4, 1, True, "interpreter")


class Scanned(NamedTuple):
    """What the programs of a scan leave of C tokens, part by part."""

    partial: Tensor  # [parts, len(Sum), C]
    # With directions, what has no bit and is not the label: [parts, len(Left), C]; its products with `directions` times
    # UNIT, [parts, 1 or 2, C, K].
    left: Tensor | None
    low: Tensor | None


class Columns(NamedTuple):
    """Which ids of C tokens have a bit, the label's among them."""

    counts: Tensor  # [C] int64; −1: more than the capacity, then there are none here
    offsets: Tensor  # [C + 1] int64
    columns: Tensor  # [entries] int32


class Operands:
    """What the scan kernels are given, made once for all chunks. `directions`: [V, K] float32; `eight`: what the scan
    takes in place of hidden and weight, with scales of their rows (`gpu_int8.Eight`)."""

    def __init__(
        self, problem: Problem, tile: tiles.Scan, directions: Tensor | None = None, eight: Any = None
    ) -> None:  # fmt: skip
        self.problem, self.tile, self.eight = problem, tile, eight
        self.directions, self.exponent = directions, torch.zeros(())
        if directions is not None and problem.dtype != torch.float32:
            # Nothing is rounded here: they are such numbers.
            self.directions, self.exponent = in_half_precision(directions)
        self.compiled: Any = None  # the kernel of the last run, as Triton gives it back; None in its interpreter
        dtype, head, own = problem.dtype, problem.head, problem.reference_head
        self.weight = _rows_of(head.weight.to(dtype))
        self.hidden = _rows_of(problem.hidden.to(dtype))
        self.bias, self.reference_bias = bias_of(head), None
        self.reference_hidden = self.reference_weight = None
        if problem.has_reference:
            self.reference_hidden = _rows_of(problem.reference_hidden.to(dtype))
            self.reference_weight, self.reference_bias = self.weight, self.bias
            if own is not None:
                self.reference_weight, self.reference_bias = _rows_of(own.weight.to(dtype)), bias_of(own)
            else:
                self.hidden = difference_of(problem)
                self.bias = None
        tensors = [self.hidden, self.weight, self.reference_hidden, self.reference_weight]
        if eight is not None:
            tensors = [eight.hidden, eight.weight]
        self.descriptors = tile.descriptors and all(_aligned(t) for t in tensors if t is not None)

    def label_logits(self, kernels: Any) -> list[Tensor]:
        """z of the labels, and with a reference z − r and r."""
        return [logits[:, 0] for logits in self._logits(kernels, self.problem.labels[:, None])]

    def logits_at(self, kernels: Any) -> Tensor:
        """z of the problem's ids, [N, k]; 0 where they are negative."""
        ids = self.problem.ids
        logits, *_ = self._logits(kernels, ids.clamp(min=0))
        return logits.masked_fill_(ids < 0, 0)

    def _logits(self, kernels: Any, ids: Tensor) -> list[Tensor]:
        """z of ids [N, k], and with a reference z − r and r."""
        problem, (count, k) = self.problem, ids.shape
        offsets, columns = torch.arange(count + 1, device=ids.device) * k, ids.reshape(-1).int()

        def logit(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
            out = torch.empty(count * k, dtype=torch.float32, device=ids.device)
            kernels.entry_logits(hidden.contiguous(), weight.contiguous(), bias, offsets, columns, out)
            return out.mul_(scale).view(count, k)

        z = logit(self.hidden, self.weight, self.bias, problem.head.logit_scale)
        if not problem.has_reference:
            cap = problem.head.softcap
            return [z if cap is None else z.div_(cap).tanh_().mul_(cap)]
        scale = (problem.reference_head or problem.head).logit_scale
        r = logit(self.reference_hidden, self.reference_weight, self.reference_bias, scale)
        d = z if problem.shared_head else z - r
        return [r + d, d, r]

    def run(self, tokens: slice, known: Tensor, bits: Tensor | None, vocabulary: int) -> Scanned:
        """The scan of some tokens and the first so many ids; what it leaves in the directions only with bits."""
        problem, tile, eight = self.problem, self.tile, self.eight
        count, device = tokens.stop - tokens.start, problem.hidden.device
        blocks, all_tiles = -(-count // tile.block_n), -(-vocabulary // tile.block_v)
        per_part = _tiles_per_part(blocks, all_tiles, devices.processors(device))
        parts = -(-all_tiles // per_part)
        partial = torch.empty(parts, len(Sum), count, dtype=torch.float32, device=device)
        directions: Any = None if bits is None else self.directions
        left = low = None
        if directions is not None:
            width = directions.shape[1]
            left = partial.new_empty(parts, len(Left), count)
            low = partial.new_empty(parts, 1 + problem.has_reference, count, width)
        known = known.contiguous()
        words = bits.shape[1] if bits is not None else 0
        tensors = [self.hidden[tokens], self.weight]
        if problem.has_reference:
            tensors += [self.reference_hidden[tokens], self.reference_weight]
        scales: tuple[Any, Any] = (None, None)
        if eight is not None:
            tensors, scales = [eight.hidden[tokens], eight.weight], (eight.hidden_scale[tokens], eight.weight_scale)
        strides = [t.stride(0) for t in tensors]
        operands: list[Any] = tensors
        if self.descriptors:
            from triton.tools.tensor_descriptor import TensorDescriptor

            blocks_of = [tile.block_n, tile.block_v] * 2
            operands = [
                TensorDescriptor.from_tensor(t, [b, tile.block_d]) for t, b in zip(tensors, blocks_of, strict=False)
            ]
            if directions is not None:
                directions = TensorDescriptor.from_tensor(directions, [tile.block_v // tile.slices, width])
        head, own = problem.head, problem.reference_head
        labels = problem.labels[tokens].contiguous()
        constants = dict(
            **tile.constants, DESCRIPTORS=self.descriptors,
            HAS_BIAS=self.bias is not None, ENTROPY="entropy" in problem.wanted, BITS=bits is not None,
            K=0 if low is None else width, **tile.options,
        )  # fmt: skip
        grid = (blocks, parts)
        with devices.current(partial):
            if not problem.has_reference:
                self.compiled = scans.scan[grid](
                    *operands, *scales, directions, self.bias, labels, known, bits, partial, left, low,
                    head.logit_scale, head.softcap or 0.0, count, vocabulary, tensors[1].shape[1], *strides, words,
                    per_part, SCALED=head.logit_scale != 1, SOFTCAP=head.softcap is not None,
                    SCALES=eight is not None, INT8=tensors[1].dtype == torch.int8, **constants,
                )  # fmt: skip
            else:
                reference_scale = (own or head).logit_scale
                self.compiled = scans.scan_with_reference[grid](
                    *operands, directions, self.bias, self.reference_bias, labels, known, bits, partial, left, low,
                    head.logit_scale, reference_scale, count, vocabulary, self.weight.shape[1],
                    self.reference_weight.shape[1], *strides, words, per_part, SHARED=own is None,
                    HAS_REFERENCE_BIAS=self.reference_bias is not None,
                    SCALED=head.logit_scale != 1 or reference_scale != 1,
                    REFERENCE_ENTROPY="reference_entropy" in problem.wanted, **constants,
                )  # fmt: skip
        return Scanned(partial, left, low)


def difference_of(problem: Problem, tokens: slice = slice(None)) -> Tensor:
    """x − x_ref, rounded once: a difference of half-precision numbers is computed in fp32."""
    x, x_ref = problem.hidden[tokens], problem.reference_hidden[tokens]
    if x.dtype == x_ref.dtype == problem.dtype:
        return x - x_ref
    return (x.float() - x_ref.float()).to(problem.dtype)


def bounds(operands: Operands, label: list[Tensor], threshold: float) -> Tensor:
    """[3, N] for the scan, from a probe: with L and R the log-sums of some ids and the label, with and without the
    label, both lower bounds, log θ + (L + R)/2 is one of lse + log(θ √(1 − p[label])), and L_ref + log θ + (R − L)/2 of
    the reference's."""
    problem = operands.problem
    count = len(problem.labels)
    known = torch.zeros(len(Known), count, dtype=torch.float32, device=problem.hidden.device)
    partial = operands.run(slice(0, count), known, None, min(PROBE, problem.head.vocabulary)).partial
    others = (partial[:, Sum.TOP] + partial[:, Sum.SUM].log()).logsumexp(0)
    lse = torch.logaddexp(others, label[0])
    log_threshold = math.log(threshold)
    known[Known.BOUND] = log_threshold + 0.5 * (lse + others)
    if problem.has_reference:
        ref_others = (partial[:, Sum.REF_TOP] + partial[:, Sum.REF_SUM].log()).logsumexp(0)
        ref_lse = torch.logaddexp(ref_others, label[2])
        known[Known.REF_BOUND] = log_threshold + 0.5 * (others - lse) + ref_lse
        known[Known.SHIFT] = lse - ref_lse
    return known


def columns_of(kernels: Any, labels: Tensor, bits: Tensor, capacity: int) -> Columns:
    """Of tokens with these labels, the first rows of `bits`; at most so many of each."""
    bits = bits[: len(labels)]
    counts = torch.empty(len(labels), dtype=torch.int64, device=bits.device)
    kernels.count_bits(bits, labels, capacity, counts)
    offsets = counts.new_zeros(len(labels) + 1)
    torch.cumsum(counts.clamp(min=0), 0, out=offsets[1:])
    columns = torch.empty(int(offsets[-1]), dtype=torch.int32, device=bits.device)
    kernels.columns_of_bits(bits, labels, offsets, columns)
    return Columns(counts, offsets, columns)


def join(
    problem: Problem, partial: Tensor, labels: Tensor, label: list[Tensor], shift: Tensor, out: Statistics
) -> Tensor:
    """The sums of the parts and the labels' own terms: fills `out`, returns what `attention` needs, [9, C]."""
    rows = partial.new_zeros(len(Row), partial.shape[2])
    tops, z = partial[:, Sum.TOP], label[0]
    top, moved = _moved(tops)
    total = (partial[:, Sum.SUM] * moved).sum(0)
    nll, largest, log_sum = _closed(z, top, total)
    share = torch.exp((top - largest) - log_sum)
    out.nll.copy_(nll)
    index = torch.where(tops == top, partial[:, Sum.INDEX].view(torch.int32), 2**31 - 1).amin(0).long()
    out.prediction.copy_(torch.where((z > top) | ((z == top) & (labels < index)), labels, index))
    if out.entropy is not None:
        weighted = _weighted(partial[:, Sum.WEIGHTED], partial[:, Sum.SUM], tops, top, moved)
        out.entropy.copy_(_entropy(share, total, weighted, top, largest, log_sum, nll))
    rows[Row.TOP], rows[Row.LOG_SUM] = largest, log_sum
    torch.add(largest, log_sum, out=out.lse)
    softcap = problem.head.softcap
    rows[Row.REST] = -torch.expm1(-nll) if softcap is None else share * (partial[:, Sum.SLOPED] * moved).sum(0)
    if not problem.has_reference:
        return rows

    _, d, r = label
    tops = partial[:, Sum.REF_TOP]
    top, moved = _moved(tops)
    total = (partial[:, Sum.REF_SUM] * moved).sum(0)
    ref_nll, ref_largest, ref_log_sum = _closed(r, top, total)
    share = torch.exp((top - ref_largest) - ref_log_sum)
    out.reference_nll.copy_(ref_nll)
    if out.reference_entropy is not None:
        weighted = _weighted(partial[:, Sum.REF_WEIGHTED], partial[:, Sum.REF_SUM], tops, top, moved)
        out.reference_entropy.copy_(_entropy(share, total, weighted, top, ref_largest, ref_log_sum, ref_nll))
    # Σ p_ref δ, Σ p_ref (eᵟ − 1 − δ) and Σ p_ref |eᵟ − 1|, the label's term last.
    delta, p_label = d - shift, torch.exp(-ref_nll)
    gained = torch.expm1(delta.clamp(max=60))  # as in the kernel; beyond, `near` is false
    own = (delta, gained - delta, gained.abs())
    shifted, growth, gap_l1 = (
        share * (partial[:, row] * moved).sum(0) + p_label * term
        for row, term in zip((Sum.SHIFTED, Sum.GROWTH, Sum.GAP_L1), own, strict=True)
    )
    # lse − lse_ref is log(1 + Σ p_ref (eᵟ − 1)) + shift: accurate near the reference. Far from it δ overflows; then
    # it is the difference of the two, and the KL that minus Σ p_ref (z − r).
    gain = shifted + growth
    precise, plain = torch.log1p(gain), ((largest - ref_largest) + (log_sum - ref_log_sum)) - shift
    near = (gain.abs() < 0.5) & ((precise - plain).abs() < 1e-3)
    kl = torch.where(near, growth - _saturation(gain), plain - shifted)
    out.kl.copy_(torch.where(kl < 0, 0, kl))
    rows[Row.REF_TOP], rows[Row.REF_LOG_SUM] = ref_largest, ref_log_sum
    rows[Row.GAP_L1], rows[Row.SHIFT], rows[Row.MISSED] = gap_l1, shift, torch.where(near, precise, plain)
    return rows


def _saturation(x: Tensor) -> Tensor:
    """x − log(1 + x), without cancellation near 0."""
    series = x * x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x * (1 / 5 - x * (1 / 6 - x / 7)))))
    return torch.where(x.abs() < 0.05, series, x - torch.log1p(x))


def _moved(tops: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of the parts' tops, and by what factor each part's sums come to it."""
    top = tops.amax(0)
    return top, torch.exp(tops - top)


def _weighted(weighted: Tensor, total: Tensor, tops: Tensor, top: Tensor, moved: Tensor) -> Tensor:
    return ((weighted + total * (tops - top)) * moved).sum(0)


def _closed(label: Tensor, top: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """nll, largest logit and log Σ exp(z − largest), the label's logit added to the sum total · exp(top) of the others.

    NaN where the largest is infinite."""
    delta = (top - label) + total.log()
    largest = torch.maximum(top, label)
    nothing = largest - largest
    nll = delta.clamp(min=0) + torch.log1p(torch.exp(-delta.abs())) + nothing
    rest = torch.where(label >= top, total * torch.exp(top - largest), total - 1 + torch.exp(label - largest))
    return nll, largest, torch.log1p(rest + nothing)


def _entropy(
    share: Tensor, total: Tensor, weighted: Tensor, top: Tensor, largest: Tensor, log_sum: Tensor, nll: Tensor
) -> Tensor:
    """Σ p (lse − z) over the others and p·nll of the label: no term is negative."""
    return share * (total * ((largest - top) + log_sum) - weighted) + torch.exp(-nll) * nll


def logits_are_faster(problem: Problem) -> bool:
    """Than a scan that there is."""
    return problem.has_reference and _architecture(problem.hidden.device) in LOGITS_FASTER


def choose_tile(problem: Problem, directed: bool = False, eight_bit: bool = False) -> tiles.Scan | None:
    """The row of the table for a call, with directions or without, with operands of 8 bits or full ones; None: chunks
    of logits instead."""
    own, head = problem.reference_head, problem.head
    capped = head.softcap is not None or (own is not None and own.softcap is not None)
    more = problem.wanted & {"topk_entropy", "rank", "log_p2"} or problem.beta is not None
    if more or (problem.has_reference and capped):
        return None
    if INTERPRETED:
        return INTERPRETED_TILE
    if problem.dtype == torch.float32:
        return None  # on tensor cores only in tf32; cuBLAS has better fp32 products
    kind = "capped" if capped or head.bias is not None else "plain"
    if problem.has_reference:
        kind = "shared" if own is None else "own"
    if any(h.width % 8 for h in (head, own) if h is not None):
        return None  # rows that are not whole units of 16 bytes can neither be described nor loaded so
    kind += (tiles.DIRECTED if directed else "") + (tiles.EIGHT_BIT if eight_bit else "")
    return tiles.scan_tile(_architecture(problem.hidden.device), kind)


def _rows_of(matrix: Tensor) -> Tensor:
    """Any distance between rows, but the numbers of a row side by side, and the first of each where 16 bytes begin."""
    if (matrix.stride(1) == 1 or matrix.shape[1] == 1) and _aligned(matrix):
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def _aligned(matrix: Tensor) -> bool:
    """For a tensor descriptor."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0


def bias_of(head: Head) -> Tensor | None:
    return None if head.bias is None else head.bias.detach().float().contiguous()


def _architecture(device: torch.device) -> int:
    """Of the table of tiles; GPUs of others than NVIDIA take the rows that need none of its later instructions."""
    if device.type != "cuda" or devices.is_rocm():
        return tiles.PLAIN
    return tiles.architecture(torch.cuda.get_device_capability(device))


def _tiles_per_part(blocks: int, tiles: int, processors: int) -> int:
    """So many tiles of the vocabulary for one program that rounds of programs × tiles of each, which is the time, are
    fewest."""
    best = min(
        range(1, min(tiles, max(32, processors)) + 1),
        key=lambda parts: -(-blocks * parts // processors) * -(-tiles // parts),
    )
    return -(-tiles // best)
