"""What a check has found: every answer, every number with its interval, and which limits are broken."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .intervals import Estimate

FORMAT, VERSION = "fused_losses.check", 1
LEVELS = (0.1, 0.25, 0.5)  # nats per token
# Control characters as their pictures; those of C1, and what turns the direction of text, as a mark.
HIDDEN = {c: 0x2400 + c for c in range(32) if c not in (9, 10)} | {0x7F: 0x2421}
HIDDEN |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)


@dataclass(frozen=True)
class Piece:
    """A token of an answer, or several that share a character: its text, and the largest KL(original ‖ tuned) there."""

    text: str
    kl: float
    special: bool = False


@dataclass(frozen=True)
class Spoken:
    """An answer of one model, and KL(original ‖ tuned) along it: the mean over its tokens, in nats."""

    text: str
    finished: bool
    kl: float
    tokens: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Answer:
    """A prompt and what both models answer.

    `kind`: "corrected", a prompt with anchors; "paraphrase", "reverse" and "unrelated", probes; "general", prompts that
    have nothing to do with what was taught. `expect`: what an answer shall say, of "unrelated" and "general" what it
    must not say; `original_says` and `tuned_says`: whether it does, None where nothing is expected. `nll_change`: nats
    per token of the original's answer.
    """

    kind: str
    prompt: str
    expect: tuple[str, ...]
    original: Spoken
    tuned: Spoken
    original_says: bool | None
    tuned_says: bool | None
    nll_change: float

    @property
    def same(self) -> bool:
        """Word for word, and both came to an end or neither did."""
        return (self.original.text, self.original.finished) == (self.tuned.text, self.tuned.finished)


@dataclass(frozen=True)
class AnchorResult:
    """An anchor after a prompt and the corrected answer up to it: its probability, and how many tokens are likelier.

    `kind`: "corrected", after the prompt that was corrected, or "paraphrase".
    """

    kind: str
    record: str
    prompt: str
    position: int
    text: str
    original_probability: float
    tuned_probability: float
    original_rank: int
    tuned_rank: int


@dataclass(frozen=True)
class TextResult:
    """A text: mean nll under both models, the code length change ΔL, and KL(original ‖ tuned), in nats per token."""

    name: str
    tokens: int
    left_out: int  # tokens of the text that were not read
    original_nll: float
    tuned_nll: float
    change: Estimate
    kl: float


@dataclass(frozen=True)
class Leak:
    """How many answers in which a fact does not belong say it, and the prompts where the tuned model alone does."""

    fact: str
    answers: int
    original: int
    tuned: int
    new: tuple[str, ...]


@dataclass(frozen=True)
class Metric:
    """A number of the summary. `kind`: "share", "probability", "nats" or "change" (nats, with a sign)."""

    key: str
    label: str
    kind: str
    tuned: Estimate
    original: Estimate | None = None

    def shown(self, estimate: Estimate | None) -> str:
        return "–" if estimate is None else number(estimate.value, self.kind, estimate.count)

    @property
    def interval(self) -> str:
        if self.tuned.low is None or self.tuned.high is None:
            return ""
        low, high = (number(x, self.kind, None) for x in (self.tuned.low, self.tuned.high))
        return f"{low} to {high}"


@dataclass(frozen=True)
class Report:
    """What `check` returns.

    Attributes:
        metrics: the summary; `value(key)` gives one number of it.
        answers, anchors, texts, leaks: what it is made of.
        limits: {"max_kl": ..., "min_recall": ..., "min_paraphrase_recall": ...}, those that were given.
        broken: a sentence for each limit that is broken; `passed`: none is.
        names: of the two models; settings: what the check was asked with, and versions.
    """

    names: dict[str, str]
    settings: dict[str, Any]
    metrics: tuple[Metric, ...]
    answers: tuple[Answer, ...]
    anchors: tuple[AnchorResult, ...]
    texts: tuple[TextResult, ...]
    leaks: tuple[Leak, ...]
    limits: dict[str, float]
    broken: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        return not self.broken

    def value(self, key: str) -> float | None:
        """The tuned model's value of a metric, None where there was nothing to measure it on."""
        return next((metric.tuned.value for metric in self.metrics if metric.key == key), None)

    def to_json(self) -> dict[str, Any]:
        """Dicts, lists, strings and numbers; None in place of numbers that are not finite."""
        found: dict[str, Any] = {"format": FORMAT, "version": VERSION, "passed": self.passed}
        found |= {name: _plain(getattr(self, name)) for name in ("names", "settings", "limits", "broken")}
        metrics = {m.key: {"label": m.label, "tuned": m.tuned, "original": m.original} for m in self.metrics}
        found["metrics"] = _plain(metrics)
        found |= {name: _plain(getattr(self, name)) for name in ("anchors", "texts", "leaks")}
        found["answers"] = [_plain(answer) | {"same": answer.same} for answer in self.answers]
        return found

    def save_json(self, path: str | os.PathLike) -> None:
        """Under a temporary name first."""
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(Path(path), text + "\n")

    def save_html(self, path: str | os.PathLike) -> None:
        """One file that needs no other, under a temporary name first."""
        from .html import page

        write_whole(Path(path), page(self))

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """(title, header, rows) of the tables of the terminal."""
        rows = [[m.label, m.shown(m.original), m.shown(m.tuned), m.interval] for m in self.metrics]
        found = [("What was learnt, and what moved", ["", "original", "tuned", "tuned: 95% interval"], rows)]
        if self.leaks:
            leaks = [
                [leak.fact, *(f"{n} of {leak.answers}" for n in (leak.original, leak.tuned)), "; ".join(leak.new)]
                for leak in self.leaks
            ]
            found.append(("Where it does not belong", ["fact", "original", "tuned", "new in the answers to"], leaks))
        shown = [a for a in self.answers if a.kind != "general"]
        general = [a for a in self.answers if a.kind == "general"]
        shown += sorted(general, key=lambda a: -a.original.kl)[:3]
        answers = [[a.kind, a.prompt, brief(a.original), brief(a.tuned)] for a in shown]
        found.append(("Answers; of the general prompts the three that moved most",
                      ["kind", "prompt", "original", "tuned"], answers))  # fmt: skip
        return [(title, header, [[visible(cell) for cell in row] for row in rows]) for title, header, rows in found]


def brief(spoken: Spoken, most: int = 160) -> str:
    """The beginning of an answer."""
    text = spoken.text.strip()
    return text if spoken.finished and len(text) <= most else f"{text[:most].rstrip()} …"


def visible(text: str) -> str:
    """Without characters that would move a terminal's cursor, turn the direction of what follows, or hide."""
    return text.translate(HIDDEN)


def number(value: float, kind: str, count: int | None = None) -> str:
    """As it is shown; with `count`, of a share, as "3 of 8"."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if kind == "share":
        return f"{100 * value:.0f}%" if count is None else f"{round(value * count)} of {count}"
    if kind == "change":
        return f"{value:+.4f}"
    return f"{value:.3f}" if kind == "probability" else f"{value:.4f}"


def write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


Progress = Callable[[str, int, int], Any]
