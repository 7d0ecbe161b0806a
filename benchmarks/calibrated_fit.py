"""The statistics of fused_losses/bench/calibrated.py, from a real head and its hidden states (sparse_states.py).

    python benchmarks/calibrated_fit.py    # writes fused_losses/bench/calibrated.pt

Which directions and prototypes are taken, and why, is in the docstring of that module. Prototypes of rows: drawn with a
probability that grows with an id's largest probability on any token, p^0.35 (p at least 1e-5), without replacement;
each stands for the inverse of the probability with which it was drawn.
"""

from __future__ import annotations

import torch
from sparse_states import load_states
from torch import Tensor

from fused_losses.bench import calibrated

OF_HEAD, OF_HIDDEN, OF_CHANGE = 10, 24, 28
ROWS, TOKENS, CHANNELS = 2200, 384, 32
# K of the formulas: of 60 to 400 ids, the number with which the mass of unlikely ids comes nearest.
CANDIDATES = {"generated": 350, "documentation": 60}
POWER, LEAST = 0.35, 1e-5
EXACT = 4  # columns kept in float16, as hidden states are large there: 8 bits would put logits off
LIMIT = 300 * 1024


def fit() -> dict:
    states = load_states()
    weight = states["weight"]
    at = {kind: torch.linspace(0, len(states["texts"][kind][1]) - 1, TOKENS).long() for kind in calibrated.KINDS}
    tokens = {kind: [t[at[kind]] for t in (*states["texts"][kind], *states["adapted"][kind][:2])] for kind in at}
    basis = directions(weight, [(x, tuned - original) for x, _, tuned, original in tokens.values()])
    rest = outside(weight, basis)
    values, vectors = (t.flip(-1)[..., : -basis.shape[1]] for t in torch.linalg.eigh(rest.T @ rest / len(rest)))
    chosen, count = prototypes(torch.stack([likeliest(weight, states["texts"][kind][0]) for kind in at]).amax(0))
    head = {
        "coefficients": packed(weight[chosen] @ basis), "length": rest[chosen].norm(dim=1).half(),
        "count": count.half(), "scale": values.clamp(min=0).sqrt().half(),
        "outliers": basis[outliers([weight, *(x for x, *_ in tokens.values())])].half(),
    }  # fmt: skip
    texts = {kind: text(weight, basis, vectors, *tokens[kind]) for kind in at}
    for kind, count in CANDIDATES.items():
        texts[kind]["candidates"] = torch.tensor(count)
    return {"head": head, "texts": texts}


def directions(weight: Tensor, texts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """[D, r] orthonormal: of the mean row, the mean hidden states, the head, the hidden states, their changes."""
    mean = weight.mean(0)
    basis = orthonormal(torch.stack([mean, *(x.mean(0) for x, _ in texts)], 1))
    basis = orthonormal(torch.cat([basis, leading(weight - mean, OF_HEAD)], 1))
    hidden = torch.cat([(x - x.mean(0)) / (x - x.mean(0)).norm() for x, _ in texts])
    change = torch.cat([d / d.norm() for _, d in texts])
    for rows, count in ((hidden, OF_HIDDEN), (change, OF_CHANGE)):
        basis = orthonormal(torch.cat([basis, leading(outside(rows, basis), count)], 1))
    return basis


def outliers(parts: list[Tensor]) -> Tensor:
    """The channels that are largest beside the median one, in any of the parts."""
    sizes = torch.stack([rows.square().mean(0).sqrt() / rows.square().mean(0).sqrt().median() for rows in parts])
    return sizes.amax(0).topk(CHANNELS).indices


def leading(rows: Tensor, count: int) -> Tensor:
    return torch.linalg.eigh(rows.T @ rows)[1].flip(1)[:, :count]


def orthonormal(columns: Tensor) -> Tensor:
    q, r = torch.linalg.qr(columns)
    return q * r.diagonal().sign()


def outside(rows: Tensor, basis: Tensor) -> Tensor:
    return rows - (rows @ basis) @ basis.T


def likeliest(weight: Tensor, hidden: Tensor) -> Tensor:
    """[V] the largest probability of each id on any token."""
    return torch.stack([(part @ weight.T).softmax(1).amax(0) for part in hidden.split(128)]).amax(0)


def prototypes(largest: Tensor) -> tuple[Tensor, Tensor]:
    """Ids, the likeliest first, and how many each stands for: systematic sampling in random order."""
    g = torch.Generator().manual_seed(0)
    score = largest.clamp(min=LEAST).double() ** POWER
    low, high = 0.0, ROWS * 1e6
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * score).clamp(max=1).sum() < ROWS else (low, middle)
    chance = (low * score).clamp(max=1)
    order = torch.randperm(len(score), generator=g)
    ends = chance[order].cumsum(0) + torch.rand(1, generator=g)
    chosen = order[ends.floor() != (ends - chance[order]).floor()]
    chosen = chosen[largest[chosen].argsort(descending=True)]
    return chosen, 1 / chance[chosen]


def text(weight: Tensor, basis: Tensor, vectors: Tensor, x: Tensor, labels: Tensor, tuned, original) -> dict:
    change = tuned - original
    rest, rest_of_change = outside(x, basis), outside(change, basis)
    log_p, log_tuned, log_original = ((t @ weight.T).log_softmax(1) for t in (x, tuned, original))
    best, first = log_p.max(1)
    others = log_p.scatter(1, first[:, None], -1e4)
    p, order = log_tuned.exp().sort(1, descending=True)
    moved = (change @ weight.T).gather(1, order)[:, None]
    largest, odds, variance = (t.reshape(len(x)) for t in calibrated.likeliest_beside_others(p, moved))
    share = largest * odds.square() / (largest * odds.square() + variance).clamp(min=1e-12)
    values = {
        "length": rest.norm(dim=1), "change_length": rest_of_change.norm(dim=1),
        "cos": torch.cosine_similarity(rest, rest_of_change),
        "odds": best - others.logsumexp(1), "rest_entropy": calibrated.entropy_of(others)[:, 0],
        "nll": -log_p.gather(1, labels[:, None])[:, 0],
        "kl": (log_original.exp() * (log_original - log_tuned)).sum(1).clamp(min=1e-6),
        "sharpening": odds.sign() * share,
        "scale": (rest @ vectors).square().mean(0).sqrt(),
        "change_scale": (rest_of_change @ vectors).square().mean(0).sqrt(),
    }  # fmt: skip
    result: dict = {name: value.half() for name, value in values.items()}
    return result | {"coefficients": packed(x @ basis), "change": packed(change @ basis)}


def packed(columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    others = columns[:, EXACT:]
    step = others.abs().amax(0) / 127
    return columns[:, :EXACT].half(), (others / step).round().to(torch.int8), step


def main() -> None:
    torch.save(fit(), calibrated.STATISTICS)
    if calibrated.STATISTICS.stat().st_size > LIMIT:
        raise SystemExit(f"{calibrated.STATISTICS} has more than {LIMIT} bytes; take fewer prototypes")


if __name__ == "__main__":
    main()
