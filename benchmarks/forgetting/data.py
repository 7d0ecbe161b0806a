"""What is learned: the rows of a domain, as training and test sets, decided by names and seeds alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from . import clinical
from . import facts as synthetic
from .rows import Row, chat_row, text_rows

DOMAINS = ("reasoning", "label", "facts", "docs")
LONGEST = 160  # tokens of a row
TOWNS = 15


@dataclass(frozen=True)
class Domain:
    """`test` is like what is trained on; `far` is of held-out calculators, reversed facts, or other modules."""

    train: list[Row]
    test: list[Row]
    far: list[Row]


def clinical_examples(seed: int, rows: int, tested: int) -> dict[str, list[dict[str, str]]]:
    """Training patients follow `seed`, tested ones do not; no patient is in two sets, and no
    calculator in train and far."""
    taken: set[tuple] = set()
    sets = {
        "test": clinical.examples("test", tested, clinical.TRAINED, taken),
        "far": clinical.examples("far", tested * 3 // 4, clinical.HELD_OUT, taken),
    }
    return {"train": clinical.examples(f"train {seed}", rows, clinical.TRAINED, taken), **sets}


def domain(tokenizer: Any, name: str, seed: int, rows: int, tested: int) -> Domain:
    if name in ("reasoning", "label"):
        sets = clinical_examples(seed, rows, tested)
        made = {kind: [_clinical_row(tokenizer, e, name) for e in examples] for kind, examples in sets.items()}
        return Domain(**made)
    if name == "facts":
        learned, paraphrased, turned = synthetic.facts("towns", TOWNS)
        g = random.Random(f"order {seed}")
        train = g.sample(learned, len(learned))[:rows]
        g = random.Random("tested")
        return Domain(*(
            [chat_row(tokenizer, e["question"], e["answer"], e["value"]) for e in examples]
            for examples in (train, g.sample(paraphrased, min(tested, len(paraphrased))), turned[: tested // 2])
        ))  # fmt: skip
    if name == "docs":
        train, test, far = (text_rows(tokenizer, text, 64) for text in synthetic.documentation())
        return Domain(random.Random(f"order {seed}").sample(train, min(rows, len(train))), test[:tested], far[:tested])
    raise ValueError(f"domain: expected one of {', '.join(DOMAINS)}, got {name!r}")


def _clinical_row(tokenizer: Any, example: dict[str, str], rendering: str) -> Row:
    answer = example["answer"]
    if rendering == "reasoning":
        answer = f"{example['reasoning']}\n{answer}"
    return chat_row(tokenizer, example["question"], answer, example["number"], LONGEST)
