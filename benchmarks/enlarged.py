"""How wrong sparse gradients are with a larger vocabulary: real hidden states, and a real head with rows added.

    python benchmarks/enlarged.py validate   # a part of the real head, enlarged to its size, beside all of it
    python benchmarks/enlarged.py larger     # all of the real head, enlarged to V = 128,256 and 262,144
    python benchmarks/enlarged.py mend       # the latter with finer thresholds
    python benchmarks/enlarged.py tables     # fills those of docs/method.md from results/enlarged.json

The rule. Rows that are no label's are templates, P of them. A new row is a blend of two random ones less the mean row,
w = c + ALIKE (w_i − c) + √(1 − ALIKE²) (w_j − c), so it has the spectrum of real rows and rivals like real ones.
All new rows have one number added to their logit along the mean hidden state, which gives them their share: of what
the templates have, by a law of rank and frequency, ((P + new) / P)^(1 − s) − 1, s = `exponent`.
s = 0: each added row is as frequent as a template. s = LAW: added rows are rarer, as further ids of a real head are.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Callable
from unittest import mock

import enlarged_tables
import torch
import torch.nn.functional as F
from sparse_accuracy import plain_bf16, weights_of
from sparse_states import RESULTS, load_states, save
from torch import Tensor
from tqdm import tqdm

import fused_losses as fl
from fused_losses.sparse import certificate

# Chosen on documentation: of 0.6, 0.8 and 0.98; the mass of 12,288, 24,576 and all ids that are no label's.
ALIKE, LAW = 0.8, 0.8
SIZES = (128256, 262144)
TEXTS = ("documentation", "generated", "code", "clinical")
FACTORS = (0.7, 0.5, 0.43)  # of θ; the last is √(49,152 / 262,144)


def enlarge(
    weight: Tensor, hidden: Tensor, labels: Tensor, vocabulary: int, *, exponent: float = LAW, seed: int = 0
) -> Tensor:
    """[vocabulary, D]: `weight`, then new rows by the rule above."""
    if vocabulary <= len(weight):
        raise ValueError(f"vocabulary: expected more than the {len(weight)} rows of weight, got {vocabulary}")
    g = torch.Generator().manual_seed(seed)
    free = torch.ones(len(weight), dtype=torch.bool)
    free[labels] = False
    templates, new = free.nonzero()[:, 0], vocabulary - len(weight)
    one, other = (templates[torch.randint(len(templates), (new,), generator=g)] for _ in range(2))
    made = ALIKE * weight[one] + math.sqrt(1 - ALIKE**2) * weight[other]
    made += (1 - ALIKE - math.sqrt(1 - ALIKE**2)) * weight.mean(0)
    share = ((len(templates) + new) / len(templates)) ** (1 - exponent) - 1
    some, mean = hidden[:: max(1, len(hidden) // 64)], hidden.mean(0)
    old, theirs, found = ((some @ rows.T).logsumexp(1) for rows in (weight, weight[templates], made))
    wanted = (theirs + math.log(share) - old).sigmoid().mean()
    slope = some @ mean / mean.square().sum()
    low, high = -20.0, 20.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if (found + middle * slope - old).sigmoid().mean() < wanted else (low, middle)
    return torch.cat([weight, made.add_(mean / mean.square().sum(), alpha=low)])


def subset(weight: Tensor, labels: Tensor, part: float, first: bool = False) -> tuple[Tensor, Tensor]:
    """So much of the head, by chance or the first ids, with the labels' rows; and the labels' ids in it."""
    keep = torch.rand(len(weight), generator=torch.Generator().manual_seed(1)) < part
    if first:
        keep = torch.arange(len(weight)) < part * len(weight)
    keep[labels] = True
    return weight[keep], (keep.cumsum(0) - 1)[labels]


def spaced(states: dict, kind: str, tokens: int) -> tuple[Tensor | None, ...]:
    """So many tokens of the whole text: hidden states, labels; of the adapted model and of the original, for a KL."""
    parts = [*states["texts"][kind], *states["adapted"].get(kind, (None, None))[:2]]
    return tuple(None if t is None else t[:: max(1, len(t) // tokens)][:tokens] for t in parts)


class Case:
    """One head and hidden states: the truth for a loss, and what comes near it. Without a reference cross-entropy and
    TALR, with one a KL."""

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, reference: Tensor | None = None) -> None:
        self.hidden, self.weight, self.labels, self.reference = hidden, weight, labels, reference
        z = hidden @ weight.T
        self.nll = z.double().logsumexp(1) - z.gather(1, labels[:, None])[:, 0]
        self.losses = ("cross-entropy", "TALR") if reference is None else ("KL",)
        p = z.sub_(z.logsumexp(1, keepdim=True)).exp_()
        if reference is None:
            self.dz = p.scatter_add_(1, labels[:, None], -torch.ones(len(p), 1))
        else:  # p_ref / p − 1 from differences of logits, which float32 has with all its digits
            ratio = ((reference - hidden) @ weight.T).expm1_()
            mean = (p * ratio).sum(1, keepdim=True)
            self.dz = p.mul_(ratio.sub_(mean).div_(1 + mean)).neg_()

    def upstream(self, loss: str) -> tuple[Tensor, Tensor | None]:
        return weights_of(loss, self.nll.float())

    def truth(self, loss: str) -> tuple[Tensor, Tensor]:
        """dx and dW in float32, off by some 10⁻⁶ of themselves."""
        dz = self.dz if loss == "KL" else self.upstream(loss)[0][:, None] * self.dz
        return dz @ self.weight, dz.T @ self.hidden

    def ours(self, loss: str, truth: tuple[Tensor, Tensor], scan: str) -> dict:
        a, b = self.upstream(loss)
        x, w = self.hidden.clone().requires_grad_(), self.weight.detach().requires_grad_()
        reference = None if b is None else fl.Reference(self.reference)
        out = fl.token_losses(x, w, self.labels, reference=reference, gradient="sparse", scan=scan)
        (out.nll * a if b is None else out.kl).sum().backward()
        report = out.gradient_report
        return {
            "errors": errors((x.grad, w.grad), truth), "certified": [report.hidden_bound, report.weight_bound],
            "entries": report.entries / report.tokens, "exact_tokens": report.exact_tokens,
            "nll": off(out.nll.detach(), self.nll), "kl": None if b is None else out.kl.mean().item(),
            "note": report.scan_note,
        }  # fmt: skip

    def plain(self, loss: str, truth: tuple[Tensor, Tensor]) -> dict:
        """Plain PyTorch's in bf16, of inputs that bf16 has."""
        reference = None if self.reference is None else self.reference.bfloat16()
        x, w = self.hidden.bfloat16(), self.weight.bfloat16()
        nll = torch.cat([
            F.cross_entropy((part @ w.T).float(), y, reduction="none")
            for part, y in zip(x.split(64), self.labels.split(64), strict=True)
        ])  # fmt: skip
        found = plain_bf16(x, w, self.labels, *self.upstream(loss), reference)
        return {"errors": errors(found, truth), "nll": off(nll, self.nll)}


def off(nll: Tensor, truth: Tensor) -> list[float]:
    error = (nll.double() - truth).abs()
    return [error.mean().item(), error.max().item()]


def errors(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> list[float]:
    def norm(t: Tensor) -> Tensor:
        return torch.stack([part.double().norm() for part in t.split(8192)]).norm()

    return [(norm(one.float() - exact) / norm(exact)).item() for one, exact in zip(found, truth, strict=True)]


@torch.no_grad()
def statistics(hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, float]:
    """Means over tokens: entropy, and of the softmax the mass below the threshold of sparse gradients."""
    entropy, tail = [], []
    for x, y in zip(hidden.split(32), labels.split(32), strict=True):
        log_p = (x @ weight.T).log_softmax(1)
        p, wrong = log_p.exp(), -torch.expm1(log_p.gather(1, y[:, None]))
        entropy.append(-(p * log_p).sum(1))
        kept = (p > certificate.THRESHOLD * wrong.sqrt()).scatter(1, y[:, None], True)
        tail.append(p.masked_fill(kept, 0).sum(1))
    return {"entropy": torch.cat(entropy).mean().item(), "tail": torch.cat(tail).mean().item()}


def measured(hidden, weight, labels, adapted, original, plain: bool, factors: tuple[float, ...] = (1.0,)) -> dict:
    """Of each loss, with full and 8-bit products, and at so many times θ."""
    result: dict = {"N": len(labels), "V": len(weight), "statistics": statistics(hidden, weight, labels), "losses": {}}
    for case in (Case(hidden, weight, labels), *([] if adapted is None else [Case(adapted, weight, labels, original)])):
        for loss in case.losses:
            truth, row = case.truth(loss), {}
            for factor in factors:
                # The same θ for every vocabulary, as it was when these figures asked for another.
                constant = mock.patch.multiple(
                    certificate, THRESHOLD=factor * certificate.THRESHOLD, CHOSEN_ON=2**60
                )  # fmt: skip
                with constant:
                    for scan in ("full", "int8"):
                        row[scan if factor == 1 else f"{scan} {factor}"] = case.ours(loss, truth, scan)
            result["losses"][loss] = row | ({"plain": case.plain(loss, truth)} if plain else {})
            gc.collect()
    return result


def run(step: str, cases: dict[str, Callable[[], dict]]) -> None:
    """Cases that results/enlarged.json does not have yet; kept one by one."""
    content = stored()
    if content.get("rule", [ALIKE, LAW]) != [ALIKE, LAW]:
        raise SystemExit("results/enlarged.json is of another rule; move it away first")
    for name in tqdm([name for name in cases if name not in content.get(step, {})], desc=step):
        content.setdefault(step, {})[name] = cases[name]()
        save("enlarged", content | {"rule": [ALIKE, LAW]})


def stored() -> dict:
    path = RESULTS / "enlarged.json"
    return json.loads(path.read_text()) if path.is_file() else {}


# So much of the real head, whether the first ids, and the exponent by which it is enlarged again.
PARTS = {
    "a random quarter": (0.25, False, 0.0),
    "a random half": (0.5, False, 0.0),
    "the first quarter": (0.25, True, LAW),
}


def validate(states: dict, tokens: int) -> None:
    def one(kind: str, part: str | None) -> dict:
        hidden, labels, adapted, original = spaced(states, kind, tokens)
        weight = states["weight"]
        if part is not None:
            share, first, exponent = PARTS[part]
            few, labels = subset(weight, labels, share, first)
            weight = enlarge(few, hidden, labels, len(weight), exponent=exponent)
        return measured(hidden, weight, labels, adapted, original, plain=False)

    pairs = [(kind, part) for part in (None, *PARTS) for kind in TEXTS]
    run("validate", {f"{kind}, {part or 'real'}": (lambda c=(kind, part): one(*c)) for kind, part in pairs})


def large(states: dict, kind: str, vocabulary: int, exponent: float, tokens: int, **options) -> dict:
    parts = spaced(states, kind, tokens)
    hidden, labels, adapted, original = (t if t.dtype == torch.long else t.bfloat16().float() for t in parts)
    weight = states["weight"]
    if vocabulary > len(weight):
        weight = enlarge(weight, hidden, labels, vocabulary, exponent=exponent).bfloat16().float()
    return measured(hidden, weight, labels, adapted, original, **options)


def larger(states: dict, tokens: int) -> None:
    plan = [("documentation", v, LAW) for v in (len(states["weight"]), *SIZES)]
    plan += [("documentation", SIZES[1], 0.0), *(("generated", v, LAW) for v in (len(states["weight"]), *SIZES))]
    run("larger", {f"{k}, {v}, {s:g}": (lambda c=(k, v, s): large(states, *c, tokens, plain=True)) for k, v, s in plan})


def mend(states: dict, tokens: int) -> None:
    def one() -> dict:
        return large(states, "documentation", SIZES[1], LAW, tokens, plain=False, factors=FACTORS)

    run("mend", {f"documentation, {SIZES[1]}, {LAW:g}": one})


STEPS = {"validate": validate, "larger": larger, "mend": mend}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=(*STEPS, "tables"))
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    for step in options.steps:
        if step == "tables":
            enlarged_tables.fill(stored())
        else:
            STEPS[step](load_states(), options.tokens)


if __name__ == "__main__":
    main()
