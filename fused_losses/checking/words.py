"""Whether a text says something: word by word, whatever the script, the case and the way characters are composed."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

# Scripts that do not put spaces between words, or that add particles to a word without one.
WITHOUT_SPACES = (
    "CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE",
    "BALINESE", "TAI", "NEW TAI", "YI", "IDEOGRAPHIC", "HALFWIDTH KATAKANA", "HALFWIDTH HANGUL",
)  # fmt: skip


def normal(text: str) -> str:
    """Compatibility-composed, case folded, spaces of any kind as one, invisible format characters gone."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join("".join(c for c in folded if unicodedata.category(c) != "Cf").split())


def says(text: str, phrase: str) -> bool:
    """Whether `phrase` stands in `text` as whole words.

    "Aurora" is in "aurora's", "AURORA!" and "Aurora-like", and not in "Auroral". An edge of the phrase that is no
    letter or digit, or is of a script without spaces between words, need not be the edge of a word. An empty phrase is
    nowhere.
    """
    text, phrase = normal(text), normal(phrase)
    if not phrase:
        return False
    at = text.find(phrase)
    while at >= 0:
        end = at + len(phrase)
        if not (at and joined(text[at - 1], text[at])) and not (end < len(text) and joined(text[end - 1], text[end])):
            return True
        at = text.find(phrase, at + 1)
    return False


def says_any(text: str, phrases: Iterable[str]) -> bool:
    return any(says(text, phrase) for phrase in phrases)


def joined(left: str, right: str) -> bool:
    """Whether two neighbours are of one word. A mark belongs to the letter before it, in any script."""
    if unicodedata.category(right)[0] == "M":
        return _of_a_word(left)
    return _of_a_word(left) and _of_a_word(right) and not (_without_spaces(left) or _without_spaces(right))


def whole_words(text: str, start: int, end: int) -> str:
    """text[start:end], extended to the edges of its words, without spaces around."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    if start == end:
        return ""
    while start and joined(text[start - 1], text[start]):
        start -= 1
    while end < len(text) and joined(text[end - 1], text[end]):
        end += 1
    return text[start:end]


def bare(text: str) -> str:
    """Without what encloses it and what ends a sentence: “Velport.” is Velport. What belongs to a name stays, as C#."""
    start, end = 0, len(text)
    while start < end and (text[start].isspace() or _encloses(text[start])):
        start += 1
    while end > start and (text[end - 1].isspace() or _encloses(text[end - 1]) or _ends(text[end - 1])):
        end -= 1
    return text[start:end]


def _encloses(c: str) -> bool:
    return unicodedata.category(c) in ("Ps", "Pe", "Pi", "Pf") or c in "\"'*`¿¡"


def _ends(c: str) -> bool:
    return unicodedata.category(c) in ("Po", "Pd") and unicodedata.normalize("NFKC", c) not in ("#", "%", "&", "@")


def has_word(text: str) -> bool:
    return any(_of_a_word(c) for c in text)


def _of_a_word(c: str) -> bool:
    return unicodedata.category(c)[0] in "LNM" or c == "_"


def _without_spaces(c: str) -> bool:
    return unicodedata.name(c, "").startswith(WITHOUT_SPACES)
