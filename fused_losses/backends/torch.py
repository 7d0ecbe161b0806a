"""The exact losses in plain PyTorch operations, chunk by chunk, on any device.

A chunk of C tokens goes through four steps: logits (one GEMM, fp32), row statistics, the two directions
∂nll/∂z and ∂kl/∂z in place of the logits, products with the head's weight and with the hidden states.
Inside a chunk, row statistics run over blocks small enough for a CPU's cache. [N, V] never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import Gradients, Head, Problem, Statistics

# Logits and their copies of one chunk. Measured on 2 CPU cores: at 64 MiB 3 to 7 % slower, at 128 MiB no faster.
CHUNK_BYTES = 96 << 20
# Row statistics make several passes; a block of this many numbers stays in a core's cache between them. On an
# accelerator the launch of a kernel costs more than its cache saves.
BLOCK_NUMBERS = {"cpu": 1 << 18}
BLOCK_NUMBERS_ELSEWHERE = 1 << 23
# Columns of the head that are converted at a time where a product needs another dtype.
COLUMNS = 4096

Upstream = Callable[[Statistics, slice], "tuple[Tensor | None, Tensor | None]"]


def statistics(problem: Problem, keep_rows: bool = False) -> tuple[Statistics, Gradients]:
    """Per-token statistics: 1 GEMM, 2 with a reference.

    With `keep_rows` also ∂nll/∂x and ∂kl/∂x, [N, D] each: 1 and 2 GEMMs more, and none left for backward.
    """
    out = _empty_statistics(problem)
    rows = Gradients()
    if keep_rows:
        rows.nll = torch.empty_like(problem.hidden, dtype=problem.accumulator)
        rows.kl = torch.empty_like(rows.nll) if problem.has_reference else None
    for chunk in _chunks(problem, out, directions=keep_rows):
        if keep_rows:
            rows.nll[chunk.tokens] = chunk.times_weight(chunk.nll_direction, exact=True).mul_(problem.head.logit_scale)
            if rows.kl is not None:
                rows.kl[chunk.tokens] = chunk.times_weight(chunk.kl_direction, exact=True).mul_(
                    problem.head.logit_scale
                )
    return out, rows


def gradients(
    problem: Problem, upstream: Upstream, hidden: bool, weight: bool, bias: bool
) -> tuple[Statistics, Gradients]:
    """Statistics and Σ_t a_t ∂nll_t + b_t ∂kl_t in one sweep: 3 GEMMs (2 where one gradient is not wanted).

    `upstream` is called with the statistics of each chunk and returns (a, b), [C] each or None for zeros. So the
    weights may depend on anything known of the tokens at hand. dW and db accumulate in fp32 and stay so.
    """
    out = _empty_statistics(problem)
    acc = problem.accumulator
    head = problem.head
    # The caller scales the sums, which in fp16 would come too late for what overflowed or underflowed.
    hidden_dtype = acc if problem.hidden.dtype == torch.float16 else problem.hidden.dtype
    total = Gradients(
        hidden=torch.empty_like(problem.hidden, dtype=hidden_dtype) if hidden else None,
        weight=head.weight.new_zeros(head.weight.shape, dtype=acc) if weight else None,
        bias=head.weight.new_zeros(head.vocabulary, dtype=acc) if bias else None,
    )
    for chunk in _chunks(problem, out, directions=True):
        a, b = upstream(out.at(chunk.tokens), chunk.tokens)
        if a is None and b is None:
            if hidden:
                total.hidden[chunk.tokens] = 0
            continue
        if b is None:
            direction, row_weight = chunk.nll_direction, a * head.logit_scale
        elif a is None:
            direction, row_weight = chunk.kl_direction, b * head.logit_scale
        else:
            direction = chunk.nll_direction.mul_(a[:, None]).addcmul_(chunk.kl_direction, b[:, None])
            row_weight = torch.full_like(a, head.logit_scale)
        if bias:
            total.bias.addmv_(direction.t(), row_weight)
        if chunk.rounds:
            # Relative to the largest power of two among them, so that fp16 neither overflows nor underflows.
            exponent = torch.frexp(row_weight.abs().amax()).exponent
            direction.mul_(torch.ldexp(row_weight, -exponent)[:, None])
            row_weight = torch.ldexp(torch.ones_like(row_weight), exponent)
        if hidden:
            total.hidden[chunk.tokens] = chunk.times_weight(direction).mul_(row_weight[:, None])
        if weight:
            chunk.add_outer(total.weight, direction, row_weight[:, None])
    return out, total


@dataclass
class _Chunk:
    """Tokens whose logits were turned into directions, and the products that these need."""

    tokens: slice
    hidden: Tensor
    weight: Tensor
    nll_direction: Tensor
    kl_direction: Tensor | None
    half: Tensor | None

    @property
    def rounds(self) -> bool:
        """Whether the operands of the products are rounded; then the upstream weights must be in before that."""
        return self.weight.dtype != self.nll_direction.dtype and (self.half is not None or self.weight.is_cuda)

    def times_weight(self, direction: Tensor, exact: bool = False) -> Tensor:
        """direction @ weight, [C, D], in fp32; `exact`: nothing is rounded on a CPU, as more work on it follows."""
        weight = self.weight
        if direction.dtype == weight.dtype:
            return direction @ weight
        if self.rounds and weight.is_cuda:
            return torch.mm(self._narrow(direction), weight, out_dtype=direction.dtype)
        if self.rounds and not exact:
            return (self._narrow(direction) @ weight).to(direction.dtype)
        product = direction.new_zeros(len(direction), weight.shape[1])
        for columns in _slices(len(weight), COLUMNS):
            product.addmm_(direction[:, columns], weight[columns].to(direction.dtype))
        return product

    def add_outer(self, total: Tensor, direction: Tensor, row_weight: Tensor) -> None:
        """total += (row_weight · direction)ᵀ hidden, total in fp32. The weights go to the smaller factor."""
        if self.rounds and total.is_cuda:
            narrow = self._narrow(direction)
            for columns in _slices(len(total), COLUMNS):
                product = torch.mm(narrow[:, columns].t(), self.hidden, out_dtype=total.dtype)
                total[columns] += product.mul_(row_weight[0])
        else:
            # Also for bf16 on a CPU: its product would be rounded once per chunk.
            total.addmm_(direction.t(), self.hidden.to(total.dtype) * row_weight)

    def _narrow(self, direction: Tensor) -> Tensor:
        if self.half is None:
            return direction.to(self.weight.dtype)
        return self.half[: len(direction)].copy_(direction)


def _chunks(problem: Problem, out: Statistics, directions: bool) -> Iterator[_Chunk]:
    """Sweep over the tokens: fill `out`, and with `directions` yield ∂nll/∂z and ∂kl/∂z of each chunk.

    Without `directions` the chunks are yielded too, their buffers then hold nothing of use.
    """
    count, vocabulary = len(problem.labels), problem.head.vocabulary
    if count == 0:
        return
    head, reference = problem.head, problem.reference_head
    dtype, acc, device = problem.dtype, problem.accumulator, problem.hidden.device
    weight = head.weight.to(dtype)
    ref_weight = None if reference is None else reference.weight.to(dtype)
    # On a CPU no product of bf16 matrices comes out in fp32. Without a reference, bf16 logits are taken, as plain PyTorch
    # does: 2–3 times as fast as fp32. But p − p_ref cancels near the reference, so there fp32 operands are worth their time.
    halves = dtype == torch.bfloat16 and device.type == "cpu" and not problem.has_reference

    per_token = vocabulary * (acc.itemsize * (2 if problem.has_reference else 1) + 2 * (dtype != acc))
    size = _balanced(count, max(1, CHUNK_BYTES // per_token))
    z_buffer = torch.empty(size, vocabulary, dtype=acc, device=device)
    r_buffer = torch.empty_like(z_buffer) if problem.has_reference else None
    half = torch.empty(size, vocabulary, dtype=dtype, device=device) if halves else None
    block = min(size, max(1, BLOCK_NUMBERS.get(device.type, BLOCK_NUMBERS_ELSEWHERE) // vocabulary))
    scratch = torch.empty(block, vocabulary, dtype=acc, device=device)

    for tokens in _slices(count, size):
        hidden = problem.hidden[tokens].to(dtype)
        z = z_buffer[: len(hidden)]
        r = None
        if r_buffer is not None:
            r = r_buffer[: len(hidden)]
            ref_hidden = problem.reference_hidden[tokens]
            if problem.shared_head:
                _product(r, ref_hidden.to(dtype), weight, head.bias)
                _product(z, problem.hidden[tokens].to(acc) - ref_hidden.to(acc), weight, None)
            else:
                _product(z, hidden, weight, head.bias)
                _product(r, ref_hidden.to(dtype), ref_weight, reference.bias)
        elif half is None:
            _product(z, hidden, weight, head.bias)
        else:
            z.copy_(_product(half[: len(hidden)], hidden, weight, head.bias))
        for rows in _slices(len(hidden), block):
            at = slice(tokens.start + rows.start, tokens.start + rows.stop)
            _row_pass(problem, out.at(at), problem.labels[at], z[rows], None if r is None else r[rows],
                      scratch[: rows.stop - rows.start], directions)  # fmt: skip
        yield _Chunk(tokens, hidden, weight, z, r, half)


def _row_pass(
    problem: Problem, out: Statistics, labels: Tensor, z: Tensor, r: Tensor | None, scratch: Tensor, directions: bool
) -> None:
    """Statistics of a few rows; with `directions`, z becomes ∂nll/∂z and r becomes ∂kl/∂z (both without logit_scale).

    On entry z holds x Wᵀ + b, and r that of the reference; with a shared head z holds (x − x_ref) Wᵀ.
    """
    head = problem.head
    labels = labels[:, None]
    shared_difference = None
    if r is not None:
        reference = problem.reference_head or head
        if problem.shared_head:
            if head.softcap is None:
                shared_difference = z.mul(head.logit_scale)
            z.add_(r)
        _finish_logits(r, reference)
    _finish_logits(z, head)
    slope = 1 - (z / head.softcap) ** 2 if directions and head.softcap is not None else None

    if out.topk_entropy is not None:
        top = z.topk(min(problem.top_k, z.shape[1]), dim=1).values.log_softmax(1)
        out.topk_entropy.copy_(-(top.exp() * top).sum(1))

    if r is None:
        total = _exponentials_(z, labels, out, scratch)
        if directions:
            # p of the label minus 1 is expm1(−nll): exact also where p is nearly 1.
            z.div_(total).scatter_(1, labels, torch.expm1(-out.nll)[:, None])
            if slope is not None:
                z.mul_(slope)
        return

    # Log-probabilities of both models, in place.
    log_p, log_r = z, r
    top, prediction = log_p.max(1, keepdim=True)
    out.prediction.copy_(prediction[:, 0])
    log_sum = _log_softmax_(log_p, top, prediction, scratch)
    top_ref, prediction = log_r.max(1, keepdim=True)
    log_sum_ref = _log_softmax_(log_r, top_ref, prediction, scratch)
    out.nll.copy_(-log_p.gather(1, labels)[:, 0])
    out.reference_nll.copy_(-log_r.gather(1, labels)[:, 0])
    # d = log p − log p_ref; from the difference of the hidden states where that is to be had.
    if shared_difference is None:
        d = log_p - log_r
    else:
        d = shared_difference.sub_((top - top_ref) + (log_sum - log_sum_ref))

    p_ref = scratch.copy_(log_r).exp_()
    if out.reference_entropy is not None:
        out.reference_entropy.copy_(-_row_dot(p_ref, log_r))
    p = log_p.exp() if directions or out.entropy is not None else None
    if out.entropy is not None:
        out.entropy.copy_(-_row_dot(p, log_p))
    # p − p_ref = p_ref · expm1(d) keeps its relative accuracy where the two models nearly agree.
    gap = torch.where(d.abs() < 1, torch.expm1(d).mul_(p_ref), log_p.exp() - p_ref if p is None else p - p_ref)
    # Σ gap is 0 up to rounding; with it the error of d cancels to first order and the sum has no negative part.
    out.kl.copy_((gap.sum(1) - _row_dot(p_ref, d)).clamp_(min=0))
    if directions:
        r.copy_(gap)
        z.copy_(p).scatter_(1, labels, torch.expm1(-out.nll)[:, None])
        if slope is not None:
            z.mul_(slope)
            r.mul_(slope)


def _finish_logits(z: Tensor, head: Head) -> None:
    if head.bias is not None:
        z.clamp_(min=-1e30)  # a token ruled out by −inf must not make 0 · ∞
    if head.logit_scale != 1:
        z.mul_(head.logit_scale)
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)


def _exponentials_(z: Tensor, labels: Tensor, out: Statistics, scratch: Tensor) -> Tensor:
    """z becomes exp(z − top); fills nll, prediction and, where wanted, entropy. Returns the sums, [rows, 1].

    The largest logit is taken out before anything is summed, and 1 + rest goes through log1p: nll is accurate
    also where it is tiny, never negative, and no common offset of the logits enters it.
    """
    top, prediction = z.max(1, keepdim=True)
    out.prediction.copy_(prediction[:, 0])
    z.sub_(top)
    label_logit = z.gather(1, labels)[:, 0]
    shifted = scratch.copy_(z) if out.entropy is not None else None
    z.exp_().scatter_(1, prediction, 0)
    rest = z.sum(1) + (top - top)[:, 0]  # NaN where the largest logit is infinite, and so everything that follows
    log_sum = torch.log1p(rest)
    out.nll.copy_(log_sum - label_logit)
    if shifted is not None:
        out.entropy.copy_(log_sum - _row_dot(z, shifted) / (1 + rest))
    z.scatter_(1, prediction, 1)
    return (1 + rest)[:, None]


def _log_softmax_(z: Tensor, top: Tensor, prediction: Tensor, scratch: Tensor) -> Tensor:
    """z becomes log softmax(z); returns log Σ exp(z − top), [rows, 1]."""
    exp = torch.exp(z.sub_(top), out=scratch).scatter_(1, prediction, 0)
    log_sum = torch.log1p(exp.sum(1, keepdim=True) + (top - top))  # NaN where the largest logit is infinite
    z.sub_(log_sum)
    return log_sum


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ_v a[t, v] · b[t, v], without a temporary of that size."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).flatten()


def _product(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """out = hidden @ weight.T + bias, in the dtype of `out` whatever that of the weight; returns out."""
    if weight.dtype == out.dtype:
        if bias is None:
            return torch.mm(hidden, weight.t(), out=out)
        return torch.addmm(bias.to(out.dtype), hidden, weight.t(), out=out)
    if weight.is_cuda:
        torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=out.dtype, out=out)
    else:
        hidden = hidden.to(out.dtype)
        for columns in _slices(len(weight), COLUMNS):
            torch.mm(hidden, weight[columns].to(out.dtype).t(), out=out[:, columns])
    return out if bias is None else out.add_(bias)


def _empty_statistics(problem: Problem) -> Statistics:
    count, acc, device = len(problem.labels), problem.accumulator, problem.hidden.device

    def vector(name: str) -> Tensor | None:
        return torch.empty(count, dtype=acc, device=device) if name in problem.wanted else None

    return Statistics(
        nll=torch.empty(count, dtype=acc, device=device),
        prediction=torch.empty(count, dtype=torch.int64, device=device),
        kl=torch.empty(count, dtype=acc, device=device) if problem.has_reference else None,
        reference_nll=torch.empty(count, dtype=acc, device=device) if problem.has_reference else None,
        entropy=vector("entropy"),
        reference_entropy=vector("reference_entropy") if problem.has_reference else None,
        topk_entropy=vector("topk_entropy"),
    )


def _balanced(count: int, most: int) -> int:
    """A chunk size ≤ `most` (rounded up to 16) that splits `count` evenly."""
    chunks = -(-count // most)
    size = -(-count // chunks)
    return min(count, -(-size // 16) * 16)


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
