"""Token ids → text, and the characters of each token: also where a token is only a part of a character.

The text of some ids is what the tokenizer decodes them to, special tokens included, nothing cleaned up. A token's span
[start, end) counts Unicode code points of that text, as Python does, and has every character that the token is a part
of: where 😀 is split into three tokens, all three have the span of 😀. A token that adds nothing to the text has an
empty span. So starts and ends never fall from token to token, and the spans cover the text. Around a U+FFFD that is in
the text itself, or stands for bytes that are no character, a span can be a character too long or too short.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Span = tuple[int, int]

UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
CONTEXT = 8  # tokens before one whose text depends on them: more than any character has bytes


class Spelling(NamedTuple):
    """Token ids as text, and each token's characters in it."""

    text: str
    spans: list[Span]


def tokenizer_of(tokenizer: Any) -> Any:
    """The tokenizer itself, also of a processor."""
    found = getattr(tokenizer, "tokenizer", tokenizer)
    if not all(callable(getattr(found, name, None)) for name in ("decode", "get_vocab")):
        raise TypeError(f"tokenizer: expected one of transformers, got {type(tokenizer).__name__}")
    return found


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""


def sharing(spans: Sequence[Span], position: int) -> list[int]:
    """The token at `position`, and those beside it that have a part of a character of its; none where it is none."""
    if not 0 <= position < len(spans):
        return []
    start, stop = spans[position]
    return [at for at, span in enumerate(spans) if at == position or (span[0] < stop and start < span[1])]


def spell(tokenizer: Any, ids: Sequence[int]) -> Spelling:
    """The text of `ids` and the span of each token.

    Prefixes are decoded, since what a token reads as can depend on those before it (a space at the start, a character
    in several tokens). Each prefix begins at a token a little before, which is checked against the whole text; where
    that fails, at the first token.

    Cost: a decoding of a few tokens for each; of all before it where a decoder needs that.
    """
    tokenizer, ids = tokenizer_of(tokenizer), list(ids)
    text = text_of(tokenizer, ids)
    spans = _spans(tokenizer, ids, text, windows=True)
    if spans is None:
        spans = _spans(tokenizer, ids, text, windows=False)
    return Spelling(text, spans)


def _spans(tokenizer: Any, ids: list[int], text: str, windows: bool) -> list[Span] | None:
    """None: windows do not add up to the text.

    ids[first:known] read as text[begin:done], whatever follows. `seen` is what was decoded at the token before, from
    `begin` on; `unfinished` the character that it had begun, if any.
    """
    spans: list[Span] = []
    first = known = begin = done = 0
    seen, unfinished = "", -1
    last = (0, 0)
    for at in range(len(ids)):
        now = text_of(tokenizer, ids[first : at + 1])
        rest = text[begin : begin + len(now)]
        whole = rest == now
        agreed = max(common(now, rest), done - begin)
        if unfinished >= 0:
            start = unfinished
        else:  # bytes of a U+FFFD that the text itself has add nothing after the first
            start = last[1] - (now == seen and now.endswith(UNFINISHED))
        unfinished = -1 if whole else begin + agreed
        end = begin + agreed + (not whole) if at < len(ids) - 1 else len(text)
        end = min(max(end, last[1]), len(text))
        last = (min(max(start, last[0]), end), end)
        spans.append(last)
        seen = now
        if windows and whole and not now.endswith(UNFINISHED):
            first, known, begin, done = known, at + 1, done, begin + len(now)
            seen = text_of(tokenizer, ids[first:known])
            if seen != text[begin:done]:
                # Alone, the window reads otherwise, as where a decoder drops the space before a first word.
                if not text[begin:done].endswith(seen):
                    return None
                begin = done - len(seen)
    return spans if not windows or not text[done:].strip(UNFINISHED) else None


def common(one: str, other: str) -> int:
    """The length of the common prefix."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(at for at in range(shorter) if one[at] != other[at])


def text_after(tokenizer: Any, before: Sequence[int], token: int) -> str:
    """What `token` reads as after the ids `before`: the characters that it is a part of."""
    text, spans = "", [(0, 0)]
    for start in (max(0, len(before) - CONTEXT), 0):
        text, spans = spell(tokenizer, [*before[start:], token])
        if not text.startswith(UNFINISHED):  # in the middle of a character
            break
    return text[slice(*spans[-1])]


def tokens_within(spans: Sequence[Span], start: int, end: int) -> list[int]:
    """The positions of all tokens that have a character of [start, end), those that reach beyond it included."""
    return [at for at, (first, last) in enumerate(spans) if first < end and last > start]


def tokenizer_digest(tokenizer: Any) -> str:
    """64 hex digits that say which text each id stands for: blake2b over all tokens and their ids, added ones included.

    A chat template is not in it, nor how text is cut into tokens, nor which token pads: records hold the ids
    themselves. So a tokenizer has the same digest wherever it was loaded from, and whatever the version of the library.
    A token that is added to it makes another of it.

    Cost: one pass over the vocabulary.
    """
    return KnownTokenizer(tokenizer).digest


@dataclass
class KnownTokenizer:
    """A tokenizer, its digest and its ids, found out once for many records."""

    tokenizer: Any
    digest: str = field(init=False)
    size: int = field(init=False)  # its ids are below this

    def __post_init__(self) -> None:
        self.tokenizer = tokenizer_of(self.tokenizer)
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
        self.digest = hashlib.blake2b(json.dumps(vocabulary).encode(), digest_size=32).hexdigest()
        self.size = 1 + max((token for _, token in vocabulary), default=-1)

    @property
    def name(self) -> str:
        return str(getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__)

    def spell(self, ids: Sequence[int]) -> Spelling:
        return spell(self.tokenizer, ids)
