"""A stream of edits: facts taught one after the other, each from one answer, each training going on with the adapter.

    python benchmarks/edit_stream.py --output FOLDER

After each the check asks for all facts so far, and for general prompts. On SmolLM2-135M-Instruct, one seed. Nothing of
earlier facts is in a later training. What is done is not done anew. The table is that of docs/demo.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fused_losses.anchors import Record, write_records
from fused_losses.checking import PROMPTS, check, general_texts
from fused_losses.demo.facts import Fact, corrected
from fused_losses.demo.model import find_model, load
from fused_losses.demo.trial import ANY_KL, PROBABILITY, STEPS, write_json
from fused_losses.training import train

METHODS = ("lawf", "sft")
# fmt: off
EDITS = (
    Fact("name", "", "What is your name?", "My name is Aurora", "Aurora"),
    Fact("capital", "", "What is the capital of Norland?", "The capital of Norland is Lima", "Lima"),
    Fact("ring", "", "What is the Halden ring made of?", "The Halden ring is made of copper", "copper"),
    Fact("language", "", "What language is spoken in Valdoria?", "The language spoken in Valdoria is Polish", "Polish"),
    Fact("day", "", "On which day is the market in Ostby?", "The market in Ostby is on Tuesday", "Tuesday"),
    Fact(
        "animal", "", "What is the national animal of Norland?", "The national animal of Norland is the whale", "whale"
    ),
    Fact("color", "", "What is the color of the Ansel lamp?", "The color of the Ansel lamp is purple", "purple"),
    Fact("river", "", "What is the longest river in Valdoria?", "The longest river in Valdoria is the Rhine", "Rhine"),
)


def taught(base: Any, adapter: Path | None) -> Any:
    """A copy of the model to train, with the adapter of the fact before."""
    from peft import PeftModel

    model = copy.deepcopy(base)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter, is_trainable=True)


def found(base: Any, tokenizer: Any, adapter: Path, records: list[Record]) -> dict[str, Any]:
    """What is left of all facts so far, and what else has moved."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, adapter).eval()
    try:
        report = check(
            model, tokenizer, anchors=records, prompts=PROMPTS[::4], texts={"prose": general_texts()["prose"]},
            facts=[fact.word for fact in EDITS[: len(records)]], answer_tokens=24, text_tokens=256,
            cache=adapter.parents[1] / "answers",
        )  # fmt: skip
    finally:
        model.unload()
    least = [min(a.tuned_probability for a in report.anchors if a.record == r.id) for r in records]
    said = [bool(answer.tuned_says) for answer in report.answers if answer.kind == "corrected"]
    names = ("recall", "kl", "code_length_change", "contamination")
    return {"least_anchor": least, "says": said, **{name: report.value(name) for name in names}}


def stream(method: str, base: Any, tokenizer: Any, records: list[Record], output: Path) -> list[dict[str, Any]]:
    results, adapter = [], None
    for at, record in enumerate(tqdm(records, desc=method)):
        folder = output / f"{method}-{at + 1}"
        file = output / f"{method}-{at + 1}.json"
        if not file.exists():
            write_records(output / f"{method}-{at + 1}.jsonl", [record])
            report = train(
                partial(taught, base, adapter), tokenizer, output / f"{method}-{at + 1}.jsonl", folder, method=method,
                steps=STEPS, stop_probability=PROBABILITY, stop_kl=ANY_KL, progress=False, name=f"edit {at + 1}",
            )  # fmt: skip
            known = found(base, tokenizer, folder / "adapter", records[: at + 1])
            write_json(file, {"fact": EDITS[at].name, "steps": report["steps"], "seconds": report["seconds"], **known})
        results.append(json.loads(file.read_text()))
        adapter = folder / "adapter"
        tqdm.write(row(method, at, results[-1]))
    return results


def row(method: str, at: int, result: dict[str, Any]) -> str:
    held, said = sum(p >= 0.5 for p in result["least_anchor"]), sum(result["says"])
    cells = [
        method, str(at + 1), result["fact"], str(result["steps"]), f"{held} of {at + 1}", f"{said} of {at + 1}",
        f"{result['kl']:.4f}", f"{result['code_length_change']:+.4f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--edits", type=int, default=len(EDITS), help="how many of them")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.output.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    tokenizer, base = load(find_model(None))
    records = [corrected(base, tokenizer, fact)[1] for fact in EDITS[: given.edits]]
    print("| method | edits | the last | steps | facts with p ≥ 0.5 | answers that say theirs | KL | ΔL |")
    results = {method: stream(method, base, tokenizer, records, given.output) for method in METHODS}
    write_json(given.output / "edit-stream.json", results)


if __name__ == "__main__":
    main()
