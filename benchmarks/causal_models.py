"""Every causal language model class of transformers, patched against itself unpatched: docs/models.md.

    python benchmarks/causal_models.py            # about 5 minutes on one CPU thread
    python benchmarks/causal_models.py Llama      # only classes with that in their names; prints, writes nothing

Tiny random models on the CPU (tests/tiny_models.py), cross-entropy with exact gradients; what is compared: tests/comparison.py.
"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from pathlib import Path

import peft
import torch
import transformers
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from comparison import VARIANTS, Outcome, compare, quiet  # noqa: E402
from tiny_models import names  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
MARKS = {"equal": "equal", "refused": "refused", "impossible": "–", "different": "**DIFFERENT**"}
MEANING = {
    "plain": "full fine-tuning, float32",
    "float64": "the same in float64 (transformers casts logits to float32), where parameters with a small gradient count too",
    "lora": "LoRA on the linear layers of the body, frozen head",
    "lora_head": "LoRA on the head too",
    "modules_to_save": "LoRA on the body, the head trained through `modules_to_save`",
    "checkpointing": "gradient checkpointing",
    "packed": "both sequences in one row, told apart by position_ids",
    "bf16": "the model in bfloat16: error against float32 at most 1.3 times the unpatched model's",
    "autocast": "the same under autocast to bfloat16",
}


def main() -> None:
    quiet()
    torch.set_num_threads(1)
    wanted = [name for name in names() if all(part in name for part in sys.argv[1:])]
    results: dict[str, dict[str, Outcome]] = {}
    for name in tqdm(wanted, file=sys.stderr):
        first = compare(name)
        later = VARIANTS[1:] if first.kind in ("equal", "different") else ()
        results[name] = {"plain": first, **{variant: compare(name, variant) for variant in later}}
    text = page(results)
    if sys.argv[1:]:
        print(text)
        return
    temporary = PAGE.with_suffix(".new")
    temporary.write_text(text)
    os.replace(temporary, PAGE)
    print(f"{PAGE.relative_to(ROOT)}: {Counter(r['plain'].kind for r in results.values())}")


def page(results: dict[str, dict[str, Outcome]]) -> str:
    kinds = Counter(r["plain"].kind for r in results.values())
    lines = [
        "# Which models can be patched",
        "",
        f"All {len(results)} classes in the causal-LM mapping of transformers {transformers.__version__} (torch {torch.__version__.split('+')[0]}, "
        f"peft {peft.__version__}): {kinds['equal']} equal, {kinds['refused']} refused, {kinds['impossible']} that cannot be built or give no loss here, "
        f"{kinds['different']} different. Tiny random models, measured on a CPU; written by `python benchmarks/causal_models.py`, and the first column is "
        "compared again by every run of the tests.",
        "",
        "*Equal*: with `fused_losses.patch(model)`, loss and the gradient of every parameter are those of the unpatched model to 1e-5 relative "
        "(where a parameter's gradient is less than 1 % of all, relative to that; in float64 0.1 %), and after `unpatch` they are bit-equal to what they were. "
        "*Refused*: an error says why. –: the unpatched model, or PEFT, cannot do it either; reasons below.",
        "",
        *(f"- `{variant}`: {meaning}" for variant, meaning in MEANING.items()),
        "",
        "| class | " + " | ".join(f"`{v}`" for v in VARIANTS) + " |",
        "|---|" + "---|" * len(VARIANTS),
    ]
    for name, outcomes in results.items():
        marks = [MARKS[outcomes[v].kind] if v in outcomes else "" for v in VARIANTS]
        lines.append(f"| {name} | " + " | ".join(marks) + " |")
    lines += ["", "| | " + " | ".join(f"`{v}`" for v in VARIANTS) + " |", "|---|" + "---|" * len(VARIANTS)]
    columns = [[r[v] for r in results.values() if v in r] for v in VARIANTS]
    rows = {
        "equal": [str(sum(o.kind == "equal" for o in column)) for column in columns],
        "largest error of the loss": [largest(column, "loss_error") for column in columns],
        "largest error of a gradient": [largest(column, "gradient_error") for column in columns],
        "ratio to the unpatched error¹": [ratio(column) for column in columns],
    }
    lines += [f"| {title} | " + " | ".join(values) + " |" for title, values in rows.items()]
    lines += [
        "",
        "¹ of the gradient of all parameters, geometric mean over the classes; half precision only.",
        "",
        "## Reasons",
        "",
    ]
    for name, outcomes in results.items():
        for variant, outcome in outcomes.items():
            if outcome.reason:
                reason = outcome.reason if len(outcome.reason) <= 180 else outcome.reason[:177] + "..."
                lines.append(f"- {name}, {variant}, {MARKS[outcome.kind].replace('–', 'impossible')}: {reason}")
    return "\n".join(lines) + "\n"


def largest(column: list[Outcome], name: str) -> str:
    return f"{max((getattr(o, name) for o in column if o.kind == 'equal'), default=0):.1e}"


def ratio(column: list[Outcome]) -> str:
    ratios = [o.gradient_error / o.plain_error for o in column if o.plain_error]
    return f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.3f}" if ratios else ""


if __name__ == "__main__":
    main()
