"""The numbers of a report, each from the answers, anchors and texts that it is of, and the limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .intervals import Estimate, mean, share
from .report import LEVELS, AnchorResult, Answer, Metric, TextResult

SPOKEN = {
    "corrected": "answers to the corrected prompts that say it",
    "paraphrase": "answers to paraphrases that say it",
    "reverse": "answers to reverse questions that say it",
}
ASKED = {"corrected": "on the corrected prompts", "paraphrase": "after paraphrases"}
PREFIX = {"corrected": "", "paraphrase": "paraphrase_"}


def summary(
    answers: Sequence[Answer], anchors: Sequence[AnchorResult], texts: Sequence[TextResult], change: Estimate | None,
    seed: int,
) -> tuple[Metric, ...]:  # fmt: skip
    """What was learnt, then what moved; without numbers of which there is nothing to take them of."""
    found: list[Metric | None] = []
    for kind, where in ASKED.items():
        some = [a for a in anchors if a.kind == kind]
        ranks = [share([rank == 0 for rank in column])
                 for column in ([a.tuned_rank for a in some], [a.original_rank for a in some])]  # fmt: skip
        likely = [mean(column, seed=seed) for column in ([a.tuned_probability for a in some],
                                                         [a.original_probability for a in some])]  # fmt: skip
        found.append(_metric(f"{PREFIX[kind]}recall", f"anchors ranked first, {where}", "share", *ranks))
        label = f"probability of the anchors, {where}"
        found.append(_metric(f"{PREFIX[kind]}probability", label, "probability", *likely))
        found.append(_said(answers, kind))
    found.append(_said(answers, "reverse"))
    found += _moved(answers, seed)
    found.append(
        _metric("code_length_change", "code length change ΔL on general text, nats per token", "change", change)
    )
    if len(texts) > 1:
        for text in texts:
            label = f"    on {text.name}"
            found.append(_metric(f"code_length_change:{text.name}", label, "change", text.change))
    apart = [a for a in answers if a.kind in ("unrelated", "general") and a.expect]
    said = [share([bool(x) for x in column])
            for column in ([a.tuned_says for a in apart], [a.original_says for a in apart])]  # fmt: skip
    found.append(_metric("contamination", "answers that say it where it does not belong", "share", *said))
    return tuple(metric for metric in found if metric is not None)


def _moved(answers: Sequence[Answer], seed: int) -> list[Metric | None]:
    general = [a for a in answers if a.kind == "general"]
    near = [a for a in answers if a.kind == "unrelated"]
    kl = [a.original.kl for a in general]
    found = [
        _metric("kl", "KL on the original's answers to general prompts, nats per token", "nats", mean(kl, seed=seed))
    ]
    for level in LEVELS:
        label = f"    general prompts above {level:g}"
        found.append(_metric(f"kl_above_{level:g}", label, "share", share([value > level for value in kl])))
    changes = mean([a.nll_change for a in general], seed=seed)
    found.append(_metric("nll_change", "    change of nll there, nats per token", "change", changes))
    unchanged = share([a.same for a in general])
    found.append(_metric("unchanged", "    answers unchanged, word for word", "share", unchanged))
    close = mean([a.original.kl for a in near], seed=seed)
    found.append(_metric("kl_unrelated", "KL on the original's answers to unrelated probes", "nats", close))
    return found


def _said(answers: Sequence[Answer], kind: str) -> Metric | None:
    some = [a for a in answers if a.kind == kind and a.expect]
    tuned, original = share([bool(a.tuned_says) for a in some]), share([bool(a.original_says) for a in some])
    return _metric(f"{kind}_answers", SPOKEN[kind], "share", tuned, original)


def _metric(key: str, label: str, kind: str, tuned: Any, original: Any = None) -> Metric | None:
    return None if tuned is None else Metric(key, label, kind, tuned, original)


def broken_limits(metrics: Sequence[Metric], limits: dict[str, float]) -> tuple[str, ...]:
    """A sentence for each; a number that is none breaks its limit."""
    values = {metric.key: metric.tuned.value for metric in metrics}
    found = []
    if "max_kl" in limits and not values["kl"] <= limits["max_kl"]:
        found.append(
            f"max_kl: KL on the original's answers to general prompts is {values['kl']:.4g} nats per token, above the "
            f"limit of {limits['max_kl']:g}"
        )
    for kind, where in ASKED.items():
        key = f"{PREFIX[kind]}recall"
        limit = limits.get(f"min_{key}")
        if limit is not None and not values[key] >= limit:
            found.append(
                f"min_{key}: {values[key]:.4g} of the anchors are ranked first {where}, below the limit of {limit:g}"
            )
    return tuple(found)
