"""Made inputs of the head that behave like a real model's, of any D and V, without a model at hand.

They are drawn from 300 kB of statistics, measured on SmolLM2-135M-Instruct (D = 576, V = 49,152) and two texts:
answers that it generated, and Python's documentation. What decides about errors of sparse gradients is that rows of a
real head are far from Gaussian in the directions in which hidden states of a text differ (ids of a topic lie
together), and Gaussian enough in all others. So r = 65 orthonormal directions B of the model were taken: the mean
row, the mean hidden state of each text, 10 leading ones of the head, 24 of hidden states, 28 of their change by a
fine-tuning. In these, rows and hidden states are those of prototypes: 2,200 rows of the head, each standing for n_i
of them (1 for the likeliest ids), and 384 tokens of each text. With Q [r, D], orthonormal rows, in the place of B:

    W_v = Q^T B^T w_i + |w_i - B B^T w_i| u_v                     i drawn so that n_i V / 49,152 rows have it
    x_t = Q^T B^T x_j + |x_j - B B^T x_j| sqrt(D') u'_t + (1 - Q^T Q) (a_t W_(v_1) + b_t sum_k g_k W_(v_k))
    g_k = 1 - ln k / ln(1 + K), k = 2 .. K                        v_k: the id of the k-th largest logit without it

u: Gaussian, orthogonal to Q, of length 1, with the measured spectra. D' = (D - r) / (576 - r), so that logits keep
their variance at any D. The last term stands for what a hidden state has in common with the ids that it predicts: a_t
and b_t give the likeliest id the odds, and the others the entropy among them, that the prototype has; K, with which
the mass of unlikely ids comes nearest, is 350 for generated text (in proportion to V below 49,152, at least 60) and 60
for documentation. The label is the id whose nll is nearest to the prototype's. In the outlier channels of the model
(32, or D / 4) Q has what B has there, and is random in all others. The reference's hidden state is x_t - s_t d_t,

    d_t = Q^T B^T d_j + |d_j - B B^T d_j| sqrt(D') (cos_j x'_t + sin_j u''_t) + c_t (1 - Q^T Q) W_(v_1),

x'_t the direction of x_t outside Q, c_t such that the likeliest id rises or falls beside the others by the share of
the KL that it has in the prototype, and s_t such that the token has its prototype's share of the mean KL asked for.

With D < 2 r only the first D / 2 directions are taken. Above V = 49,152 added rows are drawn like others and then
made rarer by one number along the mean hidden state: before the last term together they have ((V / 49,152)^0.2 - 1)
times what others have, by the law of rank and frequency with the exponent 0.8 that SmolLM2's ids have on
documentation. Odds and entropies stay at any V: that is a choice, not a measurement. docs/method.md says how near all
this comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

STATISTICS = Path(__file__).parent / "calibrated.pt"
KINDS = ("generated", "documentation")
MEASURED_V, MEASURED_D = 49152, 576
LAW = 0.8  # exponent of rank and frequency
LEAST_DIM, LEAST_VOCABULARY, LEAST_CANDIDATES = 8, 128, 60


class Calibrated(NamedTuple):
    """Inputs of a loss with a shared head: of the model, and of its reference."""

    hidden: Tensor  # [N, D] dtype
    weight: Tensor  # [V, D] dtype
    labels: Tensor  # [N] int64
    reference_hidden: Tensor  # [N, D] dtype


@torch.no_grad()
def calibrated(
    tokens: int, dim: int, vocabulary: int, dtype: torch.dtype = torch.float32, seed: int = 0, kind: str = "generated",
    kl: float = 0.003, device: str | torch.device = "cpu",
) -> Calibrated:  # fmt: skip
    """Hidden states [tokens, dim], head [vocabulary, dim], labels [tokens] and a reference's hidden states, drawn by
    the formulas above; the same for the same arguments on the same kind of device.

    kind: "generated" (a model's own answers: entropy 1.7 nats, nll 0.7) or "documentation" (2.7 and 2.6).
    kl: mean KL(reference ‖ model) in nats, before rounding to `dtype`; 0: the reference is the model.
    dtype: of all but labels; computed in float32, so inputs of another dtype are these, rounded.

    ValueError for a size, kind, KL, or dtype that cannot be. Cost: 8 products of [tokens, dim] and [vocabulary, dim]
    and some 20 passes over the logits of 64 tokens at a time; memory of the head and of these logits.
    """
    _check(tokens, dim, vocabulary, dtype, kind, kl)
    return draw(statistics(), tokens, dim, vocabulary, dtype, seed, kind, kl, device)


def _check(tokens: int, dim: int, vocabulary: int, dtype: torch.dtype, kind: str, kl: float) -> None:
    sizes = {"tokens": (tokens, 1), "dim": (dim, LEAST_DIM), "vocabulary": (vocabulary, LEAST_VOCABULARY)}
    for name, (value, least) in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}; give a larger one")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}; only these texts were measured")
    if not (isinstance(kl, (int, float)) and 0 <= kl <= 1):
        raise ValueError(f"kl: expected nats per token from 0 to 1, got {kl!r}; a fine-tuned model has some 0.003")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}; pass torch.float32 or bfloat16")


@lru_cache(maxsize=1)
def statistics() -> dict:
    """Those measured (benchmarks/calibrated_fit.py): {"head": {name: Tensor}, "texts": {kind: {name: Tensor}}}."""
    return unpacked(torch.load(STATISTICS, weights_only=True))


def unpacked(content: dict) -> dict:
    """float32, from tensors and from (leading columns, int8 ones, their steps)."""
    result: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            result[name] = unpacked(value)
        elif isinstance(value, tuple):
            leading, others, step = value
            result[name] = torch.cat([leading.float(), others.float() * step], 1)
        else:
            result[name] = value.float()
    return result


class _Directions:
    """Those that rows and hidden states share, and the spectra of all others, channel by channel."""

    def __init__(self, head: dict, dim: int, g: torch.Generator, device: str | torch.device) -> None:
        measured = head["coefficients"].shape[1]
        self.count = min(measured, dim // 2)
        # Those of the model in its outlier channels; what is left of each is spread over the others.
        outliers = head["outliers"][: dim // 4, : self.count].T
        values, vectors = torch.linalg.eigh(torch.eye(self.count) - outliers @ outliers.T)
        left = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        spread = torch.linalg.qr(torch.randn(dim - outliers.shape[1], self.count, generator=g)).Q.T
        self.basis = torch.cat([outliers, left @ spread], 1)[:, torch.randperm(dim, generator=g)].to(device)
        self.channels = torch.randperm(dim, generator=g)
        self.widening = math.sqrt((dim - self.count) / (MEASURED_D - measured))
        self.generator, self.device = g, device

    def outside(self, rows: Tensor) -> Tensor:
        return rows - (rows @ self.basis.T) @ self.basis

    def shared(self, coefficients: Tensor) -> Tensor:
        return coefficients[:, : self.count].to(self.device) @ self.basis

    def others(self, count: int, scale: Tensor) -> Tensor:
        """[count, D] of length 1."""
        at = torch.linspace(0, len(scale) - 1, self.basis.shape[1])
        low = at.long().clamp(max=len(scale) - 2)
        scale = (scale[low] + (at - low) * (scale[low + 1] - scale[low]))[self.channels]
        noise = (torch.randn(count, len(scale), generator=self.generator) * scale).to(self.device)
        return torch.nn.functional.normalize(self.outside(noise), dim=1)


def draw(
    found: dict, tokens: int, dim: int, vocabulary: int, dtype: torch.dtype, seed: int, kind: str, kl: float,
    device: str | torch.device,
) -> Calibrated:  # fmt: skip
    """`calibrated`, of any statistics."""
    g = torch.Generator().manual_seed(seed)
    head, text = found["head"], found["texts"][kind]
    directions = _Directions(head, dim, g, device)
    weight = _rows(head, vocabulary, directions)
    prototypes = len(text["length"])
    drawn = torch.cat([torch.randperm(prototypes, generator=g) for _ in range(-(-tokens // prototypes))])[:tokens]
    text = {name: value if "scale" in name or not value.dim() else value[drawn] for name, value in text.items()}
    length = {name: (text[name] * directions.widening).to(device)[:, None] for name in ("length", "change_length")}
    hidden = directions.shared(text["coefficients"]) + length["length"] * directions.others(tokens, text["scale"])
    if vocabulary > MEASURED_V:
        _make_rarer(weight, hidden)
    labels = _peak(hidden, weight, text, directions)
    own = torch.nn.functional.normalize(directions.outside(hidden), dim=1)
    cos = text["cos"][:, None].to(device)
    other = cos * own + (1 - cos.square()).sqrt() * directions.others(tokens, text["change_scale"])
    change = directions.shared(text["change"]) + length["change_length"] * other
    wanted = text["kl"] * (kl / text["kl"].mean())
    change += _sharpening(hidden, weight, change, text["sharpening"].to(device), directions)
    reference = hidden - _strength(hidden, weight, change, wanted.to(device), g) * change
    return Calibrated(hidden.to(dtype), weight.to(dtype), labels, reference.to(dtype))


def _parts(total: int, size: int) -> list[slice]:
    return [slice(start, min(total, start + size)) for start in range(0, total, size)]


def _rows(head: dict, vocabulary: int, directions: _Directions) -> Tensor:
    """[V, D]; those above the measured V are drawn apart, to be made rarer."""
    sizes = [min(vocabulary, MEASURED_V), max(0, vocabulary - MEASURED_V)]
    drawn = torch.cat([_prototypes(head["count"], size, directions.generator) for size in sizes])
    weight = torch.empty(vocabulary, directions.basis.shape[1], device=directions.device)
    for at in _parts(vocabulary, 8192):
        some = drawn[at]
        other = directions.others(len(some), head["scale"]) * head["length"][some, None].to(directions.device)
        weight[at] = directions.shared(head["coefficients"][some]) + other
    return weight


def _prototypes(count: Tensor, size: int, g: torch.Generator) -> Tensor:
    """[size] which prototype: each as often as its count says, rounded so that errors do not add up."""
    ends = (count.double().cumsum(0) * (size / count.double().sum())).round().long()
    drawn = torch.repeat_interleave(torch.arange(len(count)), ends.diff(prepend=ends.new_zeros(1)))
    return drawn[torch.randperm(size, generator=g)]


def _make_rarer(weight: Tensor, hidden: Tensor) -> None:
    """Shifts added rows along the mean hidden state, in place, until their share is the law's."""
    share = (len(weight) / MEASURED_V) ** (1 - LAW) - 1
    some, mean = hidden[:64], hidden.mean(0)
    along = mean / mean.square().sum()
    old, new = ((some @ rows.T).logsumexp(1) for rows in (weight[:MEASURED_V], weight[MEASURED_V:]))
    low, high = -20.0, 20.0
    for _ in range(30):
        middle = (low + high) / 2
        found = (new + middle * (some @ along) - old).sigmoid().mean()
        low, high = (middle, high) if found < share / (1 + share) else (low, middle)
    weight[MEASURED_V:] += low * along


def _peak(hidden: Tensor, weight: Tensor, text: dict, directions: _Directions) -> Tensor:
    """Moves each token towards the ids that it finds likeliest, in place, until the likeliest has the odds and the
    others the entropy that are wanted; returns labels."""
    count = int(text["candidates"])
    count = min(max(LEAST_CANDIDATES, count * len(weight) // MEASURED_V), count, len(weight) // 2)
    size = 1 - torch.arange(2.0, 1 + count, device=hidden.device).log() / math.log(1 + count)
    labels = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
    for at in _parts(len(hidden), 64):
        odds, entropy, nll = (text[name][at, None].to(hidden.device) for name in ("odds", "rest_entropy", "nll"))
        z = hidden[at] @ weight.T
        best = z.topk(count, dim=1).indices
        first = directions.outside(weight[best[:, 0]])
        others = directions.outside(torch.stack([size @ weight[ids[1:]] for ids in best]))
        logits = z, first @ weight.T, others @ weight.T
        near, share = _representatives(z, directions.generator)
        a, b = _amounts([t.gather(1, near) for t in logits], share, odds, entropy)
        hidden[at] += a * first + b * others
        labels[at] = ((z + a * logits[1] + b * logits[2]).log_softmax(1) + nll).abs().argmin(1)
    return labels


def _amounts(logits: list[Tensor], share: Tensor, odds: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """a, b [N, 1] with which logits[0] + a logits[1] + b logits[2] have the odds and the entropy."""
    z, first, others = logits
    a = b = torch.zeros_like(odds)
    for _ in range(4):
        b = _bisected(_certainty, -entropy, z + a * first, others, share)
        a = _bisected(_odds, odds, z + b * others, first, share)
    return a, b


def _representatives(z: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids [N, n] that stand for all, the likeliest first, and the logarithm of how many each stands for [1, n]."""
    best = z.topk(min(4096, z.shape[1]), dim=1).indices
    if z.shape[1] <= 2 * 4096:
        return z.argsort(1, descending=True), z.new_zeros(1, z.shape[1])
    drawn = torch.randint(z.shape[1], (4096,), generator=g).to(z.device).expand(len(z), -1)
    left = z.gather(1, drawn) < z.gather(1, best[:, -1:])
    many = torch.full((len(z), 4096), -torch.inf, device=z.device)
    many[left] = 0
    many += math.log(z.shape[1] - 4096) - left.sum(1, keepdim=True).log()
    return torch.cat([best, drawn], 1), torch.cat([torch.zeros_like(best, dtype=z.dtype), many], 1)


def _bisected(function: Callable[..., Tensor], goal: Tensor, *parts: Tensor) -> Tensor:
    """[N, 1] the t from -3 to 3 with which the function of t and the parts, which rises with t, reaches the goal."""
    low, high = torch.full_like(goal, -3.0), torch.full_like(goal, 3.0)
    for _ in range(14):
        middle = (low + high) / 2
        above = function(middle, *parts) > goal
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def _certainty(t: Tensor, z: Tensor, step: Tensor, share: Tensor) -> Tensor:
    """[N, 1] minus the entropy among all but the first."""
    return -entropy_of((z + t * step)[:, 1:], share[:, 1:])


def _odds(t: Tensor, z: Tensor, step: Tensor, share: Tensor) -> Tensor:
    """[N, 1] log-odds of the first."""
    z = z + t * step + share
    return z[:, :1] - z[:, 1:].logsumexp(1, keepdim=True)


def entropy_of(z: Tensor, many: Tensor | None = None) -> Tensor:
    """[N, 1] of logits [N, V], each that of exp(many) ids."""
    log_p = (z if many is None else z + many).log_softmax(1)
    p = log_p.exp()
    return -(p * (log_p if many is None else (log_p - many).masked_fill(many == -torch.inf, 0))).sum(1, keepdim=True)


def _sharpening(hidden: Tensor, weight: Tensor, change: Tensor, wanted: Tensor, directions: _Directions) -> Tensor:
    """[N, D] to add to `change` so that its logits have the share `wanted` [N], signed as the likeliest id's odds
    change: a multiple of that id's row, outside Q."""
    found = torch.empty_like(change)
    for at in _parts(len(hidden), 64):
        z = hidden[at] @ weight.T
        near, share = _representatives(z, directions.generator)
        p = (z.gather(1, near) + share).softmax(1)
        step = directions.outside(weight[near[:, 0]])
        moved = torch.stack([(rows @ weight.T).gather(1, near) for rows in (change[at], step)], 1)
        largest, (a, b), ((v_aa, v_ab), (_, v_bb)) = (t.movedim(0, -1) for t in likeliest_beside_others(p, moved))
        k = wanted[at].abs().clamp(max=0.99)
        k = torch.minimum(k / ((1 - k) * largest), 0.9 * b.square() / v_bb.clamp(min=1e-12))
        # (a + c b)² = k (v_aa + 2 c v_ab + c² v_bb), on the side of the wanted sign
        square, linear, rest = b.square() - k * v_bb, a * b - k * v_ab, a.square() - k * v_aa
        root = (linear.square() - square * rest).clamp(min=0).sqrt()
        found[at] = ((root * wanted[at].sign() * b.sign() - linear) / square)[:, None] * step
    return found


def likeliest_beside_others(p: Tensor, moved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By probabilities p [N, n], the likeliest id first, and changes of logits moved [N, m, n]: the largest
    probability p_1 [N]; how far its logit moves beside the others' mean, o [N, m]; and the covariance of the others'
    logits, V [N, m, m].

    The likeliest id's share of what a change does is p_1 o² / (p_1 o² + V), to second order that of the KL.
    """
    others = p[:, 1:] / p[:, 1:].sum(1, keepdim=True)
    mean = (moved[:, :, 1:] @ others[:, :, None])[:, :, 0]
    rest = moved[:, :, 1:] - mean[:, :, None]
    return p[:, 0], moved[:, :, 0] - mean, (rest * others[:, None]) @ rest.transpose(1, 2)


def _strength(hidden: Tensor, weight: Tensor, change: Tensor, wanted: Tensor, g: torch.Generator) -> Tensor:
    """[N, 1] so many times `change`, subtracted, give the KL wanted."""
    found = []
    for at in _parts(len(hidden), 64):
        z, along, goal = hidden[at] @ weight.T, change[at] @ weight.T, wanted[at, None]
        near, share = _representatives(z, g)
        some, step = z.gather(1, near) + share, along.gather(1, near)
        step *= 18 * goal.sqrt()
        times = 2 ** _bisected(_kl_of, goal, some, step)
        size = 18 * goal.sqrt() * times
        # What a sample of the ids leaves; the KL is near quadratic in the size.
        found.append(size * (goal / _kl(z, size * along).clamp(min=1e-12)).sqrt().clamp(0.7, 1.4))
    return torch.cat(found)


def _kl_of(t: Tensor, z: Tensor, step: Tensor) -> Tensor:
    return _kl(z, 2**t * step)


def _kl(z: Tensor, change: Tensor) -> Tensor:
    """[N, 1] KL(softmax(z − change) ‖ softmax(z)); −inf in z stands for no id."""
    log_p, log_r = z.log_softmax(1), (z - change).log_softmax(1)
    return (log_r.exp() * (log_r - log_p).nan_to_num(0.0)).sum(1, keepdim=True)
