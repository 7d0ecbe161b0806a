"""Every class of language models in transformers, and kinds of PEFT, patched against itself unpatched: docs/models.md.

    python benchmarks/causal_models.py            # writes docs/models.md; about 8 minutes on one CPU thread
    python benchmarks/causal_models.py --resume   # goes on where a run was interrupted
    python benchmarks/causal_models.py Llama      # only rows with that in their names; prints, writes nothing

Tiny random models on the CPU (tests/support/tiny_models.py), cross-entropy with exact gradients; what is compared:
comparison.py and adapters.py beside it.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import textwrap
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import peft
import torch
import transformers
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from adapters import KINDS, MODELS, ORDERS, compare_adapter  # noqa: E402
from comparison import VARIANTS, Outcome, compare, quiet  # noqa: E402
from tiny_models import TIMM, WITH_IMAGE, causal_names, multimodal_names  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
PARTIAL = Path(tempfile.gettempdir()) / "fused_losses_models.jsonl"  # what an interrupted run has measured
MARKS = {
    "equal": "equal",
    "refused": "refused",
    "impossible": "–",
    "different": "**DIFFERENT**",
    "error": "**ERROR**",
}
MEANING = {
    "plain": "full fine-tuning, float32",
    "float64": "the same in float64 (transformers casts logits to float32), where parameters with a small gradient "
    "count too",
    "lora": "LoRA on the linear layers of the body, frozen head",
    "lora_head": "LoRA on the head too",
    "modules_to_save": "LoRA on the body, the head trained through `modules_to_save`",
    "checkpointing": "gradient checkpointing",
    "packed": "both sequences in one row, told apart by position_ids; by three or four of them a token where the model "
    "has positions in time, height and width",
    "bf16": "the model in bfloat16: error against float32 at most 1.3 times the unpatched model's",
    "autocast": "the same under autocast to bfloat16",
}
Table = dict[str, dict[str, Outcome]]  # row, column


def main() -> None:
    quiet()
    torch.set_num_threads(1)
    wanted = [argument for argument in sys.argv[1:] if argument != "--resume"]
    if "--resume" not in sys.argv:
        PARTIAL.unlink(missing_ok=True)
    known = read_partial()
    sections = {
        "causal": models(wanted_of(causal_names(), wanted), known),
        "multimodal": models(wanted_of(multimodal_names(), wanted), known),
        "adapters": adapters(wanted_of(KINDS, wanted), known),
    }
    text = page(**sections)
    if wanted:
        print(text)
        return
    temporary = PAGE.with_suffix(".new")
    temporary.write_text(text)
    os.replace(temporary, PAGE)
    PARTIAL.unlink(missing_ok=True)
    counts = Counter(o.kind for table in sections.values() for row in table.values() for o in row.values())
    print(f"{PAGE.relative_to(ROOT)}: {dict(counts)} comparisons")


def wanted_of(names: list[str], wanted: list[str]) -> list[str]:
    return [name for name in names if all(part in name for part in wanted)]


def read_partial() -> Table:
    lines = PARTIAL.read_text().splitlines() if PARTIAL.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}}]")]
    return {name: {column: Outcome(**outcome) for column, outcome in row.items()} for name, row in rows}


def note(name: str, row: dict[str, Outcome]) -> dict[str, Outcome]:
    with PARTIAL.open("a") as file:
        file.write(json.dumps([name, {column: asdict(outcome) for column, outcome in row.items()}]) + "\n")
    return row


def models(names: list[str], known: Table) -> Table:
    def row(name: str) -> dict[str, Outcome]:
        first = compare(name)
        later = VARIANTS[1:] if first.kind in ("equal", "different") else ()
        return note(name, {"plain": first, **{variant: compare(name, variant) for variant in later}})

    return {name: known[name] if name in known else row(name) for name in tqdm(names, file=sys.stderr)}


def adapters(kinds: list[str], known: Table) -> Table:
    def row(kind: str) -> dict[str, Outcome]:
        return note(
            kind, {column(name, order): compare_adapter(kind, name, order) for name in MODELS for order in ORDERS}
        )

    return {kind: known[kind] if kind in known else row(kind) for kind in tqdm(kinds, file=sys.stderr)}


def column(model: str, order: str) -> str:
    return f"{model}, {order}"


def page(causal: Table, multimodal: Table, adapters: Table) -> str:
    versions = (
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, peft {peft.__version__}"
    )
    blocks = [
        "# Which models can be patched",
        paragraph(
            f"Tiny random models, patched and unpatched, measured on a CPU with {versions}. Written by "
            "`python benchmarks/causal_models.py`; the column `plain` and the kinds of PEFT with Llama are compared "
            "by every run of the tests."
        ),
        paragraph(
            "*Equal*: with `fused_losses.patch(model)`, loss and the gradient of every parameter are those of the "
            "unpatched model to 1e-5 relative (where a parameter's gradient is less than 1 % of all, relative to that; "
            "in float64 0.1 %), and after `unpatch` they are bit-equal to what they were. *Refused*: an error says why."
            " –: the unpatched model, or PEFT, cannot do it either, or it was not tried. [Reasons](#reasons) are below."
        ),
        "\n".join(paragraph(f"- `{variant}`: {meaning}", "  ") for variant, meaning in MEANING.items()),
        "## Causal language models",
        paragraph(f"All {len(causal)} classes in the causal-LM mapping: {tally(causal)}."),
        table("class", causal, VARIANTS),
        errors(causal),
        "## Models that take images or sounds",
        paragraph(
            f"All classes in the mappings of image-text-to-text and multimodal models that are not above, with text "
            f"alone, and the most used with images too: {tally(multimodal)}. Towers that come from the timm package "
            f"({', '.join(TIMM)}) are replaced by SigLIP's."
        ),
        table("class", multimodal, VARIANTS),
        errors(multimodal),
        paragraph(
            "¹ of the gradient of all parameters, geometric mean over the classes; half precision only.",
        ),
        "## Kinds of PEFT",
        paragraph(
            "Patched before and after `get_peft_model`: the loss, and the gradient of every trained parameter. "
            "Adapters of linear layers are on all of the body; “head too”: on the LM head as well."
        ),
        table("kind", adapters, [column(name, order) for name in MODELS for order in ORDERS]),
        "## Reasons",
        "\n".join(reasons(causal | multimodal | adapters)),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def paragraph(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def tally(results: Table) -> str:
    kinds = Counter(row["plain"].kind for row in results.values())
    return (
        f"{kinds['equal']} rows equal, {kinds['refused']} refused, {kinds['impossible']} that cannot be built, give no "
        f"loss or were not tried, {kinds['different'] + kinds['error']} different"
    )


def table(title: str, results: Table, columns: list[str] | tuple[str, ...]) -> str:
    names = [f"`{c}`" if c in MEANING else c.replace("ForCausalLM", "").replace("LMHeadModel", "") for c in columns]
    lines = [f"| {title} | " + " | ".join(names) + " |", "|---|" + "---|" * len(columns)]
    for name, row in results.items():
        marks = [MARKS[row[c].kind] if c in row else "" for c in columns]
        lines.append(f"| {name} | " + " | ".join(marks) + " |")
    return "\n".join(lines)


def errors(results: Table) -> str:
    columns = [[row[v] for row in results.values() if v in row] for v in VARIANTS]
    lines = ["| | " + " | ".join(f"`{v}`" for v in VARIANTS) + " |", "|---|" + "---|" * len(VARIANTS)]
    rows = {
        "equal": [str(sum(o.kind == "equal" for o in column)) for column in columns],
        "largest error of the loss": [largest(column, "loss_error") for column in columns],
        "largest error of a gradient": [largest(column, "gradient_error") for column in columns],
        "ratio to the unpatched error¹": [ratio(column) for column in columns],
    }
    lines += [f"| {title} | " + " | ".join(values) + " |" for title, values in rows.items()]
    return "\n".join(lines)


def largest(outcomes: list[Outcome], name: str) -> str:
    return f"{max((getattr(o, name) for o in outcomes if o.kind == 'equal'), default=0):.1e}"


def ratio(outcomes: list[Outcome]) -> str:
    ratios = [o.gradient_error / o.plain_error for o in outcomes if o.kind == "equal" and o.plain_error]
    return f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.3f}" if ratios else ""


def reasons(results: Table) -> list[str]:
    """One line a reason, with all rows that have it."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name, row in results.items():
        for where, outcome in row.items():
            if outcome.kind != "equal":
                reason = outcome.reason or f"errors {outcome.loss_error:.1e} and {outcome.gradient_error:.1e}"
                for model in (name.removesuffix(WITH_IMAGE), *MODELS):
                    reason = reason.replace(model, "MODEL") if model not in KINDS else reason
                reason = reason if len(reason) <= 180 else reason[:177] + "..."
                found.setdefault((outcome.kind, reason), {}).setdefault(name, []).append(where)
    order = list(MARKS)[::-1]
    lines = []
    for (kind, reason), rows in sorted(found.items(), key=lambda item: order.index(item[0][0])):
        columns = {"; ".join(where) for where in rows.values()}
        if len(columns) == 1:
            who = f"{'; '.join(rows)} ({columns.pop()})"
        else:
            who = "; ".join(f"{name} ({'; '.join(where)})" for name, where in rows.items())
        lines.append(paragraph(f"- *{kind}*: {reason.strip().rstrip('.')}: {who}", "  "))
    return lines


if __name__ == "__main__":
    main()
