"""What an `AnchorSession` hands out: tokens of an answer, candidates for a position, what a replacement did."""

from __future__ import annotations

from dataclasses import dataclass

from .records import Anchor


@dataclass(frozen=True)
class Token:
    """A token of the answer, and what the session's model said of it when it stood there."""

    position: int
    token_id: int
    text: str  # of the characters that it is a part of
    span: tuple[int, int]  # of these in the answer's text, half-open, in code points
    probability: float
    entropy: float  # of all V probabilities, in nats
    margin: float  # probability − that of the likeliest other token
    rank: int  # 1 where it is the likeliest
    replaced: bool = False  # by the user
    anchor: Anchor | None = None


@dataclass(frozen=True)
class Candidate:
    """A token that could stand at a position."""

    token_id: int
    text: str
    probability: float


@dataclass(frozen=True)
class Replacement:
    """What `replace` did."""

    position: int
    token_ids: tuple[int, ...]
    text: str
    anchors: tuple[Anchor, ...]
    changed: bool  # False where the answer and its anchors are as before
    message: str  # one sentence: which of the tokens are no anchors, and why


@dataclass(frozen=True)
class LaterEdit:
    """An edit that stood after the last replacement, and where it stands now."""

    old_position: int
    text: str
    position: int | None  # None: it has found no place
