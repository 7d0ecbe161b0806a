"""docs/objectives.md and docs/objectives.png: every objective, from its docstring, and what it does to a token's
gradient.

    python benchmarks/objectives.py

Takes seconds. The gradients are the package's own (backend "reference", float64): −∂loss/∂z at the label, against the
label's probability p, where 31 other tokens share the rest. Plain cross-entropy has 1 − p.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_losses as fl
from fused_losses import objectives

ROOT = Path(__file__).parents[1]
VOCABULARY, POINTS = 32, 161
P = torch.linspace(0.004, 0.996, POINTS, dtype=torch.float64)
INITIAL = 0.2  # p of the label under the model that training began with, where a loss needs one

Curve = tuple[str, Any, dict[str, Any]]  # what varies, the objective, further arguments of its call


def logits(p: Tensor, shape: float = 1.5) -> Tensor:
    """[points, V] where token 0 has probability p, and the others share the rest as 1/rank^shape."""
    others = torch.arange(1, VOCABULARY, dtype=torch.float64) ** -shape
    return torch.cat([p[:, None], (1 - p)[:, None] * (others / others.sum())], 1).log()


def of_reference(r: float) -> dict[str, Any]:
    """The reference gives the label r."""
    return {"reference": fl.Reference(logits(torch.full_like(P, r), 1.0))}


def per_token(value: float) -> Tensor:
    return torch.full_like(P, value)


def teacher(r: float, k: int = 4) -> dict[str, Any]:
    log_q = logits(torch.full_like(P, r), 1.0)
    top = log_q.topk(k, 1)
    return {"teacher_ids": top.indices, "teacher_logprobs": top.values}


REFERENCES = (0.1, 0.5, 0.9)
EXACT = {"backend": "reference"}


def with_references(make: Callable[[], Any]) -> list[Curve]:
    return [(f"r = {r}", make(), of_reference(r)) for r in REFERENCES]


CURVES: dict[str, Callable[[], list[Curve]]] = {
    "CrossEntropyLoss": lambda: [
        ("plain", fl.CrossEntropyLoss(**EXACT), {}),
        ("label_smoothing=0.1", fl.CrossEntropyLoss(label_smoothing=0.1, **EXACT), {}),
    ],
    "WeightedLoss": lambda: [(f"w = {w}", fl.WeightedLoss(**EXACT), {"weights": per_token(w)}) for w in (0.5, 1.5)],
    "TALRLoss": lambda: [(f"τ = {t}", fl.TALRLoss(temperature=t, **EXACT), {}) for t in (0.5, 1.0, 2.0)],
    "DFTLoss": lambda: [("", fl.DFTLoss(**EXACT), {})],
    "ASFTLoss": lambda: with_references(lambda: fl.ASFTLoss(kl_weight=0.5, **EXACT)),
    "EAFTLoss": lambda: [(f"α = {a}", fl.EAFTLoss(alpha=a, **EXACT), {}) for a in (0.5, 1.0, 2.0)],
    "PSFTLoss": lambda: [(f"p_old = {r}", fl.PSFTLoss(**EXACT), {"old_nll": -per_token(r).log()}) for r in REFERENCES],
    "FLOWLoss": lambda: [
        (f"initial {x}", fl.FLOWLoss(temperature=1.0, **EXACT),
         {"initial_nll": torch.tensor([x]).double(), "sequence_ids": torch.zeros(POINTS, dtype=torch.int64)})
        for x in (0.5, 1.0, 2.0)
    ],
    "LAwFLoss": lambda: [
        (f"c = {c}, r = {r}", fl.LAwFLoss(**EXACT), {"confidence": per_token(c), **of_reference(r)})
        for c, r in ((1.0, 0.5), (0.8, 0.1), (0.0, 0.1), (0.0, 0.9))
    ],
    "STMLoss": lambda: with_references(lambda: fl.STMLoss(threshold=5.0, **EXACT)),
    "InfoSFTLoss": lambda: [("", fl.InfoSFTLoss(**EXACT), {})],
    "MaskTheTargetLoss": lambda: with_references(lambda: fl.MaskTheTargetLoss(kl_weight=1.0, **EXACT)),
    "EKSFTLoss": lambda: with_references(lambda: fl.EKSFTLoss(reduction="token_mean", **EXACT)),
    "SFTKLLoss": lambda: with_references(lambda: fl.SFTKLLoss(kl_weight=1.0, **EXACT)),
    "JSDLoss": lambda: [
        (f"β = {b}, r = 0.5", fl.JSDLoss(beta=b, **EXACT), of_reference(0.5)) for b in (0.0, 0.5, 0.9)
    ],
    "ReverseKLLoss": lambda: with_references(lambda: fl.ReverseKLLoss(**EXACT)),
    "TopKDistillationLoss": lambda: [
        (f"{rest}, r = {r}", fl.TopKDistillationLoss(rest=rest, **EXACT), teacher(r))
        for rest, r in (("none", 0.5), ("bucket", 0.5), ("bucket", 0.9))
    ],
}  # fmt: skip


def names() -> list[str]:
    """Of all objectives, in the order of the page."""
    there = [n for n in objectives.__all__ if n.endswith("Loss")]
    missing = set(there) - set(CURVES)
    assert not missing, f"{missing}: give each a curve in {__file__}"
    return [name for name in CURVES if name in there]


def pull(objective: Any, call: dict[str, Any]) -> Tensor:
    """−∂loss/∂z at the label, for each p."""
    z = logits(P).requires_grad_()
    labels = torch.zeros(POINTS, dtype=torch.int64)
    loss = objective(z, torch.eye(VOCABULARY, dtype=torch.float64), labels, num_items=1, **call)
    return -torch.autograd.grad(loss, z)[0][:, 0]


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown, columns = names(), 4
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(14, 2.9 * rows), sharex=True, sharey=True, layout="constrained")
    for axis, name in zip(axes.flat, shown, strict=False):
        axis.plot(P, 1 - P, color="0.7", linestyle="--", linewidth=1.2)
        for label, objective, call in CURVES[name]():
            axis.plot(P, pull(objective, call), linewidth=1.6, label=label or None)
        axis.axhline(0, color="0.8", linewidth=0.8)
        axis.set_title(name, fontsize=11)
        axis.set_ylim(-1.05, 1.6)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7.5, frameon=False, loc="upper right")
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_visible(False)
    figure.supxlabel("p, the model's probability of the label")
    figure.supylabel("pull on the label's logit, −∂loss/∂z")
    beside = path.with_suffix(".new.png")
    figure.savefig(beside, dpi=110)
    plt.close(figure)
    beside.replace(path)


WHICH = (
    ("train as everyone does, without logits in memory", "`CrossEntropyLoss`",
     "label smoothing, z-loss and class weights are options"),
    ("learn a domain and keep the rest",
     "`CrossEntropyLoss` at a small learning rate; then `SFTKLLoss`, or `LAwFLoss` with a target probability",
     "in [the study](forgetting.md) a small rate has most of the gain and loses next to nothing; a KL gains and loses "
     "a little less"),
    ("correct single tokens of the model's own answers", "`LAwFLoss`",
     "cross-entropy on the corrections, KL to the original elsewhere"),
    ("keep close to the original while training on full answers",
     "`SFTKLLoss`, `MaskTheTargetLoss`, `ASFTLoss`, `EKSFTLoss`",
     "a KL to the original, of all tokens, of all but the label, or of some tokens"),
    ("leave out noisy answers, which would tear the model apart",
     "`TALRLoss`, `EAFTLoss`, `STMLoss`, `InfoSFTLoss`, `DFTLoss`",
     "weights from the label's probability or the entropy; in [the study](forgetting.md) all learned a domain less, "
     "and DFT and STM unlearned it"),
    ("teach facts that the model cannot know", "`CrossEntropyLoss`, perhaps with `huggingface.FinchCallback`",
     "down-weighting suppresses exactly what is new"),
    ("weight messages, samples or rewards yourself", "`WeightedLoss`", "the weight is a column of the data set"),
    ("count easy sequences most", "`FLOWLoss`", "weights from the initial model, fixed before training"),
    ("distil from a teacher in memory", "`JSDLoss`, `ReverseKLLoss`", "the whole vocabulary, at a temperature"),
    ("distil from a data set of top-k log-probabilities, a server or an API", "`TopKDistillationLoss`",
     "k ids a token are enough"),
    ("make no step beyond a ratio of the old policy", "`PSFTLoss`", "clips as PPO does"),
    ("train DPO, KTO, ORPO or SimPO in a loop of your own", "`sequence_logps`", "Σ log p of each sequence"),
    ("take something that a paper of last week has", "`Objective`", "five lines: a `token_loss` of your own"),
)  # fmt: skip
FORMULAS = (
    ("`CrossEntropyLoss`", "Σ nll / n; options label_smoothing, z_loss, class_weights", "", "3 (2)", ""),
    ("`WeightedLoss`", "Σ w·nll / n", "`weights`", "3 (2)", ""),
    ("`TALRLoss`",
     "Σ max(exp(−nll/τ), 0.01)·nll / n, τ: the median over sequences of their mean nll, at least 10⁻⁶, or a number",
     "`sequence_ids` where packed",
     "4 (2); fixed τ 3 (2)",
     "[2509.20758](https://arxiv.org/abs/2509.20758)"),
    ("`LAwFLoss`",
     "(α Σ over c > 0 + β Σ over c = 0) of KL(q ‖ p) / n, q = c·onehot + (1−c)·p_ref; α = β = 1. With "
     "`reduction=\"group_mean\"` each sum is divided by its own count; with `target_probability=` the "
     "confidence only marks anchors",
     "`confidence`, `reference`",
     "4 (3)",
     "[longern/LAwF](https://github.com/longern/LAwF)"),
    ("`FLOWLoss`",
     "Σ exp(−mean initial nll of its sequence/τ)·nll / n",
     "`initial_nll`, τ",
     "3 (2)",
     "[2502.02797](https://arxiv.org/abs/2502.02797)"),
    ("`DFTLoss`", "Σ p·nll / n", "", "3 (2)", "[2508.05629](https://arxiv.org/abs/2508.05629)"),
    ("`ASFTLoss`",
     "Σ (p·nll + λ·KL(p_ref ‖ p)) / n, λ = 0.1",
     "`reference`",
     "4 (3)",
     "[2509.23753](https://arxiv.org/abs/2509.23753)"),
    ("`EAFTLoss`",
     "Σ (H₂₀/ln 20)^α·nll / n, H₂₀ entropy of the top 20, α = 1",
     "",
     "3 (2)",
     "[2601.02151](https://arxiv.org/abs/2601.02151)"),
    ("`PSFTLoss`",
     "−Σ min(ρ, clip(ρ, 1−ε, 1+ε)) / n, ρ = p/p_old, ε = 0.2",
     "`old_nll`",
     "3 (2)",
     "[2508.17784](https://arxiv.org/abs/2508.17784)"),
    ("`STMLoss`",
     "Σ nll / n over tokens whose perplexity under the start model is below a threshold",
     "`reference` or its nll",
     "4 (3)",
     "[2501.14315](https://arxiv.org/abs/2501.14315)"),
    ("`InfoSFTLoss`",
     "Σ p·relu(1 − logit(p)/logit(P))·nll / n",
     "",
     "3 (2)",
     "[2605.14967](https://arxiv.org/abs/2605.14967)"),
    ("`MaskTheTargetLoss`",
     "Σ (nll + λ·KL without the label, both renormalised) / n",
     "`reference`",
     "4 (3)",
     "[2605.29498](https://arxiv.org/abs/2605.29498)"),
    ("`EKSFTLoss`",
     "mean nll off the tokens of top entropy H or top KL(p ‖ p_ref); on these −λ₁·H / ln V, and λ₂·KL",
     "`reference`",
     "6 (6)",
     "[2605.29303](https://arxiv.org/abs/2605.29303)"),
    ("`SFTKLLoss`", "Σ (nll + λ·KL(p_ref ‖ p)) / n", "`reference`", "4 (3)", ""),
    ("`JSDLoss`",
     "Σ (β·KL(p_ref ‖ m) + (1−β)·KL(p ‖ m)) / n, m = β·p_ref + (1−β)·p, at a temperature; β = 0, 1: "
     "forward, reverse KL",
     "`reference`",
     "4 (3)",
     "[2306.13649](https://arxiv.org/abs/2306.13649)"),
    ("`ReverseKLLoss`", "Σ KL(p ‖ p_ref) / n, at a temperature", "`reference`", "4 (3)", ""),
    ("`TopKDistillationLoss`",
     "forward, reverse or JSD on the k tokens that a teacher names, with or without a class for the rest",
     "`teacher_ids`, `teacher_logprobs`",
     "3 (2)",
     ""),
    ("`l2_to_initial`, `wise_ft`",
     "‖θ − θ₀‖²; (1−α)θ₀ + αθ",
     "the initial weights",
     "–",
     "[2109.01903](https://arxiv.org/abs/2109.01903)"),
)  # fmt: skip
INTRO = """# Objectives: which loss when

Written by `python benchmarks/objectives.py` from the docstrings.

| you want to | take | because |
|---|---|---|
{rows}

![The pull of each loss on the label's logit](objectives.png)

The pull of each loss on the label's logit against the probability p of the label; dashed: cross-entropy, 1 − p. r is
the reference's (or the teacher's) probability of the label. Above 0 a step makes the label likelier, below 0 less
likely. 32 tokens in all, the rest shared as 1/rank^1.5, that of the reference as 1/rank. EKSFT chooses its tokens among
those of the panel.

## All of them in one table

p is the model's probability of the label, r the reference's, p_ref its distribution; weights carry no gradient; n is
the number of tokens with a label, or `num_items`.

| objective | loss | needs | GEMMs¹ | source |
|---|---|---|---|---|
{formulas}

¹ forward + backward in exact mode, products of 2·N·D·V FLOP; in brackets with a frozen head. In sparse mode 1, with a
reference 2, and two sparse products. `fused_losses/reference.py` has every formula in a few lines.
"""


def paragraphs(name: str) -> list[str]:
    return re.split(r"\n\s*\n", inspect.getdoc(getattr(fl, name)))


def section(name: str) -> str:
    """What the docstring says of formula, use and source; arguments and shapes are in the code."""
    head, *rest = paragraphs(name)
    kept = [head, *(part for part in rest if not re.match(r"(Args|Returns|Raises)\b", part))]
    text = []
    for part in kept:
        lines = part.splitlines()
        if lines[0].startswith("    ") or lines[0].rstrip().endswith("::") or any(x.startswith("    ") for x in lines):
            lead = [line for line in lines if not line.startswith("    ")]
            code = [line[4:] for line in lines if line.startswith("    ")]
            text.append(" ".join(lead).replace("::", ":"))
            if code:
                text.append("```\n" + "\n".join(code) + "\n```")
        else:
            text.append(" ".join(lines))
    body = "\n\n".join(part for part in text if part)
    file = Path(inspect.getsourcefile(getattr(fl, name))).relative_to(ROOT)
    return f"## {name}\n\n{body}\n\nCode: [`{file}`](../{file})\n"


def page() -> str:
    rows, formulas = ("\n".join(f"| {' | '.join(cells)} |" for cells in table) for table in (WHICH, FORMULAS))
    return INTRO.format(rows=rows, formulas=formulas) + "\n" + "\n".join(section(name) for name in names())


def main() -> None:
    draw(ROOT / "docs" / "objectives.png")
    target = ROOT / "docs" / "objectives.md"
    beside = target.with_suffix(".new")
    beside.write_text(page())
    beside.replace(target)
    print(f"{target}: {len(names())} objectives")


if __name__ == "__main__":
    main()
