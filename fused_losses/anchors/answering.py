"""How an answer grows: the model's tokens and the user's, and which of the latter are anchors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .forwards import Forward, most_positions, reference_forward
from .history import Edit, Mark, State
from .predictions import choose, kl_of, log_probabilities, predictions, predictions_of
from .prompts import check_ids, check_tokenizer, end_ids, ids_after
from .spans import text_after

ALTERNATIVES = 10  # of an anchor, kept in its record


class Answerer:
    """Appends tokens to a `State`, each with what the model said there; judges edits by the original.

    Args:
        reference: the original, as in `AnchorSession`.
    """

    def __init__(self, model: Any, tokenizer: Any, reference: Any) -> None:
        self.tokenizer = tokenizer
        self.forward = Forward(model)
        self.vocabulary = check_tokenizer(model, tokenizer)
        self.original = reference_forward(model, reference, self.vocabulary)
        self.ends = end_ids(model, tokenizer)
        self.most = most_positions(model)
        self.prompt_ids: list[int] = []

    def room(self, state: State) -> float:
        """How many more tokens the model's context has place for."""
        return math.inf if self.most is None else self.most - len(self.prompt_ids) - len(state.ids)

    def row(self, state: State) -> Tensor:
        """The model's logits [V] of what follows the answer."""
        return self.forward.row([*self.prompt_ids, *state.ids])

    def peek(self, state: State, at: int) -> Tensor:
        """Its logits [V] at a position within the answer; the KV cache stays."""
        return self.forward.peek([*self.prompt_ids, *state.ids[:at]])

    def proposal(self, state: State, temperature: float, top_p: float, seed: int) -> int:
        """What the model is about to say."""
        return choose(self.row(state), temperature, top_p, (seed, len(state.ids)))

    def put(self, state: State, token: int) -> None:
        state.predictions += predictions(self.row(state)[None], [token])
        state.ids.append(token)
        if token in self.ends:
            state.ended = "end of turn"

    def put_edit(self, state: State, edit: Edit) -> list[str]:
        """The edit's tokens at the end of the answer. Of those that are no anchors, why not."""
        reasons = []
        state.edits.append(edit)
        for token in edit.token_ids:
            row = self.row(state)
            self.put(state, token)
            reasons += self.judge(state, len(state.ids) - 1, edit, row)
        return reasons

    def judge(self, state: State, at: int, edit: Edit, row: Tensor | None = None) -> list[str]:
        """Marks the edit's token at `at` as an anchor; if it is none, says why. `row`: the model's logits, if known."""
        token, said = state.ids[at], state.predictions[at]
        if self.original is not None:
            row = self.original.row([*self.prompt_ids, *state.ids[:at]])
        elif row is None:
            row = self.peek(state, at)
        original = predictions(row[None], [token])[0]
        name = repr(text_after(self.tokenizer, state.ids[:at], token))
        if original.rank == 1:
            return [f"{name} is no anchor: the original ranks it first there (p = {original.probability:.2g})"]
        goal = edit.target_probability
        if goal is not None and original.probability >= goal:
            return [f"{name} is no anchor: the original gives it {original.probability:.2g}, and p* is {goal:g}"]
        proposal = edit.proposal if at == edit.position else said.ids[0]
        proposal = original.ids[0] if proposal == token else proposal
        state.marks[at] = Mark(
            proposal,
            original.probability,
            math.exp(float(log_probabilities(row)[proposal])),
            said.likeliest(ALTERNATIVES),
            edit.confidence,
            goal,
            edit.round,
        )
        return []

    def confirm(self, old: State, edits: Sequence[Edit]) -> tuple[State, list[str]]:
        """Edits to what stands there already. Of their tokens that are no anchors, why not."""
        new, reasons = old, []
        for edit in edits:
            new = new.without(edit.position, edit.stop)
            new.edits = sorted([*new.edits, edit], key=lambda each: each.position)
            reasons += [reason for at in range(edit.position, edit.stop) for reason in self.judge(new, at, edit)]
        return new, reasons

    def held(self, state: State) -> list[int]:
        """Positions of tokens that are no anchors, and that the original does not rank first."""
        said = state.predictions
        if self.original is not None:
            said = predictions_of(self.original, self.prompt_ids, state.ids)
        return [at for at, one in enumerate(said) if one.rank > 1 and at not in state.marks]

    def kl_to_original(self, state: State) -> list[float]:
        """As `AnchorSession.kl_to_original`."""
        if self.original is None:
            raise ValueError(
                "kl_to_original: the session's model is the original; give AnchorSession reference='base' for a "
                "model with an adapter, or the original itself"
            )
        if not state.ids:
            return []
        ids, start = [*self.prompt_ids, *state.ids[:-1]], len(self.prompt_ids)
        both = (forward.pieces(ids, start) for forward in (self.original, self.forward))
        return [kl for original, tuned in zip(*both, strict=True) for kl in kl_of(original, tuned)]

    def check_position(self, position: Any, state: State) -> None:
        most = len(state.ids) - (state.ended == "end of turn")
        if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position <= most:
            raise ValueError(
                f"position: expected 0 … {most} in an answer of {len(state.ids)} tokens, got {position!r}; the first "
                "token has position 0, and nothing follows an end of turn"
            )

    def replacement_ids(self, state: State, position: int, replacement: Any, exact: bool) -> list[int]:
        """The tokens of a replacement, as `AnchorSession.replace` takes it."""
        if isinstance(replacement, str):
            before = state.ids[:position]
            if not exact and replacement[:1].isalnum() and position < len(state.ids):
                replaced = text_after(self.tokenizer, before, state.ids[position])
                replacement = " " + replacement if replaced[:1] == " " else replacement
            replacement = ids_after(self.tokenizer, [*self.prompt_ids, *before], replacement, "replacement")
        listed = [replacement] if isinstance(replacement, int) else replacement
        ids = check_ids(listed, self.vocabulary, "replacement")
        if self.ends & set(ids[:-1]):
            raise ValueError("replacement: an end of turn can only be its last token; leave out what follows it")
        if position + len(ids) > len(state.ids) and self.room(state) < position + len(ids) - len(state.ids):
            raise ValueError(
                f"replacement: {len(ids)} tokens at position {position} do not fit into the model's context of "
                f"{self.most}; give fewer"
            )
        return ids
