"""The states that an answer under correction goes through, and which later edits hold in a new continuation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .predictions import Prediction


@dataclass(frozen=True)
class Edit:
    """Tokens put in the place of what the model would have said."""

    position: int
    token_ids: tuple[int, ...]
    proposal: int  # what stood at `position`, or the model would have said there
    confidence: float | None  # exactly one of these two is not None
    target_probability: float | None
    round: int

    @property
    def stop(self) -> int:
        return self.position + len(self.token_ids)


@dataclass(frozen=True)
class Mark:
    """What makes a token an anchor; None where a record that was read does not say it."""

    original_token_id: int | None  # what stood there, or the model would have said
    probability: float | None  # of the token under the original model
    original_probability: float | None  # of original_token_id
    alternatives: tuple[tuple[int, float], ...]  # ids and probabilities, the likeliest first
    confidence: float | None
    target_probability: float | None
    round: int


@dataclass
class Later:
    """An edit of the old continuation that waits for its place in the new one.

    Its place is where the new continuation has the same `context`, the tokens right before it, and the model is about
    to say its proposal, or its replacement. Where that happened several times in the old one, it is as many times in
    the new one (`ordinal`). An edit so near the replacement before it that the context would reach over that
    has an `offset`: its place is as many tokens after the replacement as in the old one.
    """

    edit: Edit
    context: tuple[int, ...]
    offset: int | None
    ordinal: int = 1
    met: int = 0
    position: int | None = None  # where it was kept

    def agrees(self, ids: Sequence[int], end: int, proposal: int) -> bool:
        """`ids` until now, where the new continuation began at `end`, and what the model is about to say."""
        length = len(self.context)
        if len(ids) < length or (self.offset is not None and len(ids) - end != self.offset):
            return False
        said = proposal in (self.edit.proposal, self.edit.token_ids[0])
        return said and tuple(ids[len(ids) - length :]) == self.context


@dataclass
class State:
    """An answer as it stands: its tokens, what the model said of each, the edits, and what ended it."""

    ids: list[int] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    marks: dict[int, Mark] = field(default_factory=dict)
    end: int = 0  # where the continuation after the last replacement begins
    later: list[Later] = field(default_factory=list)
    passed: int = 0  # edits of `later` that have found their place, or lie before one that has
    ended: str | None = None

    def copy(self) -> State:
        return State(
            list(self.ids), list(self.predictions), list(self.edits), dict(self.marks), self.end,
            [dataclasses.replace(later) for later in self.later], self.passed, self.ended,
        )  # fmt: skip

    def until(self, position: int) -> State:
        """What stands before `position`; of an edit that reaches over it, its first tokens."""
        edits = [
            dataclasses.replace(edit, token_ids=edit.token_ids[: position - edit.position])
            for edit in self.edits
            if edit.position < position
        ]
        marks = {at: mark for at, mark in self.marks.items() if at < position}
        return State(self.ids[:position], self.predictions[:position], edits, marks, position)

    def without(self, start: int, stop: int) -> State:
        """The same tokens, where those in [start, stop) are no edits and no anchors."""
        new = self.copy()
        new.marks = {at: mark for at, mark in self.marks.items() if not start <= at < stop}
        new.edits = []
        for edit in self.edits:
            head = edit.token_ids[: max(0, start - edit.position)]
            rest = edit.token_ids[max(0, stop - edit.position) :]
            if head:
                new.edits.append(dataclasses.replace(edit, token_ids=head))
            if rest and head != edit.token_ids:
                at = edit.stop - len(rest)
                proposal = edit.proposal if at == edit.position else self.predictions[at].ids[0]
                new.edits.append(dataclasses.replace(edit, position=at, token_ids=rest, proposal=proposal))
        return new

    def edited(self, position: int) -> bool:
        return any(edit.position <= position < edit.stop for edit in self.edits)

    def proposal(self, position: int) -> int | None:
        """What the model said there before the user did; None after the answer."""
        for edit in self.edits:
            if edit.position == position:
                return edit.proposal
            if edit.position < position < edit.stop:
                return self.predictions[position].ids[0]
        return self.ids[position] if position < len(self.ids) else None

    def doubtful(self, share: float, least: float) -> list[int]:
        """As `AnchorSession.suspicious` takes them."""
        doubts = {at: said.doubt for at, said in enumerate(self.predictions) if not self.edited(at)}
        count = math.ceil(share * len(self.ids))
        return [at for at in sorted(doubts, key=lambda at: -doubts[at])[:count] if doubts[at] >= least]

    def next_edit(self, proposal: int) -> Edit | None:
        """The later edit whose place this is, now that the model is about to say `proposal`; it is passed then."""
        found = None
        for k, later in enumerate(self.later):
            if later.position is not None or not later.agrees(self.ids, self.end, proposal):
                continue
            later.met += 1
            if found is None and k >= self.passed and later.met == later.ordinal:
                found = k
        if found is None:
            return None
        self.passed = found + 1
        later = self.later[found]
        later.position = len(self.ids)
        return dataclasses.replace(later.edit, position=len(self.ids), proposal=proposal)


def later_edits(old: State, start: int, count: int) -> list[Later]:
    """The edits of `old` at `start` and after, which may hold when the answer goes on differently before `start`.

    `count`: tokens of context. Those of an earlier continuation that still wait for their place in `old` wait on,
    unless they had an offset.
    """
    waiting = []
    for edit in old.edits:
        if edit.position < start:
            continue
        if edit.position - start < count:
            waiting.append(Later(edit, tuple(old.ids[start : edit.position]), edit.position - start))
            continue
        context = tuple(old.ids[edit.position - count : edit.position])
        ordinal = sum(
            tuple(old.ids[at - count : at]) == context and _would_be(old, at) in (edit.proposal, edit.token_ids[0])
            for at in range(start + count, edit.position)
        )
        waiting.append(Later(edit, context, None, ordinal + 1))
    for later in old.later[old.passed :]:
        if later.offset is None and later.position is None and old.ended != "end of turn":
            left = max(1, later.ordinal - later.met)
            waiting.append(dataclasses.replace(later, ordinal=left, met=0))
    return waiting


def _would_be(state: State, position: int) -> int | None:
    """What the model was about to say there; None inside an edit."""
    for edit in state.edits:
        if edit.position <= position < edit.stop:
            return edit.proposal if position == edit.position else None
    return state.ids[position]
