"""One training of the demonstration and what a check finds afterwards: a file, written when all of it is known."""

from __future__ import annotations

import copy
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..anchors import Record, write_records
from ..checking import PROMPTS, Report, check, general_texts
from ..training import train
from .facts import Fact

STEPS = 39  # at most; `train` measures after every step where there are fewer than 40
PROBABILITY = 0.9  # of the least anchor, at which every training stops, whatever has become of the KL
ANY_KL = 1e9
ANSWER_TOKENS, TEXT_TOKENS = 24, 256
GENERAL = PROMPTS[::2]

METRICS = (
    "recall", "probability", "corrected_answers", "paraphrase_recall", "paraphrase_answers", "reverse_answers", "kl",
    "kl_above_0.1", "unchanged", "kl_unrelated", "code_length_change", "contamination",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """What is trained, for at most so many steps. `retain`: records of the model's own answers, held by methods that
    can. `wordings`: the question in other words, each with its corrected answer."""

    fact: Fact
    method: str
    seed: int
    learning_rate: float | None = None  # None: the method's own default
    options: Mapping[str, float] = field(default_factory=dict)
    retain: Sequence[Record] = ()
    wordings: Sequence[Record] = ()
    steps: int = STEPS

    @property
    def name(self) -> str:
        rate = "" if self.learning_rate is None else f"-{self.learning_rate:g}"
        options = "".join(f"-{name}-{value:g}" for name, value in self.options.items())
        retained = f"-retain-{len(self.retain)}" if self.retain else ""
        wordings = f"-wordings-{len(self.wordings)}" if self.wordings else ""
        return f"{self.fact.name}-{self.method}{rate}{options}{retained}{wordings}-{self.seed}"


def run(
    trial: Trial, base: Any, tokenizer: Any, record: Record, output: Path, progress: Callable[[float], Any]
) -> dict[str, Any]:
    """The trial's result; from its file where it is done, and on from where it was where it was killed.

    `progress` is called with the part that is done. Into `output` go NAME.json and the training's folder NAME, whose
    adapter the other commands take.
    """
    settings = _settings(trial, record)
    file = output / f"{trial.name}.json"
    if file.exists():
        known = json.loads(file.read_text())
        if known["settings"] != settings:
            raise ValueError(f"--output: {file} was measured with other settings; give another folder, or remove it")
        return known
    folder = output / trial.name
    lines = {"anchors": [record, *trial.wordings], "retain": list(trial.retain)}
    for name, records in lines.items():
        if records:
            write_records(output / f"{trial.name}.{name}.jsonl", records)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = train(
            lambda: copy.deepcopy(base), tokenizer, output / f"{trial.name}.anchors.jsonl", folder,
            method=trial.method, retain=[output / f"{trial.name}.retain.jsonl"] if trial.retain else [],
            learning_rate=trial.learning_rate, options=trial.options, steps=trial.steps,
            batch_size=len(lines["anchors"]) + (len(trial.retain) if trial.method in ("lawf", "sft+kl") else 0),
            stop_probability=PROBABILITY, stop_kl=ANY_KL, seed=trial.seed, progress=False,
        )  # fmt: skip
        progress(0.3)
        begun = time.perf_counter()
        report = checked(base, tokenizer, folder, trial.fact, record, output / "answers", progress)
    found = {
        "fact": trial.fact.name, "method": trial.method, "seed": trial.seed,
        "retained": len(trial.retain), "wordings": len(trial.wordings), "settings": settings,
        "training": _of_training(trained), "check_seconds": round(time.perf_counter() - begun, 1), **of_report(report),
    }  # fmt: skip
    write_json(file, found)
    return json.loads(file.read_text())  # tuples as lists, as in the next call


def checked(
    base: Any, tokenizer: Any, folder: Path, fact: Fact, record: Record, cache: Path, progress: Callable[[float], Any]
) -> Report:
    """What the adapter of a training's folder has changed. `base` is as before afterwards."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    stages: list[str] = []

    def advance(stage: str, done: int, total: int) -> None:
        if stage not in stages:
            stages.append(stage)
        progress(0.3 + 0.7 * (len(stages) - 1 + done / max(total, 1)) / 4)

    try:
        return check(
            model, tokenizer, anchors=[record], probes=fact.probes(record), prompts=GENERAL, texts=general_texts(),
            facts=[fact.word], answer_tokens=ANSWER_TOKENS, text_tokens=TEXT_TOKENS, cache=cache, progress=advance,
        )  # fmt: skip
    finally:
        model.unload()


def of_report(report: Report) -> dict[str, Any]:
    """What is kept of a check: numbers, and the answers about the fact."""
    metrics = {
        metric.key: {
            "tuned": metric.tuned.value,
            "original": None if metric.original is None else metric.original.value,
        }
        for metric in report.metrics
        if metric.key in METRICS
    }
    answers = [
        {
            "kind": answer.kind, "prompt": answer.prompt, "original": answer.original.text, "tuned": answer.tuned.text,
            "says": answer.tuned_says,
        }
        for answer in report.answers
        if answer.kind != "general"
    ]  # fmt: skip
    return {"metrics": metrics, "leaks": [asdict(leak) for leak in report.leaks], "answers": answers}


def _of_training(report: Mapping[str, Any]) -> dict[str, Any]:
    measured = [{name: round(value, 5) for name, value in one.items()} for one in report["measurements"]]
    return {
        "learning_rate": report["settings"]["learning_rate"], "options": report["settings"]["options"],
        "steps": report["steps"], "reached": report["after"]["least_anchor"] >= PROBABILITY,
        "least_anchor": report["after"]["least_anchor"], "anchor_probability": report["after"]["anchor_probability"],
        "seconds": report["seconds"], "measurements": measured,
    }  # fmt: skip


def _settings(trial: Trial, record: Record) -> dict[str, Any]:
    return {
        "learning_rate": trial.learning_rate, "options": dict(trial.options), "steps": trial.steps,
        "probability": PROBABILITY, "answer_tokens": ANSWER_TOKENS, "text_tokens": TEXT_TOKENS,
        "general": len(GENERAL), "tokens": list(record.completion.token_ids),
        "anchors": [anchor.position for anchor in record.anchors],
    }  # fmt: skip


def write_json(path: Path, value: Any) -> None:
    """Under a temporary name first."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
