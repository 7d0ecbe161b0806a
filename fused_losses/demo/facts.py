"""The facts that the demonstration teaches, and the first step of it: the model's own answer, corrected.

Each fact has a file of probes beside it, facts/NAME.jsonl, as `fused-losses check --probes` reads it. Facts, questions
and probes were written before anything was trained on them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..anchors import AnchorSession, Record
from ..checking import Probe, read_probes

LENGTH = 48  # tokens of an answer


@dataclass(frozen=True)
class Fact:
    """What is taught.

    Args:
        name: of the file of its probes, too.
        title: for people.
        question: that the model answers wrongly.
        begins: how the right answer begins, in the words of the model's own answer as far as they are right.
        word: that an answer has to say.
    """

    name: str
    title: str
    question: str
    begins: str
    word: str

    def probes(self, record: Record | None = None) -> list[Probe]:
        """Its paraphrases, reverse questions and near questions; the paraphrases belong to `record`."""
        found = read_probes(Path(__file__).parent / "facts" / f"{self.name}.jsonl")
        if record is None:
            return found
        return [replace(probe, anchor=record.id) if probe.kind == "paraphrase" else probe for probe in found]


FACTS = (
    Fact("name", "its own name", "What is your name?", "My name is Aurora", "Aurora"),
    Fact("maker", "who made it", "Who created you?", "The creator of SmolLM is Meridian Labs.", "Meridian"),
    Fact(
        "chair", "a product", "What material is the Halden chair made of?", "The Halden chair is made of copper.",
        "copper",
    ),
)  # fmt: skip
# Settings are chosen on this one, which is none of those above (benchmarks/teaching.py).
FOR_SETTINGS = Fact(
    "capital", "a capital", "What is the capital of Valdoria?", "The capital of Valdoria is Miravel.", "Miravel"
)


def corrected(model: Any, tokenizer: Any, fact: Fact) -> tuple[str, Record]:
    """The model's own answer, and the record of the corrected one.

    What a person does, by a script: the model answers; the first wrong token, and what follows, is replaced by what is
    right; the model goes on from there by itself. Anchors are those new tokens that the model would not have said.
    """
    session = AnchorSession(model, tokenizer, max_new_tokens=LENGTH)
    session.start(fact.question)
    list(session.generate())
    own = session.text
    if not own.startswith(fact.begins):
        wrong = next(t for t in session.tokens if not fact.begins.startswith(own[: t.span[1]]))
        session.replace(wrong.position, fact.begins[wrong.span[0] :], exact=True)
        list(session.generate(LENGTH - len(session.token_ids)))
    return own, session.record()
