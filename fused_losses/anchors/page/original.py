"""What the original model would have answered, to be set beside the answer of a trained one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..forwards import most_positions, reference_forward, vocabulary
from ..prompts import end_ids


def original_answers(session: Any) -> Callable[[list[int]], Iterator[int]] | None:
    """From prompt ids to the original's greedy answer, an id at a time, end of turn included; None without a reference.

    Cost: a forward of one token each, with a KV cache of its own. No other forward of the model may run meanwhile, as
    its adapter is off in each.
    """
    forward = reference_forward(session.model, session.reference, vocabulary(session.model))
    if forward is None:
        return None
    ends, room = end_ids(session.model, session.tokenizer), most_positions(session.model)

    def answer(prompt_ids: list[int]) -> Iterator[int]:
        ids = list(prompt_ids)
        for _ in range(session.max_new_tokens):
            if room is not None and len(ids) >= room:
                return
            token = int(forward.row(ids).argmax())
            ids.append(token)
            yield token
            if token in ends:
                return

    return answer
