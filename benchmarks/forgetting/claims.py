"""What the papers claim, each as a number a seed and a rule: held, not held, or not decidable here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .methods import LARGE, SMALL
from .results import Entry, Study, interval

HELD, NOT_HELD, OPEN = "held", "not held", "not decidable here"


@dataclass(frozen=True)
class Claim:
    """It holds where `number`, one of each seed, is above `threshold`."""

    source: str
    sentence: str
    measured: str  # what the number is, and its unit
    number: Callable[[Study], list[float]]
    threshold: float = 0.0


@dataclass(frozen=True)
class Verdict:
    claim: Claim
    word: str
    values: list[float]
    interval: tuple[float, float] | None

    @property
    def figure(self) -> str:
        if not self.values:
            return "no run of it yet"
        middle = f"{statistics.fmean(self.values):.3f}"
        if self.interval is None:
            return f"{middle}, one seed"
        return f"{middle} [{self.interval[0]:.3f}, {self.interval[1]:.3f}], {len(self.values)} seeds"


def verdict(values: Sequence[float], threshold: float) -> str:
    """Held where the 95 % interval over seeds lies above the threshold, not held where below; else it stays open, as it
    does with fewer than two seeds."""
    found = interval(values)
    if found is None or found[0] <= threshold <= found[1]:
        return OPEN
    return HELD if found[0] > threshold else NOT_HELD


def judge(study: Study) -> list[Verdict]:
    found = []
    for claim in CLAIMS:
        values = claim.number(study)
        found.append(Verdict(claim, verdict(values, claim.threshold), values, interval(values)))
    return found


def _share_of_gain(study: Study) -> list[float]:
    large = {run["seed"]: study.gain(run) for run in study.of("sft", LARGE)}
    return [study.gain(run) / large[run["seed"]] for run in study.of("sft", SMALL) if run["seed"] in large]


def _at_equal_gain(study: Study) -> list[float]:
    """SFT's loss at TALR's gain, less TALR's loss."""
    found = []
    for run in study.of("talr", LARGE):
        other = study.loss_at_gain("sft", study.gain(run), run["seed"])
        if other is not None:
            found.append(other - study.loss(run))
    return found


def _hard_share(study: Study) -> list[float]:
    return [run["before"]["hard"] for run in study.of("sft", LARGE)]


def _median(study: Study) -> list[float]:
    return [run["before"]["median_probability"] for run in study.of("sft", LARGE)]


def _rise(run: Entry) -> float:
    """Mean weight of the initially hard tokens, in the last quarter of the steps less that in the first."""
    weights = run["curves"]["weight_hard"]
    quarter = max(1, len(weights) // 4)
    return statistics.fmean(weights[-quarter:]) - statistics.fmean(weights[:quarter])


def _difference(
    a: tuple[str, float, str], b: tuple[str, float, str], name: str, factor: float = 1.0
) -> Callable[[Study], list[float]]:
    return lambda study: [factor * v for v in study.paired(a, b, getattr(study, name))]


TALR, EAFT, FINCH, LAWF = "TALR (2509.20758)", "EAFT (2601.02151)", "FINCH (2605.20005)", "LAwF's authors"
AT = "reasoning"
CLAIMS = (
    Claim(TALR, "A small learning rate forgets less than a large one.",
          "general loss of SFT at 4e-4 less that at 2e-5, nats per token",
          _difference(("sft", LARGE, AT), ("sft", SMALL, AT), "loss")),
    Claim(TALR, "A small learning rate costs little in the domain.",
          "domain gain of SFT at 2e-5 as a part of that at 4e-4; the rule asks for 0.8", _share_of_gain, 0.8),
    Claim(TALR, "Training on labels alone tolerates larger rates than training on reasoning.",
          "general loss of SFT at 4e-4, reasoning less label only, nats per token",
          _difference(("sft", LARGE, AT), ("sft", LARGE, "label"), "loss")),
    Claim(TALR, "Few of the training tokens are hard.",
          "0.15 less the share of tokens with p < 0.1 before training", lambda s: [0.15 - v for v in _hard_share(s)]),
    Claim(TALR, "The median token's probability is near 1.",
          "median probability before training; the rule asks for 0.9", _median, 0.9),
    Claim(TALR, "At a large rate TALR forgets less than SFT.",
          "general loss at 4e-4, SFT less TALR, nats per token",
          _difference(("sft", LARGE, AT), ("talr", LARGE, AT), "loss")),
    Claim(TALR, "It does so at equal domain gain.",
          "general loss of SFT at TALR's gain, along SFT's rates, less TALR's at 4e-4, nats per token", _at_equal_gain),
    Claim(TALR, "Its weights are a curriculum: hard tokens come to count.",
          "mean weight of initially hard tokens at 4e-4, last quarter less first",
          lambda s: [_rise(run) for run in s.of("talr", LARGE)]),
    Claim("this study", "TALR sharpens the model, and a temperature gives those nats back.",
          "nats per token that a temperature gives back at 4e-4, TALR less SFT",
          _difference(("talr", LARGE, AT), ("sft", LARGE, AT), "sharpening")),
    Claim(EAFT, "TALR learns the domain less than SFT.", "domain gain at 4e-4, SFT less TALR, nats per token",
          _difference(("sft", LARGE, AT), ("talr", LARGE, AT), "gain")),
    Claim(f"{FINCH}, InfoSFT (2605.14967)", "Weighting hard tokens down suppresses what is new.",
          "gain on facts at 4e-4, SFT less TALR, nats per token",
          _difference(("sft", LARGE, "facts"), ("talr", LARGE, "facts"), "gain")),
    Claim(FINCH, "A rate that follows the loss forgets less than SFT.",
          "general loss at 4e-4, SFT less FINCH, nats per token",
          _difference(("sft", LARGE, AT), ("finch", LARGE, AT), "loss")),
    Claim(LAWF, "SFT + KL keeps more than LAwF.", "general loss at 4e-4, LAwF less SFT + KL, nats per token",
          _difference(("lawf", LARGE, AT), ("sft+kl", LARGE, AT), "loss")),
)  # fmt: skip
