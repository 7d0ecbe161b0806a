"""What is true of given inputs: values and gradients in float64, of some tokens and some ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .inputs import Inputs
from .losses import BETA, CROSS_ENTROPY, JSD, LAWF_FROZEN, LAWF_TRAINED, LOSSES, TALR, anchors, talr_weights

TOKENS, IDS = 128, 256  # how many are looked at, and besides these the tokens' labels
NUMBERS = 1 << 24  # of a temporary


@dataclass
class Statistics:
    """Of every token, [N], in float64."""

    lse: Tensor
    reference_lse: Tensor
    nll: Tensor
    kl: Tensor  # KL(p_ref ‖ p)
    jsd: Tensor
    kl_to_mean: Tensor  # KL(p ‖ m), m = β p_ref + (1 − β) p


@dataclass
class Truth:
    tokens: Tensor
    ids: Tensor
    each: dict[str, Tensor]  # {loss: values of the tokens}
    hidden: dict[str, Tensor]  # {loss: gradient of the tokens' hidden states}
    weight: dict[str, Tensor]  # {loss: gradient of the ids' rows of the head}

    def save(self, path: Path) -> None:
        torch.save(asdict(self), path)

    @staticmethod
    def load(path: Path, device: str) -> Truth:
        return Truth(**torch.load(path, map_location=device))

    def errors(self, loss: str, hidden: Tensor, weight: Tensor | None, each: Tensor | None) -> dict[str, float | None]:
        """Relative L2 of both gradients (given whole), mean and largest difference of the tokens' values."""
        apart = None if each is None else (each.double() - self.each[loss]).abs()
        return {
            "hidden_error": relative(hidden[self.tokens], self.hidden[loss]),
            "weight_error": None if weight is None else relative(weight[self.ids], self.weight[loss]),
            "token_error": None if apart is None else apart.mean().item(),
            "largest_token_error": None if apart is None else apart.max().item(),
        }


def relative(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


def truth_of(given: Inputs) -> Truth:
    """In two products of all tokens in float64, by blocks of tokens."""
    n, v = len(given.labels), len(given.weight)
    tokens = (torch.arange(min(TOKENS, n), device=given.labels.device) * n // min(TOKENS, n)).unique()
    evenly = torch.arange(min(IDS, v), device=given.labels.device) * v // min(IDS, v)
    ids = torch.cat([given.labels[tokens], evenly]).unique()
    found = _statistics(given)
    some = anchors(len(tokens), tokens.device)  # as a call of these tokens alone has them
    nll, kl = found.nll[tokens], found.kl[tokens]
    lawf = torch.where(some, nll, kl)
    each = {CROSS_ENTROPY: nll, TALR: nll, LAWF_FROZEN: lawf, LAWF_TRAINED: lawf, JSD: found.jsd[tokens]}
    gradients = {loss: _gradients(loss, given, found, tokens, ids) for loss in LOSSES}
    hidden, weight = ({loss: both[i] for loss, both in gradients.items()} for i in range(2))
    return Truth(tokens, ids, each, hidden, weight)


def _rows(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The head in float64, some of its rows at a time."""
    for start in range(0, len(weight), 16384):
        part = slice(start, min(start + 16384, len(weight)))
        yield part, weight[part].double()


def _statistics(given: Inputs) -> Statistics:
    v, found = len(given.weight), []
    for tokens in torch.arange(len(given.labels), device=given.labels.device).split(max(8, NUMBERS // v)):
        both = torch.cat([given.hidden[tokens], given.reference_hidden[tokens]]).double()
        logits = torch.empty(len(both), v, dtype=torch.float64, device=both.device)
        for part, rows in _rows(given.weight):
            torch.mm(both, rows.T, out=logits[:, part])
        lse = logits.logsumexp(1)
        log_p, log_r = (logits - lse[:, None]).split(len(tokens))
        log_m = _log_mean(log_p, log_r)
        p, r = log_p.exp(), log_r.exp()
        to_mean = (p * (log_p - log_m)).sum(1)
        found.append(
            (
                lse[: len(tokens)], lse[len(tokens) :], -log_p.gather(1, given.labels[tokens, None])[:, 0],
                (r * (log_r - log_p)).sum(1), BETA * (r * (log_r - log_m)).sum(1) + (1 - BETA) * to_mean, to_mean,
            )
        )  # fmt: skip
    return Statistics(*map(torch.cat, zip(*found, strict=True)))


def _log_mean(log_p: Tensor, log_r: Tensor) -> Tensor:
    beta = log_p.new_tensor(BETA)
    return torch.logaddexp(log_r + beta.log(), log_p + (1 - beta).log())


def _gradients(loss: str, given: Inputs, found: Statistics, tokens: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """dx at the tokens, dW at the ids."""
    of_logits = _of_logits(loss, found, given)
    dx = torch.zeros(len(tokens), given.hidden.shape[1], dtype=torch.float64, device=tokens.device)
    for part, rows in _rows(given.weight):
        dx += of_logits(tokens, torch.arange(part.start, part.stop, device=tokens.device), rows) @ rows
    every = torch.arange(len(given.labels), device=tokens.device)
    return dx, of_logits(every, ids, given.weight[ids].double()).T @ given.hidden.double()


def _of_logits(loss: str, found: Statistics, given: Inputs) -> Any:
    """dz[token, id] of the loss, a function of tokens, ids, and the ids' rows."""
    n, labels = len(found.nll), given.labels
    a, b = torch.full_like(found.nll, 1 / n), torch.zeros_like(found.nll)  # weights of nll and of kl
    if loss == TALR:
        a = talr_weights(found.nll) / n
    elif loss in (LAWF_FROZEN, LAWF_TRAINED):
        c = anchors(n, labels.device).double()
        a, b = c / n, (1 - c) / n

    def dz(tokens: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        log_p = given.hidden[tokens].double() @ rows.T - found.lse[tokens, None]
        p = log_p.exp()
        if loss not in (JSD, LAWF_FROZEN, LAWF_TRAINED):
            return a[tokens, None] * (p - (ids == labels[tokens, None]).double())
        log_r = given.reference_hidden[tokens].double() @ rows.T - found.reference_lse[tokens, None]
        if loss == JSD:
            return (1 - BETA) / n * p * (log_p - _log_mean(log_p, log_r) - found.kl_to_mean[tokens, None])
        at_label = (ids == labels[tokens, None]).double()
        return (a + b)[tokens, None] * p - a[tokens, None] * at_label - b[tokens, None] * log_r.exp()

    return dz
