"""lawftrack's records ↔ ours.

lawftrack (github.com/longern/lawftrack) keeps text and counts tokens in it, so a tokenizer is needed to read and to
write. Three layouts are read, as JSON Lines, as a JSON list of them, or as {"samples": [...]}:

    {"messages": [...], "completion_message_index": 1, "tools": [...], "anchors": [{"token_index": 3,
     "confidence": 0.999}]}                               to train on; the index is that of the last assistant message
                                                          where it is left out; "position" is another name
    {"prompt": [...], "completion": [...], "anchors": [...]}     as it exports them; also with text for both
    {"messages": [...], "edits": [{"message_index": 1, "token_index": 3, "original_token": " Elena",
     "replacement_token": " Aurora", "regenerated_from_token_index": 4, "created_at": 1760000000}]}
                                                          as its page keeps samples (in "anchors" too): a record of
                                                          every assistant message, without anchors if it has no edits

`token_index` counts the tokens of the answer, from 0 on, as the chat template has them after the generation prompt.
Where an assistant's content holds the template's own text around it, as in samples that its gateway has imported, that
is taken off, and the tokens counted with it. A replacement_token that is not the text found there is an error, so files
of another tokenizer or version do not go through; one of several tokens gives an anchor on each. Confidence is 0.999
where there is none, as in lawftrack.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

from .chat import Answer, generation_prompt, tokenize_answer
from .checked import check_known, check_messages, new_record
from .jsonl import Fault, as_path, line_of, open_regular, parse, read_lines, show, show_path
from .records import Record
from .spans import KnownTokenizer, Spelling, text_of, tokens_within
from .training_rows import confidence_of
from .writing import write_lines

CONFIDENCE = 0.999
MOST_BYTES = 1 << 28  # of a file that is one JSON value
NAMES = (
    "messages", "completion_message_index", "tools", "anchors", "edits", "prompt", "completion",
    "id", "object", "title", "dataset_id", "created_at", "updated_at",
)  # fmt: skip
OF_ANCHORS = (
    "token_index", "position", "confidence", "message_index", "original_token", "replacement_token",
    "regenerated_from_token_index", "created_at",
)  # fmt: skip


def read_lawftrack(path: str | os.PathLike, tokenizer: Any) -> list[Record]:
    """The records of a file of lawftrack's.

    Args:
        path: JSON Lines, or `.json`: one record, a list of them, or {"samples": [...]}.
        tokenizer: of the model whose answers were corrected, one of transformers, with a chat template.

    Raises:
        ValueError: `file:line: field: ...`, or `file: samples[3]: field: ...`, one line, of the first fault.
        OSError: the file cannot be opened or read.
    """
    path, known = as_path(path), KnownTokenizer(tokenizer)
    if path.suffix.lower() in (".yaml", ".yml"):
        raise ValueError(f"{show_path(path)}: expected JSON, got a name for YAML; export it from lawftrack as JSON")
    if path.suffix.lower() != ".json":
        return [record for found in read_lines(path, lambda value: _records(value, known)) for record in found]
    try:
        return _document(parse(_whole_file(path)), known)
    except Fault as fault:
        raise ValueError(f"{show_path(path)}: {fault}") from None


def _whole_file(path: Any) -> bytes:
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise Fault(f"expected a file of at most {MOST_BYTES >> 20} MiB, got a larger one; write it as JSON Lines")
    if not raw.strip():
        raise Fault("expected at least one record, got an empty file; give another file")
    return raw


def _document(value: Any, known: KnownTokenizer) -> list[Record]:
    samples = value.get("samples", [value]) if isinstance(value, dict) else value
    if not isinstance(samples, list) or not samples:
        raise Fault(f"samples: expected a list of records, got {show(samples)}; export the data set anew")
    found = []
    for index, sample in enumerate(samples):
        try:
            found += _records(sample, known)
        except Fault as fault:
            raise Fault(f"samples[{index}]: {fault}") from None
    return found


def _records(value: Any, known: KnownTokenizer) -> list[Record]:
    if not isinstance(value, dict):
        raise Fault(f"expected an object with messages or with prompt and completion, got {show(value)}")
    if "format" in value:
        raise Fault(f"format: expected a record of lawftrack's, got {show(value['format'])}; read it with read_records")
    for name in value:
        if name not in NAMES:
            raise Fault(f"record: expected fields of {', '.join(NAMES)}, got {show(name)}; this version of "
                        "lawftrack is not known, remove the field if it means nothing")  # fmt: skip
    tools = value.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise Fault(f"tools: expected a list, got {show(tools)}; leave tools out where there are none")
    name = "edits" if value.get("anchors") is None and value.get("edits") is not None else "anchors"
    given_anchors = [] if value.get(name) is None else value[name]
    anchors = [_anchor(item, f"anchors[{index}]") for index, item in enumerate(_list(given_anchors, name))]
    if value.get("messages") is None:
        return [_of_prompt(value, anchors, tools, known)]
    messages = list(check_messages(value["messages"]))
    given = value.get("completion_message_index")
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    kept = "edits" in value or "updated_at" in value  # a sample as its page keeps it
    if given is None and (anchors or kept) and all("message_index" in anchor for anchor in anchors):
        for index, anchor in enumerate(anchors):
            if anchor["message_index"] not in answers:
                raise Fault(
                    f"anchors[{index}].message_index: expected an assistant message, one of {answers}, got "
                    f"{anchor['message_index']}; correct it"
                )
        of_all = [index for index in answers if str(messages[index].get("content") or "").strip()]
        return [_of_message(messages, index, anchors, tools, known) for index in of_all]
    if given is None:
        if not answers:
            raise Fault("messages: expected an assistant message, got none; add the answer")
        given = answers[-1]
    if type(given) is not int or given not in answers:
        raise Fault(
            f"completion_message_index: expected that of an assistant message, one of {answers}, got {show(given)}; "
            "correct it"
        )
    return [_of_message(messages, given, anchors, tools, known)]


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise Fault(f"{field}: expected a list, got {show(value)}; give [] where there are none")
    return value


def _anchor(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Fault(f"{field}: expected an object with token_index, got {show(value)}; correct it")
    for name in value:
        if name not in OF_ANCHORS:
            raise Fault(f"{field}: expected fields of {', '.join(OF_ANCHORS)}, got {show(name)}; remove it")
    found = {name: item for name, item in value.items() if item is not None}
    index = found.pop("position", None) if "token_index" not in found else found.pop("token_index")
    for name, number in (("token_index", index), ("message_index", found.get("message_index", 0))):
        if type(number) is not int or number < 0:
            raise Fault(f"{field}.{name}: expected a whole number ≥ 0, got {show(number)}; correct it")
    for name in ("original_token", "replacement_token"):
        if not isinstance(found.get(name, ""), str):
            raise Fault(f"{field}.{name}: expected text, got {show(found[name])}; correct it")
    confidence = found.get("confidence", CONFIDENCE)
    if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0 < confidence <= 1:
        raise Fault(f"{field}.confidence: expected a number in (0, 1], got {show(confidence)}; correct it")
    return {**found, "token_index": index, "confidence": float(confidence)}


def _of_prompt(value: dict[str, Any], anchors: list[dict[str, Any]], tools: Any, known: KnownTokenizer) -> Record:
    prompt, completion = value.get("prompt"), value.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list) and len(completion) == 1:
        messages = [*check_messages(prompt), *check_messages(completion)]
        return _of_message(messages, len(prompt), [{**a, "message_index": len(prompt)} for a in anchors], tools, known)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise Fault(
            "prompt: expected text for prompt and completion, or a list of messages and a list of one, got "
            f"{show(prompt)} and {show(completion)}; or give messages"
        )
    before = list(known.tokenizer(prompt)["input_ids"])
    whole = list(known.tokenizer(prompt + completion)["input_ids"])
    if whole[: len(before)] != before or len(whole) == len(before):
        raise Fault(
            f"completion: expected text that leaves the prompt's tokens as they are, got {show(completion)}; move what "
            "belongs together to one side"
        )
    ids = whole[len(before) :]
    answer = Answer(before, ids, known.spell(ids), 0)
    return _record([], answer, anchors, 0, None, known)


def _of_message(
    messages: list[dict[str, Any]], index: int, anchors: list[dict[str, Any]], tools: Any, known: KnownTokenizer
) -> Record:
    begins = known.spell(generation_prompt(known, messages[:index], tools)).text
    content = messages[index].get("content")
    if not isinstance(content, str):
        raise Fault(f"messages[{index}].content: expected text, got {show(content)}; only text can be corrected here")
    offset = 0
    before = messages[:index]
    if begins and content.startswith(begins):
        offset = len(known.tokenizer(begins, add_special_tokens=False)["input_ids"])
        content = _without_template(content, begins, known)
        before = [_plain(message, begins, known) for message in before]
    answer = tokenize_answer(known, before, content, tools)
    own = [(k, anchor) for k, anchor in enumerate(anchors) if anchor.get("message_index", index) == index]
    return _record(before, answer, [a for _, a in own], offset, tools, known, [k for k, _ in own])


def _plain(message: dict[str, Any], begins: str, known: KnownTokenizer) -> dict[str, Any]:
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, str) or not content.startswith(begins):
        return message
    return {**message, "content": _without_template(content, begins, known)}


def _without_template(content: str, begins: str, known: KnownTokenizer) -> str:
    """What stands between the generation prompt and the first special token after it."""
    rest = content[len(begins) :]
    ends = [at for token in known.tokenizer.all_special_tokens if (at := rest.find(token)) >= 0]
    return rest[: min(ends)] if ends else rest


def _record(
    messages: list[dict[str, Any]],
    answer: Answer,
    anchors: list[dict[str, Any]],
    offset: int,
    tools: Any,
    known: KnownTokenizer,
    numbers: list[int] | None = None,
) -> Record:
    """`offset`: tokens of the template that token_index counts too. `numbers`: of the anchors in the file."""
    found: dict[int, dict[str, Any]] = {}
    for number, anchor in zip(numbers or range(len(anchors)), anchors, strict=True):
        field = f"anchors[{number}]"
        position = anchor["token_index"] - offset
        if not 0 <= position < len(answer.token_ids):
            raise Fault(
                f"{field}.token_index: expected {offset} ≤ token_index < {offset + len(answer.token_ids)}, the "
                f"tokens of the answer, got {anchor['token_index']}; was it made with another tokenizer or version of "
                "lawftrack?"
            )
        count = _tokens_of(anchor, field, position, answer.spelling)
        for at in range(position, position + count):
            if at in found:
                raise Fault(
                    f"{field}.token_index: expected each token once, got {anchor['token_index']} again; remove it"
                )
            original = {"original_text": anchor.get("original_token")} if at == position else {}
            found[at] = {"position": at, "confidence": anchor["confidence"], **original}
    return new_record(
        known,
        messages=messages,
        prompt_ids=answer.prompt_ids,
        token_ids=answer.token_ids,
        anchors=[found[at] for at in sorted(found)],
        tools=tools,
    )


def _tokens_of(anchor: Mapping[str, Any], field: str, position: int, spelling: Spelling) -> int:
    """How many tokens the replacement has, whose text is held against the answer's."""
    wanted = anchor.get("replacement_token")
    if not wanted:
        return 1
    start = spelling.spans[position][0]
    for count in range(1, len(spelling.spans) - position + 1):
        text = spelling.text[start : spelling.spans[position + count - 1][1]]
        # A token that begins a text may have lost its space in it.
        if text in (wanted, wanted.lstrip(" ")):
            return max(count, 1 + max(tokens_within(spelling.spans[position:], start, start + len(text)), default=0))
        if len(text) >= len(wanted):
            break
    got = spelling.text[slice(*spelling.spans[position])]
    raise Fault(
        f"{field}.replacement_token: expected {show(got)}, the text of token {anchor['token_index']}, got "
        f"{show(wanted)}; was it made with another tokenizer or version of lawftrack?"
    )


def write_lawftrack(path: str | os.PathLike, records: Iterable[Record], tokenizer: Any) -> None:
    """lawftrack's training records, one a line, which its page imports as samples with edits too.

    What it has no field for is left out: ids, probabilities, alternatives, rounds, digests. A target probability
    becomes the confidence that asks for it, (p* − r) / (1 − r), with the recorded probability r.

    Args:
        path: in whose place the file is put, under a temporary name first.
        records: of chats.
        tokenizer: of the model whose answers were corrected.

    Raises:
        ValueError: a record of another tokenizer; one that lawftrack, which tokenizes the text anew, would get other
            tokens of, so that token_index meant others; a target probability without the recorded one.
    """
    known = KnownTokenizer(tokenizer)
    write_lines(path, (line_of(_exported(record, index, known)) for index, record in enumerate(records)))


def _exported(record: Record, number: int, known: KnownTokenizer) -> dict[str, Any]:
    try:
        check_known(record, known)
        ids = list(record.completion.token_ids)
        special = set(known.tokenizer.all_special_ids)
        finished = ids[-1] in special
        content = text_of(known.tokenizer, ids[:-1] if finished else ids)
        answer = tokenize_answer(known, record.messages, content, record.tools, finished)
        if answer.token_ids != ids or answer.prompt_ids != list(record.prompt_ids):
            raise Fault(
                "completion.token_ids: expected what the chat template and the tokenizer make of the text, as "
                f"lawftrack tokenizes it anew, got others for {show(content)}; such an answer cannot be written for it"
            )
        created = record.created and datetime.fromisoformat(record.created.replace("Z", "+00:00"))
        at = int((created or datetime.now(timezone.utc)).timestamp())
        anchors = []
        for index, anchor in enumerate(record.anchors):
            confidence = confidence_of(anchor, index)
            if confidence <= 0:
                continue  # the original says it as often as it shall
            anchors.append(
                {
                    "token_index": anchor.position,
                    "confidence": confidence,
                    "message_index": record.message_index,
                    "original_token": anchor.original_text,
                    "replacement_token": anchor.text,
                    "regenerated_from_token_index": anchor.position + 1,
                    "created_at": at,
                }
            )
    except Fault as fault:
        raise Fault(f"records[{number}]: {fault}") from None
    found = {
        "messages": [*record.messages, {"role": "assistant", "content": content}],
        "completion_message_index": record.message_index,
        "anchors": anchors,
    }
    return found if record.tools is None else {**found, "tools": list(record.tools)}
