"""What a model says of each position: its likeliest tokens, how sure it is, and how likely the token that stands there
is."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .forwards import Forward

KEPT = 32  # likeliest tokens kept of each position
ROWS = 64  # rows of float32 probabilities in memory at a time


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one position: the KEPT likeliest tokens in order, the entropy in nats, and the token that stands there.

    Of those equally likely the one with the lower id comes first, as in a greedy choice.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropy: float
    token_id: int
    logprob: float
    rank: int  # 1 where it is the likeliest

    @property
    def probability(self) -> float:
        return math.exp(self.logprob)

    def likeliest(self, k: int) -> tuple[tuple[int, float], ...]:
        """Ids and probabilities."""
        return tuple((token, math.exp(p)) for token, p in zip(self.ids[:k], self.logprobs[:k], strict=True))

    @property
    def margin(self) -> float:
        """p(token) − p(the likeliest other one): below 0 where the token is not the likeliest."""
        others = (p for token, p in zip(self.ids, self.logprobs, strict=True) if token != self.token_id)
        return self.probability - math.exp(next(others, -math.inf))

    @property
    def doubt(self) -> float:
        """entropy · (1 − margin), in nats."""
        return self.entropy * (1 - self.margin)


def log_probabilities(rows: Tensor) -> Tensor:
    """[..., V] in float32 at least."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).log_softmax(-1)


@torch.no_grad()
def predictions(rows: Tensor, token_ids: Sequence[int]) -> list[Prediction]:
    """rows [T, V], logits; token_ids: what stands at each. Memory: ROWS · V floats."""
    found: list[Prediction] = []
    for first in range(0, len(rows), ROWS):
        logp = log_probabilities(rows[first : first + ROWS])
        tokens = torch.tensor(token_ids[first : first + ROWS], device=logp.device)[:, None]
        own = logp.gather(1, tokens)
        ahead = (logp > own) | ((logp == own) & (torch.arange(logp.shape[1], device=logp.device) < tokens))
        top = logp.topk(min(KEPT, logp.shape[1]))
        numbers = zip(
            top.indices.tolist(),
            top.values.tolist(),
            torch.special.entr(logp.exp()).sum(1).tolist(),
            tokens[:, 0].tolist(),
            own[:, 0].tolist(),
            ahead.sum(1).tolist(),
            logp.argmax(1).tolist(),
            strict=True,
        )
        for ids, values, entropy, token, logprob, before, first_id in numbers:
            if not math.isfinite(entropy):
                raise ValueError("model: its logits are not finite, so nothing can be said of its tokens")
            kept = sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))
            if kept[0][0] != first_id:  # more than KEPT are equally likely
                kept = [(first_id, kept[0][1]), *kept[:-1]]
            kept_ids, logprobs = zip(*kept, strict=True)
            found.append(Prediction(kept_ids, logprobs, entropy, token, logprob, before + 1))
    return found


def predictions_of(forward: Forward, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[Prediction]:
    """Of each token of an answer that is given: one forward (one per PIECE tokens of a long answer)."""
    if not token_ids:
        return []
    found: list[Prediction] = []
    for rows in forward.pieces([*prompt_ids, *token_ids[:-1]], len(prompt_ids)):
        found += predictions(rows, token_ids[len(found) : len(found) + len(rows)])
    return found


@torch.no_grad()
def kl_of(original: Tensor, tuned: Tensor) -> list[float]:
    """KL(original ‖ tuned) = Σ_v p_o(v) · (ln p_o(v) − ln p_t(v)) of each row [T, V], in nats; exact, not sampled."""
    found: list[float] = []
    for a, b in zip(original.split(ROWS), tuned.split(ROWS), strict=True):
        logp_o, logp_t = log_probabilities(a), log_probabilities(b.to(a.device))
        p = logp_o.exp()
        found += torch.where(p > 0, p * (logp_o - logp_t), 0).sum(1).clamp_min(0).tolist()
    return found


@torch.no_grad()
def choose(row: Tensor, temperature: float, top_p: float, noise: tuple[int, int]) -> int:
    """The next token of logits [V]: the likeliest at temperature 0, else one drawn by softmax(row / temperature).

    top_p < 1 leaves the fewest likeliest tokens whose probabilities sum to at least top_p. `noise`, (seed, position),
    decides the draw alone: a text that is generated a second time, or after a stop, comes out the same.
    """
    if temperature == 0:
        return int(row.argmax())
    p = log_probabilities(row / temperature).exp().cpu().double()
    p, ids = p.sort(descending=True, stable=True)
    total = p.cumsum(0)
    if top_p < 1:
        count = int((total < top_p).sum()) + 1
        total, ids = total[:count], ids[:count]
    drawn = random.Random(f"{noise[0]}/{noise[1]}").random() * total[-1]
    return int(ids[min(int((total <= drawn).sum()), len(ids) - 1)])
