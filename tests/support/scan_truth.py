"""A sweep of a GPU backend by itself, and float64 truth of what it keeps and leaves out."""

from __future__ import annotations

import torch
from cases import Case, relative
from torch import Tensor

from fused_losses import backends
from fused_losses.problem import Entries, Head, Int8, Problem, Selection, Statistics
from fused_losses.sparse.spectrum import directions_of


def problem_of(case: Case, dtype: torch.dtype, device: str = "cpu", int8: Int8 | None = None) -> Problem:
    """Of the tokens with a label; the reference's head has neither bias nor scale."""
    keep = case.labels >= 0
    hidden, head, reference = case.inputs(dtype, device)
    bias = None if head.bias is None else head.bias.detach().float()
    ours = Head(head.weight.detach(), bias, head.logit_scale, head.softcap)
    ref_hidden = own = None
    if reference is not None:
        ref_hidden = reference.hidden.detach()[keep]
        own = None if case.reference_weight is None else Head(reference.head.weight.detach(), None, 1.0, None)
    return Problem(
        hidden.detach()[keep], case.labels[keep].to(device), ours, ref_hidden, own, dtype,
        wanted=frozenset({"entropy"}), tolerance=0.1, int8=int8,
    )  # fmt: skip


def finished(products: Tensor, head: Head) -> Tensor:
    z = products if head.bias is None else products + head.bias.double()
    z = z * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def logits(problem: Problem) -> Tensor:
    """[N, V] float64; with a shared head x is x_ref plus the difference as the kernels have it, rounded."""
    hidden = problem.hidden.double()
    if problem.shared_head:
        difference = problem.hidden.float() - problem.reference_hidden.float()
        hidden = problem.reference_hidden.double() + difference.to(problem.dtype).double()
    return finished(hidden @ problem.head.weight.double().T, problem.head)


def reference_logits(problem: Problem) -> Tensor:
    head = problem.reference_head or problem.head
    return finished(problem.reference_hidden.double() @ head.weight.double().T, head)


def logits_of_8_bits(problem: Problem, eight) -> Tensor:
    """[N, V] float64 of the quantised numbers."""
    x, w = (operand.float().double() for operand in (eight.hidden, eight.weight))
    return finished(x @ w.T * eight.hidden_scale.double()[:, None] * eight.weight_scale.double(), problem.head)


def swept(
    problem: Problem, backend: str = "triton", threshold: float = 5e-3, capacity: int | None = None,
    directed: bool = True,
) -> tuple[Statistics, list[Entries], Tensor]:  # fmt: skip
    """Statistics, entries, and which ids are entries, [N, V]."""
    module, device = backends.load(backend), problem.hidden.device
    n, v = len(problem.labels), problem.head.vocabulary
    rows = directions_of(problem.head.weight).rows if directed else None
    out = module.empty_statistics(problem)
    profile = torch.zeros(v, device=device)
    selection = Selection(threshold, capacity or v, torch.arange(n, device=device), profile, False, rows)
    found = [entries for _, entries in module.scan(problem, out, selection)]
    counts, columns = (torch.cat([getattr(c, f) for c in found]) for f in ("counts", "columns"))
    kept = torch.zeros(n, v, dtype=torch.bool, device=device)
    kept[torch.repeat_interleave(torch.arange(n, device=device), counts.clamp(min=0)), columns.long()] = True
    return out, found, kept


def deviations(problem: Problem, backend: str = "triton", threshold: float = 5e-3) -> dict[str, float]:
    """Relative error of each field of `Tails` that directions give, beside float64 with the entries that were kept."""
    _, found, kept = swept(problem, backend, threshold)
    n, v = kept.shape
    assert n < kept.sum() < 0.95 * n * v, kept.sum() / n
    rows = directions_of(problem.head.weight).rows
    z = logits(problem)
    slope = torch.ones_like(z) if problem.head.softcap is None else 1 - (z / problem.head.softcap) ** 2
    p, truth = z.softmax(1), {}
    parts = {"nll": p}
    if problem.has_reference:
        parts["kl"] = p - reference_logits(problem).softmax(1)
    for part, values in parts.items():
        left = (values * slope).masked_fill(kept, 0)
        truth[f"{part}_left"], truth[f"{part}_square"] = left.sum(1), left.square().sum(1)
        truth[f"{part}_low"] = left @ rows.double()
    return {field: relative(torch.cat([getattr(c.tails, field) for c in found]), value)
            for field, value in truth.items()}  # fmt: skip


def misleading(n: int, d: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head and labels. Groups of ids that no token mixes, told apart along one direction: with one
    profile alone dx is off by far."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(v, d, generator=g) / d**0.5
    half = torch.where(torch.arange(v) < v // 2, 1.0, -1.0)
    weight[:, 0], weight[:, 1] = -(1.0 + torch.arange(v) % (v // 2)).log(), 10 * half
    hidden = 2.5 * torch.randn(n, d, generator=g)
    hidden[:, 0], hidden[:, 1] = 1.2, torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)
    labels = torch.multinomial((hidden @ weight.T).softmax(1), 1, generator=g)[:, 0]
    return hidden, weight, labels
