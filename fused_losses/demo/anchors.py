"""Anchors: the first wrong tokens of the model's own answer, each replaced by the right one.

The model answers greedily. At the first token that a person would correct, the right token takes its place, and the
model goes on from there; and so on to the end. What the base model ranks first by itself is no anchor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Corrector = Callable[[list[int], int], "int | None"]


@dataclass(frozen=True)
class Anchor:
    position: int  # in the answer
    token: int
    replaced: int  # what the base model would have said
    probability: float  # of `token` under the base model
    replaced_probability: float


@torch.no_grad()
def correct_answer(
    model: Any, prompt: list[int], corrector: Corrector, end: int, length: int = 48
) -> tuple[list[int], list[Anchor]]:
    """The corrected answer and its anchors. `corrector(answer, proposal)` returns the right token, or None to agree."""
    answer: list[int] = []
    anchors: list[Anchor] = []
    past, step = None, torch.tensor([prompt])
    while len(answer) < length:
        out = model(input_ids=step, past_key_values=past, use_cache=True, logits_to_keep=1)
        past, p = out.past_key_values, out.logits[0, -1].softmax(-1)
        proposal = int(p.argmax())
        right = corrector(answer, proposal)
        token = proposal if right is None else right
        if token != proposal:
            anchors.append(Anchor(len(answer), token, proposal, float(p[token]), float(p[proposal])))
        answer.append(token)
        if token == end:
            break
        step = torch.tensor([[token]])
    return answer, anchors


def name_corrector(tokenizer: Any, opening: str, name: str) -> Corrector:
    """Holds an answer to its opening and to the name: `opening` + name first, the name as a whole word, and again
    wherever the model says "name is" later."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    first, again = ids(f"{opening} {name}"), ids(f" {name}")

    def corrector(answer: list[int], proposal: int) -> int | None:
        if len(answer) < len(first):
            return first[len(answer)]
        text = tokenizer.decode(answer)
        if text.endswith(name) and tokenizer.decode([proposal])[:1].isalnum():
            return ids(".")[0]  # the name ends here: "Aurora", not "Auroraline"
        for said in range(len(again)):
            if (
                tokenizer.decode(answer[: len(answer) - said]).endswith("name is")
                and answer[len(answer) - said :] == again[:said]
            ):
                return again[said]
        return None

    return corrector
