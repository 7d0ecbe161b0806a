"""Distillation from a teacher of whom each token has a few ids and log-probabilities."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..compiled import capturable
from ..preparation import Outputs
from ..problem import Statistics
from ..validation import MOST_IDS
from .arguments import Field
from .base import HeadLike
from .distillation import Distillation

CHOICES = {"divergence": ("forward", "reverse", "jsd"), "rest": ("none", "bucket")}
REST = 1e-7  # a rest below this counts as this much, so that its logarithm is finite
NO_ENTRY = -1e30  # in place of −∞, whose logsumexp has no gradient


class TopKDistillationLoss(Distillation):
    """Distillation from a teacher's top k: Σ (D(q, p) + nll_weight · nll) / n, on the k tokens that the teacher names.

    q_j = exp(teacher_logprobs[j]) of the ids of a token, p_j = softmax(z / temperature)[teacher_ids[j]] of the model::

        divergence   rest="none"                                       rest="bucket"
        "forward"    Σ_j q_j (log q_j − log p_j), q as given           KL(Q ‖ P)
        "reverse"    KL(p̃ ‖ q̃)                                        KL(P ‖ Q)
        "jsd"        β KL(q̃ ‖ m̃) + (1 − β) KL(p̃ ‖ m̃)                 β KL(Q ‖ M) + (1 − β) KL(P ‖ M)

    Q = (q_1, …, q_k, 1 − Σq) and P = (p_1, …, p_k, 1 − Σp): what the teacher does not name is one more class. q̃ = q/Σq
    and p̃ = p/Σp are renormalised over the k; M = β Q + (1 − β) P. A rest below 1e-7 counts as 1e-7.

    Take it where the teacher is not in memory: its top k come from a data set, a server or an API, or were computed
    once. Take rest="bucket" where Σq is well below 1, so for a small k or a flat teacher: with "none" the forward
    loss is least at p_j = q_j / Σq, so what the teacher left unnamed is unlearned, and its value there is Σq log Σq,
    below 0; the renormalised ones do not see how much the student gives to tokens outside of the k. With a bucket the
    loss is at most that of the whole vocabulary, and 0 where the student is the teacher. Not for a teacher in memory:
    `JSDLoss` sees all of its vocabulary.

    Args:
        divergence: "forward": covers all that the teacher may say; "reverse": seeks modes, of what the teacher named;
            "jsd": between. "jsd" with beta=0 and rest="none" is KL(q̃ ‖ p̃), as TRL's server distillation has it
            without a tail.
        beta: β in [0, 1], of "jsd" alone; the others have none.
        rest: "none" or "bucket".
        temperature: > 0; divides the student's logits in the divergence, not in the nll. The teacher's
            log-probabilities must be of the same temperature already: those of temperature 1, divided by it, with
            normalise=True.
        nll_weight: ≥ 0, of the cross-entropy with the labels.
        normalise: whether q is renormalised over the k first. Any numbers will do then, logits too.

    In float32 the model's own rest, 1 − Σp, is known to about 1e-6: where it is 1e-5, so that the student is surer than
    the teacher, a token's loss is off by up to 0.5 %, and its gradient by 1.4 % at 5e-6, 11 % at 5e-7 (measured).
    float64 has no such limit.

    Args of the call: hidden [..., D], head, labels int64 [...]; `teacher_ids` int64 [..., k], k ≤ 128, no id twice at
    a token, −100: no entry; `teacher_logprobs` [..., k], ≤ 0, −∞: no entry; `num_items`. Both are
    predictions of the token that labels has there; in a patched model and a collator position t speaks of the token at
    t, as vLLM's prompt_logprobs do. A token without any entry has no divergence. n counts every token with a label,
    those without an entry too. Returns a scalar, float32 (float64 for float64).

    3 GEMMs; 2 with a frozen head; sparse 1, with a certificate of the whole gradient. With both a temperature and an
    nll_weight 3 (2) more, for a pass at temperature 1, and gradients are exact. Source: axolotl's kd plugin (forward,
    "none"), TRL's server distillation (the tail, and both renormalised), longern/lawftrack (k = 4 and a rest).
    """

    fields: ClassVar = {
        "teacher_ids": Field("the ids that the teacher names, int64 [..., k], -100 where there is none", several=True),
        "teacher_logprobs": Field("the teacher's log-probabilities of teacher_ids, in the same shape", several=True),
    }
    bounds: ClassVar = Distillation.bounds | {"beta": dict(least=0, most=1)}

    def __init__(
        self, divergence: str = "forward", beta: float = 0.5, rest: str = "none", temperature: float = 1.0,
        nll_weight: float = 0.0, normalise: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(**options)
        self.divergence, self.beta, self.rest = divergence, beta, rest
        self.temperature, self.nll_weight, self.normalise = temperature, nll_weight, normalise

    def __setattr__(self, name: str, value: Any) -> None:
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{name}: expected {' or '.join(CHOICES[name])}, got {value!r}")
        if name == "normalise" and value not in (True, False):
            raise ValueError(f"normalise: expected True or False, got {value!r}")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        beta = f", beta={self.beta}" * (self.divergence == "jsd")
        return (
            f"{self.divergence!r}{beta}, rest={self.rest!r}, temperature={self.temperature}, "
            f"nll_weight={self.nll_weight}, normalise={self.normalise}"
        )

    def outputs(self, ids: Tensor | None) -> Outputs:
        """`beta` is not that of a divergence from a reference."""
        return Outputs(ids, None, self.temperature, ids_name="teacher_ids")

    @capturable
    def forward(
        self,
        hidden: Tensor,
        head: HeadLike,
        labels: Tensor,
        *,
        teacher_ids: Tensor | None = None,
        teacher_logprobs: Tensor | None = None,
        num_items: Any = None,
    ) -> Tensor:
        self.check_call(None, {"teacher_ids": teacher_ids, "teacher_logprobs": teacher_logprobs})
        tokens = self.prepare(hidden, head, labels, ids=teacher_ids)
        if isinstance(teacher_logprobs, Tensor) and teacher_logprobs.shape != teacher_ids.shape:
            raise ValueError(
                f"teacher_logprobs: expected the shape of teacher_ids {list(teacher_ids.shape)}, a number for each, "
                f"got {list(teacher_logprobs.shape)}"
            )
        ids = tokens.check(tokens.problem.ids, "teacher_ids", "distinct")
        log_q = tokens.select(teacher_logprobs, "teacher_logprobs", several=True).detach()
        log_q = log_q.to(tokens.problem.accumulator).masked_fill(ids < 0, -torch.inf)
        log_q = tokens.check(log_q, "teacher_logprobs", "log_weights" if self.normalise else "log_probabilities")
        if self.normalise or (self.rest == "none" and self.divergence != "forward"):
            log_q = log_q - _logsumexp(log_q).clamp(min=NO_ENTRY)  # −∞ where a token has no entry
        per_token = {"log_q": log_q}
        if self.rest == "bucket":
            per_token["log_q"], q_rest = with_rest(log_q)
            # Of a sum that is 1 by itself rounding would leave something, but not where there is no entry.
            per_token["q_rest"] = q_rest.floor() if self.normalise else q_rest
        loss = self.reduce(tokens, num_items, **per_token)
        return self.plus_nll_of_another_pass(loss, hidden, head, labels, num_items)

    def token_loss(self, out: Statistics, log_q: Tensor, q_rest: Tensor | None = None) -> Tensor:
        named = log_q > -torch.inf
        whole = self.divergence == "forward" or self.rest == "bucket"
        log_p = out.logits_at - (out.lse[:, None] if whole else _logsumexp(out.logits_at.masked_fill(~named, NO_ENTRY)))
        log_p, log_q = torch.where(named, log_p, 0), torch.where(named, log_q, 0)
        p, q = log_p.exp().masked_fill(~named, 0), log_q.exp().masked_fill(~named, 0)
        d = log_p - log_q
        if self.divergence == "forward" and self.rest == "none":
            return self.plus_nll(-(q * d).sum(-1), out)
        beta = {"forward": 0, "reverse": 1}.get(self.divergence, self.beta)
        gap = torch.where(d.abs() < 1, q * d.clamp(-1, 1).expm1(), p - q)  # p − q
        loss = terms(beta, p, q, d, gap).sum(-1)
        if q_rest is not None:
            loss = loss + terms(beta, *of_the_rest(q_rest, gap.sum(-1)))
        return self.plus_nll(loss, out)


def terms(beta: float, p: Tensor, q: Tensor, d: Tensor, gap: Tensor) -> Tensor:
    """What each class adds to β KL(q ‖ m) + (1 − β) KL(p ‖ m), m = β q + (1 − β) p, β = 0: KL(q ‖ p), β = 1: KL(p ‖ q).

    d = log p − log q, gap = p − q. Multiples of gap, whose sum over all classes is 0, are added so that every term is
    ≥ 0 and of second order in d: near the teacher nothing cancels.
    """
    if beta == 0:
        return gap - q * d
    if beta == 1:
        return p * d - gap
    near, far = d.clamp(max=1), d.clamp(min=1)
    small = (beta / (1 - beta) * (-far).exp()).log1p() + math.log(1 - beta)
    log_mq = torch.where(d < 1, ((1 - beta) * near.expm1()).log1p(), far + small)  # log m − log q
    log_pm = torch.where(d < 1, near - ((1 - beta) * near.expm1()).log1p(), -small)  # log p − log m
    return beta * ((1 - beta) * gap - q * log_mq) + (1 - beta) * (p * log_pm - beta * gap)


def with_rest(log_q: Tensor) -> tuple[Tensor, Tensor]:
    """log q, with a sum of q of at most 1, and 1 − Σq: from the largest, as 1 − q_1 is exact where q_1 is nearly 1."""
    log_q = log_q - _logsumexp(log_q).clamp(min=0)
    largest, at = log_q.max(-1, keepdim=True)
    others = log_q.exp().scatter(-1, at, 0).sum(-1)
    return log_q, (-largest.squeeze(-1).expm1() - others).clamp(min=0)


def of_the_rest(q: Tensor, gap: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, q, d and gap of the class that holds all other tokens. `gap`: Σ (p − q) of those that are named."""
    p, floored = (q - gap).clamp(min=REST), q.clamp(min=REST)
    near = (gap.abs() < q / 2) & (q > REST)
    d = torch.where(near, (-torch.where(near, gap, 0) / floored).log1p(), p.log() - floored.log())
    return p, floored, d, -gap


def _logsumexp(values: Tensor) -> Tensor:
    return values.logsumexp(-1, keepdim=True)


assert MOST_IDS == 128  # as the docstring has it
