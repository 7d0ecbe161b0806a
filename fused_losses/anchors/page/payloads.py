"""What the page and the terminal are told of tasks, tokens and answers, as JSON has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .tasks import SHOWN, Task


def count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def task(found: Task) -> dict[str, Any]:
    title = found.title
    return {"title": title[:SHOWN] + ("…" if len(title) > SHOWN else ""), "records": found.records}


def lost(texts: Sequence[str]) -> str:
    named = ", ".join(f"“{text.strip()}”" for text in texts[:3]) + (" and others" if len(texts) > 3 else "")
    return f"{count(len(texts), 'later correction')} found no place in the new continuation: {named}."


def held(tokens: Sequence[Any]) -> str:
    """Of tokens that a trained model says, and the original would not."""
    named = ", ".join(f"“{token.text.strip() or token.text}” (token {token.position})" for token in tokens[:3])
    more = f" and {len(tokens) - 3} more" if len(tokens) > 3 else ""
    them, are = ("it", "is") if len(tokens) == 1 else ("them", "are")
    return (
        f"{named}{more} {are} what the trained model says, and the original would not. Without a mark, training holds "
        f"{them} to the original; k marks {them} as right."
    )


def plain(session: Any, ids: Sequence[int]) -> str:
    """An answer as one reads it, without special tokens."""
    return session.tokenizer.decode(list(ids), skip_special_tokens=True)


def spelled(session: Any, token_id: int, text: str) -> dict[str, Any]:
    """Text, whether it is a special token, and the tokenizer's own name where the text is empty or not whole."""
    special = token_id in set(getattr(session.tokenizer, "all_special_ids", ()))
    found: dict[str, Any] = {"id": token_id, "text": text}
    if special:
        found["special"] = True
    if special or not text or "\ufffd" in text:
        found["name"] = str(session.tokenizer.convert_ids_to_tokens(token_id))
    return found


def token(session: Any, found: Any) -> dict[str, Any]:
    view = {
        "position": found.position,
        **spelled(session, found.token_id, found.text),
        "p": round(found.probability, 6),
        "entropy": round(found.entropy, 4),
        "rank": found.rank,
    }
    if found.replaced:
        view["replaced"] = True
    if found.anchor is not None:
        anchor = found.anchor
        view["anchor"] = {
            "was": anchor.original_text,
            "p": anchor.probability,
            "was_p": anchor.original_probability,
            "confidence": anchor.confidence,
            "target": anchor.target_probability,
            "round": anchor.round,
        }
    return view


def candidate(session: Any, found: Any) -> dict[str, Any]:
    return {**spelled(session, found.token_id, found.text), "p": round(found.probability, 6)}


def answer(session: Any, kl: Sequence[float] | None) -> dict[str, Any]:
    tokens = session.tokens
    found = [token(session, each) for each in tokens]
    for first, last in _shared(tokens):
        for at in range(first, last):
            found[at]["part"] = [at - first + 1, last - first]
    if kl is not None and len(kl) == len(found):
        for view, value in zip(found, kl, strict=True):
            view["kl"] = round(value, 5)
    return {
        "tokens": found,
        "finished": session.finished,
        "ended": session.ended,
        "can_undo": session.can_undo,
        "can_redo": session.can_redo,
    }


def _shared(tokens: Sequence[Any]) -> list[tuple[int, int]]:
    """Runs of tokens that have one character together, [first, last)."""
    runs, first = [], 0
    for at in range(1, len(tokens) + 1):
        span = tokens[first].span
        if at < len(tokens) and tokens[at].span == span and span[1] > span[0]:
            continue
        if at - first > 1:
            runs.append((first, at))
        first = at
    return runs
