"""Messages and an answer's text → token ids, as the chat template writes them.

`render` is the one place where a chat template is called: sessions, records, `train` and `check` all see the same ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .jsonl import Fault, printable, show
from .spans import KnownTokenizer, Spelling, common


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    options: Mapping[str, Any] | None = None,
    name: str = "messages",
) -> list[int]:
    """The chat template of these messages, up to where the answer begins.

    An empty list of tools is as none: templates differ in what they make of it.

    Args:
        options: for the template; {"add_generation_prompt": False} leaves out the beginning of an answer.
        name: of the messages, for errors.

    Raises:
        Fault: the tokenizer has no chat template, or its template refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        own = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
        raise Fault(
            f"{name}: the tokenizer {own} has no chat template to write them with; take that of an instruct model, or "
            "set tokenizer.chat_template"
        )
    chat = [dict(message) for message in messages]
    settings = {"add_generation_prompt": True, **(options or {})}
    try:
        found = tokenizer.apply_chat_template(
            chat, tools=list(tools) if tools else None, tokenize=True, return_dict=True, **settings
        )
    except Exception as error:  # a template is a program of its own
        reason = printable(" ".join(f"{type(error).__name__}: {error}".split())[:200])
        raise Fault(
            f"{name}: the tokenizer's chat template refuses them ({reason}); see which roles and fields it takes"
        ) from error
    ids = list(found["input_ids"])
    return list(ids[0]) if ids and isinstance(ids[0], list) else ids  # a processor answers with a batch of one


class Answer(NamedTuple):
    """An answer in its conversation, as tokens."""

    prompt_ids: list[int]
    token_ids: list[int]
    spelling: Spelling  # of token_ids
    start: int  # where the answer's text begins in that of token_ids


def prompt_ids(known: KnownTokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> list[int]:
    """What the model sees before it answers."""
    return render(known.tokenizer, messages, tools)


def whole_ids(known: KnownTokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> list[int]:
    """A conversation as it stands, without the beginning of another answer."""
    return render(known.tokenizer, messages, tools, {"add_generation_prompt": False})


def generation_prompt(
    known: KnownTokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
) -> list[int]:
    """The tokens that the template puts between messages and answer; none where it cannot be told."""
    without, whole = whole_ids(known, messages, tools), prompt_ids(known, messages, tools)
    return whole[len(without) :] if whole[: len(without)] == without else []


def tokenize_answer(
    known: KnownTokenizer,
    messages: Sequence[Mapping[str, Any]],
    text: str,
    tools: Sequence[Any] | None = None,
    finished: bool = True,
) -> Answer:
    """The answer's tokens, as the chat template of the conversation with it has them after the prompt.

    `finished`: with the end-of-turn token, up to which the template is followed; else nothing after the text.

    Where the template with the answer does not begin with the prompt, or changes the text, the text is tokenized by
    itself and eos_token put after it.

    Raises:
        Fault: the template refuses the messages; the tokenizer does not give the text back.
    """
    prompt = prompt_ids(known, messages, tools)
    answered = whole_ids(known, [*messages, {"role": "assistant", "content": text}], tools)
    if answered[: len(prompt)] == prompt:
        spelling = known.spell(answered[len(prompt) :])
        start = _place(known, prompt, messages, text, tools, spelling.text)
        if start is not None:
            ids = answered[len(prompt) :]
            stop = _stop(known, ids, spelling, start + len(text), finished)
            return Answer(prompt, ids[:stop], known.spell(ids[:stop]), start)
    ids = list(known.tokenizer(text, add_special_tokens=False)["input_ids"])
    end = known.tokenizer.eos_token_id
    if finished and end is not None:
        ids.append(end)
    spelling = known.spell(ids)
    start = spelling.text.find(text)
    if start < 0:
        at = common(text, spelling.text)
        raise Fault(
            f"content: expected text that the tokenizer gives back, got {show(text[at : at + 20])} at character {at}, "
            f"of which it makes {show(spelling.text[at : at + 20])}; write it as the tokenizer does"
        )
    return Answer(prompt, ids, spelling, start)


def _place(
    known: KnownTokenizer,
    prompt: list[int],
    messages: Sequence[Mapping[str, Any]],
    text: str,
    tools: Sequence[Any] | None,
    whole: str,
) -> int | None:
    """Where `text` stands in what the template makes of the answer: what is left without it is an empty answer's."""
    places = list(_occurrences(text, whole))
    if not places or places == [0]:
        return 0 if places else None
    try:
        empty = whole_ids(known, [*messages, {"role": "assistant", "content": ""}], tools)
    except Fault:
        return places[0]
    around = known.spell(empty[len(prompt) :]).text if empty[: len(prompt)] == prompt else None
    if around is None:
        return places[0]
    return max((at for at in places if whole[:at] + whole[at + len(text) :] == around), default=None)


def _occurrences(text: str, whole: str) -> Iterator[int]:
    at = whole.find(text)
    while at >= 0:
        yield at
        at = whole.find(text, at + 1)


def _stop(known: KnownTokenizer, ids: list[int], spelling: Spelling, end: int, finished: bool) -> int:
    """How many tokens belong to the answer: all up to the first special one after its text."""
    special = set(known.tokenizer.all_special_ids)
    inside = sum(start < end for start, _ in spelling.spans)
    if finished:
        for at in range(inside, len(ids)):
            if ids[at] in special:
                return at + 1
    return max(inside, 1) if end else inside
