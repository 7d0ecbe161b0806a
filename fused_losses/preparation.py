"""From the arguments of a call to its `Tokens`: validate, drop ignored tokens, join low-rank parts, choose dtype and
backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import backends, checks, shards
from .devices import has_float64
from .head import LMHead, LowRank, Reference, _same_tensor, as_head
from .labels import plain
from .problem import Head, Int8, Problem, valid_index
from .sparse.certificate import SMALLEST_VOCABULARY, GradientReport
from .tokens import Tokens, TracedTokens
from .validation import (
    Options,
    check_beta,
    check_hidden,
    check_ids,
    check_labels,
    check_reference,
    check_spread_backend,
    check_temperature,
    check_transforms,
    compute_dtype,
)  # fmt: skip

# Measured on an H200 at (8192, 4096, 128256), frozen head: exact 31 ms and 323 MiB, sparse 35 and 607; with a reference
# 62 and 263, 106 and 541. On a CPU, and where the weight's gradient is wanted, sparse ones are the faster or smaller.
EXACT_WHERE_FROZEN = ("triton", "cuda")


@dataclass(frozen=True)
class Outputs:
    """What a call asks for besides nll, kl and their like."""

    ids: Tensor | None = None
    beta: float | None = None
    temperature: float = 1.0
    entropy_gradient: bool = False
    ids_name: str = "ids"  # in messages
    asked: Callable[[], object] = str  # what else the ranks of a spread head must have alike


H = TypeVar("H", LMHead, "Reference | None")


def at_temperature(head: H, temperature: float) -> H:
    """The same head, or reference, with its logits divided: softcap · tanh(scale x / softcap) / T is of the same
    form."""
    if isinstance(head, Reference):
        own = head.head
        return head if own is None else Reference(head.hidden, at_temperature(own, temperature))  # type: ignore
    if not isinstance(head, LMHead):
        return head
    softcap = None if head.softcap is None else head.softcap / temperature
    return replace(head, logit_scale=head.logit_scale / temperature, softcap=softcap)


def prepare(
    hidden: Tensor,
    head: LMHead | Tensor | nn.Linear,
    labels: Tensor,
    reference: Reference | None,
    options: Options,
    outputs: Outputs | None = None,
    publish: Callable[[GradientReport], None] = lambda report: None,
    handle: Tensor | None = None,
) -> Tokens:
    """All validation of the package's losses, and the removal of ignored tokens.

    In a graph (`capturable`) values are checked, and ignored tokens removed, when it runs. `handle`: of the objective.
    """
    outputs = outputs or Outputs()
    if not isinstance(outputs.entropy_gradient, bool):
        raise TypeError(f"entropy_gradient: expected True or False, got {outputs.entropy_gradient!r}")
    head = as_head(head).local()
    labels = plain(labels)
    check_transforms(hidden, head, labels, options.backend)
    if head.is_spread:
        check_spread_backend(options.backend)
    check_hidden(hidden, head)
    check_labels(labels, hidden)
    check_ids(outputs.ids, labels, outputs.ids_name)
    beta, temperature = check_beta(outputs.beta, reference), check_temperature(outputs.temperature)
    if temperature != 1:
        head, reference = at_temperature(head, temperature), at_temperature(reference, temperature)
    reference_hidden, reference_head, reference_low_rank = check_reference(reference, hidden, head)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, head.weight, head.bias)]

    tracing = torch.compiler.is_compiling()
    index = None if tracing else valid_index(labels.reshape(-1), options.ignore_index)
    select = functools.partial(_valid, index=index)
    flat = select(labels.reshape(-1))
    rows = [None if x is None else select(x.reshape(-1, x.shape[-1])) for x in (hidden, reference_hidden)]
    low_rank = None if head.low_rank is None else head.low_rank.b
    if low_rank is not None or reference_low_rank is not None:
        valid = flat != options.ignore_index if tracing else None
        u, u_ref = (
            None if part is None or x is None else _low_rank_rows(part, x, select, valid)
            for part, x in zip((head.low_rank, reference_low_rank), rows, strict=True)
        )
        rows, low_rank = _with_low_rank(
            rows, u, u_ref, low_rank, reference_low_rank if reference_head is None else None
        )
    chosen = options.backend if tracing else backends.choose(options.backend, hidden.device.type)
    shard = None
    if head.is_spread:
        reference_rows = None if reference is None else len((reference_head or head).weight)
        shard, agreed = shards.agreement(
            head.process_group, len(head.weight), reference_rows, hidden, flat, needs,
            None if outputs.ids is None else select(outputs.ids.reshape(-1, outputs.ids.shape[-1])),
            (options.code, _transforms(head, reference_head, beta), _asked(outputs)),
            backends.NAMES.index(chosen),
        )  # fmt: skip
        chosen = backends.SHARDED + (chosen if agreed else "torch")
    inner = Head(head.weight, head.bias, head.logit_scale, head.softcap, low_rank, shard)
    if not tracing:
        checks.labels(flat, options.ignore_index, inner.vocabulary)
    dtype = compute_dtype(hidden, head)
    trained = any(needs[1:]) or (low_rank is not None and torch.is_grad_enabled() and low_rank.requires_grad)
    tolerance, note = _tolerance(options, outputs, dtype, inner, trained, chosen, hidden.device.type)
    problem = Problem(
        hidden=rows[0], labels=flat, head=inner, reference_hidden=rows[1], reference_head=reference_head, dtype=dtype,
        ids=_ids(outputs, select, flat != options.ignore_index if tracing else None, inner.vocabulary),
        entropy_gradient=outputs.entropy_gradient, beta=beta or None, divergence_is_kl=beta == 0, tolerance=tolerance,
        int8=Int8() if options.scan == "int8" else None,
        low_rank_inputs=None if tracing or tolerance is None else _inputs_of_low_rank(head, low_rank),
    )  # fmt: skip
    if tracing:
        scan = None if options.scan == "int8" else "full"
        report = GradientReport("none", None, entries=None, saved_bytes=None, note=note, scan=scan)
        return TracedTokens(
            problem, labels.shape, None, chosen, report, publish, flat != options.ignore_index, options.ignore_index,
            handle,
        )  # fmt: skip
    return Tokens(problem, labels.shape, index, chosen, GradientReport("none", len(flat), note=note), publish)


def _transforms(head: LMHead, reference_head: Head | None, beta: float | None) -> int:
    """A number for what the ranks of a spread head must do alike with logits."""
    heads = (head, reference_head or head)  # a rank without rows cannot tell the reference's head from its own
    return shards.code_of([(h.logit_scale, h.softcap) for h in heads], beta)


def _asked(outputs: Outputs) -> int:
    return shards.code_of(outputs.asked(), outputs.entropy_gradient)


def _valid(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows if index is None else rows.index_select(0, index)


def _ids(
    outputs: Outputs, select: Callable[[Tensor], Tensor], valid: Tensor | None, vocabulary: int
) -> Tensor | None:  # fmt: skip
    """[N, k], checked, −1 where there is none; `valid`: in a graph."""
    if outputs.ids is None:
        return None
    ids, name = select(outputs.ids.reshape(-1, outputs.ids.shape[-1])), outputs.ids_name
    if valid is not None:
        ids = torch.ops.fused_losses.checked(ids, valid, "ids", name, vocabulary)
    else:
        checks.ids(ids, name, vocabulary)
    return ids.masked_fill(ids < 0, -1)


def _tolerance(
    options: Options, outputs: Outputs, dtype: torch.dtype, head: Head, trained: bool, backend: str, device_type: str
) -> tuple[float | None, str | None]:
    """Of sparse gradients, None for exact ones; and why these, where they are not what would be taken. `trained`:
    whether anything of the head is."""
    sparse = options.gradient == "sparse"
    if not has_float64(device_type):
        if sparse:
            raise ValueError(
                f"gradient='sparse': its bounds are of sums in float64, which {device_type} devices do not have; give "
                "gradient='auto' or 'exact'"
            )
        return None, None
    if options.gradient == "auto":
        half = dtype in (torch.bfloat16, torch.float16)
        sparse = half and head.vocabulary >= SMALLEST_VOCABULARY and backend != "reference"
        in_graph = backend == "auto" and device_type in ("cuda", "xpu")
        on_gpu = in_graph or backend in EXACT_WHERE_FROZEN
        if sparse and on_gpu and not trained and head.shard is None and options.scan != "int8":
            return None, "the head is frozen, where on a GPU exact gradients take less time and memory"
    if sparse and (outputs.beta or outputs.entropy_gradient):
        return None, f"the gradient of the {'divergence' if outputs.beta else 'entropy'} has no sparse form"
    return (float(options.tolerance) if sparse else None), None


def _low_rank_rows(low_rank: LowRank, x: Tensor, select: Callable[[Tensor], Tensor], valid: Tensor | None) -> Tensor:
    """u [N, r] of the tokens x."""
    if low_rank.rows is not None:
        return select(low_rank.rows.reshape(-1, low_rank.rows.shape[-1]))
    if valid is not None:  # what ignored tokens hold, perhaps NaN, must not get into the gradient of a
        x = torch.where(valid[:, None], x, 0)
    return low_rank.inputs(x)


def _inputs_of_low_rank(head: LMHead, b: Tensor | None) -> Tensor | None:
    """[r, D], a copy: A may have changed when backward runs. Columns of `b` that are a reference's have zeros."""
    if b is None or (head.low_rank is not None and head.low_rank.a is None):
        return None
    inputs = b.detach().new_zeros(b.shape[1], head.weight.shape[1])
    if head.low_rank is not None:
        inputs[: head.low_rank.b.shape[1]] = head.low_rank.a.detach()
    return inputs


def _with_low_rank(
    rows: list[Tensor | None], u: Tensor | None, u_ref: Tensor | None, b: Tensor | None, shared: LowRank | None
) -> tuple[list[Tensor | None], Tensor | None]:
    """Rows [x, u] and [x_ref, u_ref], and B. `shared`: the reference's low-rank part where it is on the same W.

    Another B_ref than B there gives [B, B_ref − B], with [u, 0] and [u_ref, u_ref]: then what the difference form
    multiplies is small where the two adapters nearly agree. Of other ranks: [B, B_ref], with [u, 0] and [0, u_ref]. u
    is rounded to the dtype of x, but not where u − u_ref may cancel.
    """
    x, x_ref = rows
    if u is not None:
        x = torch.cat([x, u if u_ref is not None and shared is not None else u.to(x.dtype)], 1)
    if u_ref is not None:
        u_ref = u_ref.detach()
        if shared is not None and (b is None or not _same_tensor(b, shared.b)):
            b_ref = shared.b.detach()
            x = nn.functional.pad(x, (0, b_ref.shape[1]))
            if b is None:
                b = b_ref
            elif b.shape == b_ref.shape:
                wide = torch.promote_types(b.dtype, torch.float32)
                b, u_ref = torch.cat([b, b_ref.to(wide) - b.detach().to(wide)], 1), torch.cat([u_ref, u_ref], 1)
            else:
                b, u_ref = torch.cat([b, b_ref], 1), nn.functional.pad(u_ref, (b.shape[1], 0))
        x_ref = torch.cat([x_ref, u_ref], 1)
    return [x, x_ref], b
