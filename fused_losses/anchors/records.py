"""Records of corrected answers: the format of a line, the classes that hold it, and what is refused.

A file of records is JSON Lines: UTF-8 without a byte order mark, one object a line, at most 16 MiB a line, each ended
by "\\n". One line is one answer of a model, corrected token by token:

    {"format": "fused_losses.anchors", "version": 1,
     "id": "5f0c...",                     1 to 64 letters, digits, - or _; each once in a file
     "messages": [{"role": "user", "content": "What is your name?"}],
                                          the conversation before the answer, earlier corrected answers included; []
                                          where the prompt was plain text
     "tools": [...],                      optional: what the chat template was given as tools
     "message_index": 1,                  where the answer belongs in messages, which is their number
     "prompt_ids": [1, 9690, ...],        what the model saw: the chat template of messages and tools, with the
                                          generation prompt
     "completion": {"token_ids": [...], "text": "My name is Aurora.<|im_end|>"},
                                          the corrected answer, with its end-of-turn token if it is finished; the text
                                          is what the tokenizer decodes the ids to, special tokens included, nothing
                                          cleaned up
     "anchors": [{                        the tokens that were put right; [] in a row that only retains
         "position": 3,                   in completion.token_ids, each once
         "span": [10, 17],                the token's characters in completion.text, [start, end), counted in Unicode
                                          code points; all of a character that the token is a part of
         "token_id": 40517,               that of completion.token_ids at the position
         "text": " Aurora",               that of completion.text in the span
         "original_token_id": 33013, "original_text": " Elena",              what the model had said there
         "probability": 0.0066, "original_probability": 0.93,                of both under the original model
         "confidence": 1.0,               in (0, 1]; or in its place "target_probability": 0.9, in (0, 1)
         "alternatives": [{"token_id": 260, "text": " the", "probability": 0.01}],      at the time of the correction
         "round": 1}],                    of correction, from 1 on
     "model": {"name": "...", "digest": "..."},           of the original; digests are 1 to 128 letters, digits, _ : -
     "tokenizer": {"name": "...", "digest": "..."},       digest: `tokenizer_digest`
     "created": "2026-11-26T09:00:00Z"}                   ISO 8601 with a time zone

Of an anchor, position, span, token_id, text and one of confidence and target_probability must be there; of a record all
but tools, model, tokenizer and created. A field that is not known is refused, but messages and tools may hold what they
like. Several corrected answers of one conversation are several records; of those with the same prompt_ids and the same
completion `train` and `check` take the last. Nothing predicts the first token of a row, so
an anchor at position 0 needs a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FORMAT, VERSION = "fused_losses.anchors", 1


@dataclass(frozen=True)
class Alternative:
    """A token that the original could have said in an anchor's place."""

    token_id: int
    text: str
    probability: float


@dataclass(frozen=True)
class Anchor:
    """A token that was put right. Fields as in the format above; None where a record has none."""

    position: int
    span: tuple[int, int]
    token_id: int
    text: str
    original_token_id: int | None = None
    original_text: str | None = None
    probability: float | None = None
    original_probability: float | None = None
    confidence: float | None = None
    target_probability: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    round: int = 1


@dataclass(frozen=True)
class Completion:
    """The corrected answer."""

    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Source:
    """A model or a tokenizer: its name, and the digest that tells it from others."""

    name: str
    digest: str


@dataclass(frozen=True)
class Record:
    """One answer of a model, and which of its tokens were corrected. Fields as in the format above.

    Nothing is checked here, but when a record is read or written, and by `new_record`.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    message_index: int
    prompt_ids: tuple[int, ...]
    completion: Completion
    anchors: tuple[Anchor, ...] = ()
    tools: tuple[Any, ...] | None = None
    model: Source | None = None
    tokenizer: Source | None = None
    created: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The object of the record's line: dicts, lists, strings and numbers."""
        found = {
            "format": FORMAT,
            "version": VERSION,
            "id": self.id,
            "messages": list(self.messages),
            "tools": None if self.tools is None else list(self.tools),
            "message_index": self.message_index,
            "prompt_ids": list(self.prompt_ids),
            "completion": {"token_ids": list(self.completion.token_ids), "text": self.completion.text},
            "anchors": [_anchor_to_json(anchor) for anchor in self.anchors],
            "model": None if self.model is None else vars(self.model).copy(),
            "tokenizer": None if self.tokenizer is None else vars(self.tokenizer).copy(),
            "created": self.created,
        }
        return {name: value for name, value in found.items() if value is not None}


def _anchor_to_json(anchor: Anchor) -> dict[str, Any]:
    found: dict[str, Any] = {name: value for name, value in vars(anchor).items() if value is not None}
    del found["alternatives"]
    found["span"] = list(anchor.span)
    if anchor.alternatives:
        found["alternatives"] = [vars(alternative).copy() for alternative in anchor.alternatives]
    return found
