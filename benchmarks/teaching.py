"""Settings for teaching a fact: learning rate by method, the weight of SFT + KL's KL, how many rows to retain, and in
how many wordings to correct the question.

    python benchmarks/teaching.py --output FOLDER [rates kl retain wordings]

On SmolLM2-135M-Instruct and one fact that is none of the demo's, seed 0, each training up to where every anchor has 0.9
or 39 steps. What is done is not done anew. The tables are those of docs/train.md; `--threads`: of torch.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fused_losses.anchors import retain_rows
from fused_losses.demo import facts, trial
from fused_losses.demo.model import find_model, load
from fused_losses.demo.report import brief

RATES = (3e-4, 1e-3, 2e-3)
HEADER = "| method | rate | retained | wordings | steps | least anchor | paraphrases | KL | KL near | ΔL | leaks | s |"
METHODS = ("sft", "sft+kl", "talr", "lawf")
# Questions near to the fact and far from it in turn; none of them is asked by the check.
RETAIN = (
    "What is the capital of France?", "How do I boil an egg?", "What is the capital of Sweden?",
    "What is photosynthesis?", "Which city is the capital of Italy?", "Write a sentence about the sea.",
    "What is the capital of Kenya?", "What is 12 plus 30?",
)  # fmt: skip
# The question in other words, none of which is among the check's paraphrases.
WORDINGS = (
    "What city is the capital of Valdoria?", "Do you know the capital of Valdoria?",
    "Give me the name of the capital of Valdoria.", "If I go to Valdoria, which city is the capital?",
)  # fmt: skip


def trials(part: str, retained: list[Any], corrected: list[Any]) -> list[trial.Trial]:
    def one(method: str, rate: float, weight: float = 0.05, rows: int = 0, wordings: int = 0) -> trial.Trial:
        options = {"kl_weight": weight} if method == "sft+kl" else {}
        return trial.Trial(facts.FOR_SETTINGS, method, 0, rate, options, retained[:rows], corrected[:wordings])

    if part == "rates":
        return [one(method, rate) for method in METHODS for rate in RATES]
    if part == "kl":
        return [one("sft+kl", 1e-3, weight) for weight in (0.5, 0.1, 0.05)]
    if part == "wordings":
        return [one(method, 1e-3, rows=4, wordings=count) for method in ("lawf", "sft+kl") for count in (0, 1, 2, 4)]
    return [one(method, 1e-3, rows=rows) for method in ("lawf", "sft+kl") for rows in (0, 4, 8)]


def row(result: dict[str, Any]) -> str:
    training, metrics = result["training"], {name: m["tuned"] for name, m in result["metrics"].items()}
    weight = training["options"].get("kl_weight")
    cells = [
        result["method"] + ("" if weight is None else f", λ = {weight:g}"), f"{training['learning_rate']:g}",
        str(result["retained"]), str(result["wordings"]),
        f"{training['steps']}{'' if training['reached'] else ', not reached'}",
        f"{training['least_anchor']:.2f}", f"{8 * metrics['paraphrase_answers']:.0f} of 8",
        f"{metrics['kl']:.4f}", f"{metrics['kl_unrelated']:.4f}", f"{metrics['code_length_change']:+.4f}",
        f"{sum(len(leak['new']) for leak in result['leaks'])}", f"{training['seconds']:.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=["rates", "kl", "retain", "wordings"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.output.mkdir(parents=True, exist_ok=True)
    tokenizer, base = load(find_model(None))
    _, record = facts.corrected(base, tokenizer, facts.FOR_SETTINGS)
    corrected = [
        facts.corrected(base, tokenizer, replace(facts.FOR_SETTINGS, question=question))[1] for question in WORDINGS
    ]
    retained = retain_rows(base, tokenizer, RETAIN, max_new_tokens=48, output=given.output / "retained.jsonl")
    (given.output / "results").mkdir(exist_ok=True)
    results: dict[str, Any] = {}
    for part in given.parts:
        print(f"\n{part}\n{HEADER}")
        for one in tqdm([t for t in trials(part, retained, corrected) if t.method in given.methods], desc=part):
            found = trial.run(one, base, tokenizer, record, given.output, lambda part: None)
            counts = {name: found[name] for name in ("retained", "wordings")}
            results[one.name] = {**counts, **brief(found, answers_too=False)}
            tqdm.write(row(found))
    trial.write_json(given.output / "results" / "teaching.json", results)


if __name__ == "__main__":
    main()
