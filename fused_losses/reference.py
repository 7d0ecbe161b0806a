"""Every loss of the package with full [N, V] logits in plain PyTorch: the specification, and the oracle of all tests.

Give it float64 tensors for the truth. In bf16 or fp16 it does what a plain training loop does: logits in that dtype,
then fp32. Autograd differentiates all of it. Functions take logits of valid tokens, [N, V], and labels, [N].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .head import LMHead, LowRank
from .problem import Head


def logits(hidden: Tensor, head: LMHead | Head) -> Tensor:
    """softcap(scale · (x Wᵀ + u Bᵀ + b)), [N, V]; of a `Head` with a low-rank part hidden's rows are [x, u]."""
    low_rank, dim = head.low_rank, head.weight.shape[1]
    if isinstance(low_rank, LowRank):
        hidden, low_rank = torch.cat([hidden, low_rank.inputs(hidden)], -1), low_rank.b
    bias = head.bias
    of_its_own = bias is not None and bias.dtype != head.weight.dtype  # a dtype, of which sums then are
    z = F.linear(hidden[..., :dim].to(head.weight.dtype), head.weight, None if of_its_own else bias)
    z = z + bias if of_its_own else z
    if low_rank is not None and hidden.shape[-1] > dim:
        z = z + F.linear(hidden[..., dim:].to(low_rank.dtype), low_rank).to(z.dtype)
    z = z.to(torch.promote_types(z.dtype, torch.float32)) * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def nll(z: Tensor, labels: Tensor) -> Tensor:
    return -z.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def entropy(z: Tensor) -> Tensor:
    log_p = z.log_softmax(-1).clamp(min=torch.finfo(z.dtype).min)
    return -(log_p.exp() * log_p).sum(-1)


def kl(z_ref: Tensor, z: Tensor) -> Tensor:
    """KL(p_ref ‖ p) per token."""
    log_p, log_r = z.log_softmax(-1), z_ref.log_softmax(-1)
    return (log_r.exp() * torch.where(log_r > -torch.inf, log_r - log_p, 0)).sum(-1)


def divergence(z_ref: Tensor, z: Tensor, beta: float) -> Tensor:
    """β KL(p_ref ‖ m) + (1 − β) KL(p ‖ m) per token, m = β p_ref + (1 − β) p; β = 0: KL(p_ref ‖ p), β = 1: KL(p ‖
    p_ref)."""
    if beta == 0:
        return kl(z_ref, z)
    if beta == 1:
        return kl(z, z_ref)
    log_p, log_r = z.log_softmax(-1), z_ref.log_softmax(-1)
    neither = (log_p == -torch.inf) & (log_r == -torch.inf)  # logaddexp has no gradient there
    parts = (log_r.masked_fill(neither, 0) + math.log(beta), log_p.masked_fill(neither, 0) + math.log1p(-beta))
    log_m = torch.logaddexp(*parts).masked_fill(neither, -torch.inf)
    return beta * kl(log_r, log_m) + (1 - beta) * kl(log_p, log_m)


def logits_at(z: Tensor, ids: Tensor) -> Tensor:
    """z[t, ids[t, j]], 0 where the id is negative."""
    return z.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 0)


def rank(z: Tensor, labels: Tensor) -> Tensor:
    """How many logits are larger than the label's."""
    return (z > z.gather(-1, labels[:, None])).sum(-1)


def log_p2(z: Tensor) -> Tensor:
    """log Σ p²."""
    return (2 * z.log_softmax(-1)).logsumexp(-1)


def topk_entropy(z: Tensor, k: int) -> Tensor:
    """Entropy of the k largest probabilities, renormalised."""
    return entropy(z.topk(min(k, z.shape[-1]), -1).values)


def talr_temperature(nll: Tensor, sequence: Tensor, even_median: str = "mean") -> Tensor:
    """Median over sequences of their mean nll, at least 1e-6; of an even number the mean, or the lower, of the middle
    two."""
    means = torch.stack([nll[sequence == s].mean() for s in sequence.unique()]).detach().sort().values
    lower, upper = means[(len(means) - 1) // 2], means[len(means) // 2]
    return (lower if even_median == "lower" else (lower + upper) / 2).clamp(min=1e-6)


# Each objective returns one loss per token; the reported loss is their sum over n, the number of valid tokens.


def cross_entropy(
    z: Tensor, labels: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """As of torch.nn.functional.cross_entropy(reduction="none"), and z_loss · logsumexp(z)²."""
    log_p = z.log_softmax(-1)
    w = log_p.new_ones(z.shape[-1]) if class_weights is None else class_weights.to(log_p)
    onehot = F.one_hot(labels, z.shape[-1]).to(log_p)
    target = (1 - label_smoothing) * onehot + label_smoothing / z.shape[-1]
    return -(target * w * log_p).sum(-1) + z_loss * z.logsumexp(-1) ** 2


def weighted(z: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return weights * nll(z, labels)


def talr(z: Tensor, labels: Tensor, temperature: Tensor | float, floor: float = 0.01) -> Tensor:
    loss = nll(z, labels)
    return (-loss.detach() / temperature).exp().clamp(min=floor) * loss


def lawf(z: Tensor, z_ref: Tensor, labels: Tensor, confidence: Tensor, anchor_weight=1.0, retain_weight=1.0) -> Tensor:
    """weight · KL(q ‖ p), q = c · onehot(y) + (1 − c) · p_ref written out; weight: anchor_weight where c > 0."""
    c = confidence[:, None].to(z.dtype)
    q = c * F.one_hot(labels, z.shape[-1]) + (1 - c) * z_ref.softmax(-1)
    loss = (torch.xlogy(q, q) - torch.where(q > 0, q * z.log_softmax(-1), 0)).sum(-1)
    anchor = (confidence > 0).to(z.dtype)
    return (anchor * anchor_weight + (1 - anchor) * retain_weight) * loss


def lawf_with_target(
    z: Tensor, z_ref: Tensor, labels: Tensor, anchor: Tensor, target: Tensor, anchor_weight=1.0, retain_weight=1.0
) -> Tensor:
    """weight · KL(q ‖ p), q[label] = target and the others in proportion to p_ref where p_ref[label] is below
    target."""
    p_ref, at_label = z_ref.softmax(-1), F.one_hot(labels, z.shape[-1]).bool()
    r, target = p_ref[at_label], target.to(z.dtype)
    anchor = (anchor & (r < target)).to(z.dtype)
    raised = torch.where(at_label, target[:, None], p_ref * ((1 - target) / (1 - r))[:, None])
    q = torch.where(anchor[:, None] > 0, raised, p_ref)
    loss = (torch.xlogy(q, q) - torch.where(q > 0, q * z.log_softmax(-1), 0)).sum(-1)
    return (anchor * anchor_weight + (1 - anchor) * retain_weight) * loss


def flow(z: Tensor, labels: Tensor, initial_mean_nll: Tensor, temperature: float) -> Tensor:
    return (-initial_mean_nll / temperature).exp() * nll(z, labels)


def dft(z: Tensor, labels: Tensor) -> Tensor:
    loss = nll(z, labels)
    return (-loss).exp().detach() * loss


def asft(z: Tensor, z_ref: Tensor, labels: Tensor, kl_weight: float = 0.1) -> Tensor:
    return dft(z, labels) + kl_weight * kl(z_ref, z)


def eaft(z: Tensor, labels: Tensor, alpha: float = 1.0, top_k: int = 20, normaliser: float | None = None) -> Tensor:
    k = min(top_k, z.shape[-1])
    return (topk_entropy(z, k) / (normaliser or math.log(k))).detach() ** alpha * nll(z, labels)


def psft(z: Tensor, labels: Tensor, old_nll: Tensor, epsilon: float = 0.2, epsilon_high: float | None = None) -> Tensor:
    ratio = (old_nll - nll(z, labels)).clamp(max=20).exp()  # clipped anyway; exp must not overflow
    return -torch.minimum(ratio, ratio.clamp(1 - epsilon, 1 + (epsilon_high or epsilon)))


def jsd(z: Tensor, z_ref: Tensor, labels: Tensor, beta=0.5, temperature=1.0, nll_weight=0.0) -> Tensor:
    return divergence(z_ref / temperature, z / temperature, beta) + nll_weight * nll(z, labels)


def topk_distillation(
    z: Tensor, labels: Tensor, teacher_ids: Tensor, teacher_logprobs: Tensor, divergence="forward", beta=0.5,
    rest="none", temperature=1.0, nll_weight=0.0, normalise=False,
) -> Tensor:  # fmt: skip
    """Of the classes that the teacher names and, with rest="bucket", one that holds all others; see the objective."""
    named = (teacher_ids >= 0) & (teacher_logprobs > -torch.inf)
    p = (z / temperature).softmax(-1).gather(-1, teacher_ids.clamp(min=0)).masked_fill(~named, 0)
    q = teacher_logprobs.to(z.dtype).exp().masked_fill(~named, 0)
    least = torch.finfo(z.dtype).tiny
    if normalise:
        q = q / q.sum(-1, keepdim=True).clamp(min=least)
    if rest == "bucket":
        q = q / q.sum(-1, keepdim=True).clamp(min=1)
        p, q = (torch.cat([x, (1 - x.sum(-1, keepdim=True)).clamp(min=1e-7)], -1) for x in (p, q))
        named = F.pad(named, (0, 1), value=True)
    elif divergence != "forward":
        p, q = (x / x.sum(-1, keepdim=True).clamp(min=least) for x in (p, q))
    p, q = p.masked_fill(~named, 1), q.masked_fill(~named, 1)  # log 1 − log 1 adds nothing
    if divergence == "jsd" and 0 < beta < 1:
        m = beta * q + (1 - beta) * p
        terms = beta * q * (q.log() - m.log()) + (1 - beta) * p * (p.log() - m.log())
    elif divergence == "forward" or (divergence == "jsd" and beta == 0):
        terms = q * (q.log() - p.log())
    else:
        terms = p * (p.log() - q.log())
    return terms.sum(-1) + nll_weight * nll(z, labels)


def reverse_kl(z: Tensor, z_ref: Tensor, temperature: float = 1.0) -> Tensor:
    return kl(z / temperature, z_ref / temperature)


def sequence_logps(z: Tensor, labels: Tensor, sequence: Tensor, count: int, average: bool = False) -> Tensor:
    """Σ log p of the labels of each sequence, or their mean: [count]."""
    logp = z.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    parts = [logp[sequence == s] for s in range(count)]
    return torch.stack([part.sum() / (max(len(part), 1) if average else 1) for part in parts])


def stm(z: Tensor, labels: Tensor, initial_nll: Tensor, threshold: float = 2.5) -> Tensor:
    return nll(z, labels) * (initial_nll.exp() < threshold)


def infosft(z: Tensor, labels: Tensor, max_probability: float = 0.93) -> Tensor:
    loss = nll(z, labels)
    p = (-loss).exp().detach()
    return p * (1 - p.logit() / math.log(max_probability / (1 - max_probability))).relu() * loss


def eksft(
    z: Tensor, z_ref: Tensor, labels: Tensor, fraction=0.2, entropy_weight=0.05, kl_weight=0.05, selection="union",
    reduction="group_mean",
) -> Tensor:  # fmt: skip
    """The loss of all tokens, as which are selected depends on the others."""
    h, reverse = entropy(z) / math.log(z.shape[-1]), kl(z, z_ref)
    count = math.floor(fraction * len(labels))
    uncertain, far = (x.detach().argsort(descending=True, stable=True)[:count] for x in (h, reverse))
    both = set(uncertain.tolist()) & set(far.tolist())
    left_out = both if selection == "intersection" else set(uncertain.tolist()) | set(far.tolist())
    kept = [t for t in range(len(labels)) if t not in left_out]
    loss = z.new_zeros(())
    for values, weight in ((nll(z, labels)[kept], 1.0), (h[uncertain], -entropy_weight), (reverse[far], kl_weight)):
        n = max(1, len(values)) if reduction == "group_mean" else len(labels)
        loss = loss + weight * values.sum() / n
    return loss


def sft_kl(z: Tensor, z_ref: Tensor, labels: Tensor, kl_weight: float) -> Tensor:
    return nll(z, labels) + kl_weight * kl(z_ref, z)


def mask_the_target(z: Tensor, z_ref: Tensor, labels: Tensor, kl_weight: float) -> Tensor:
    """The KL of both distributions without the label, each made to sum to 1."""
    label = F.one_hot(labels, z.shape[-1]).bool()
    others = kl(z_ref.masked_fill(label, -torch.inf), z.masked_fill(label, -torch.inf))
    return nll(z, labels) + kl_weight * others
