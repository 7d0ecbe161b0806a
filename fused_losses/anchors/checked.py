"""From the object of a line to a `Record`, with every field checked; records.py has the format."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from .jsonl import Fault, check_text, listed, show, show_path
from .records import FORMAT, VERSION, Alternative, Anchor, Completion, Record, Source
from .spans import KnownTokenizer, Spelling, common

MOST_ID = 2**31  # no vocabulary is larger
NAME = re.compile(r"[0-9A-Za-z_-]{1,64}")
DIGEST = re.compile(r"[0-9A-Za-z_:-]{1,128}")
REQUIRED = ("format", "version", "id", "messages", "message_index", "prompt_ids", "completion", "anchors")
OPTIONAL = ("tools", "model", "tokenizer", "created")
OF_ANCHORS = ("position", "span", "token_id", "text")
STRENGTHS = ("confidence", "target_probability")
MORE_OF_ANCHORS = ("original_token_id", "original_text", "probability", "original_probability", "alternatives", "round")


def new_record(
    tokenizer: Any,
    *,
    messages: Sequence[Mapping[str, Any]],
    prompt_ids: Iterable[int],
    token_ids: Iterable[int],
    anchors: Iterable[Mapping[str, Any]] = (),
    tools: Sequence[Any] | None = None,
    model: Source | None = None,
) -> Record:
    """A checked record with an id of its own and the time, whose texts and spans are found out.

    Args:
        tokenizer: one of transformers.
        messages, tools: the conversation before the answer.
        prompt_ids, token_ids: what the model saw, and the corrected answer, with its end-of-turn token.
        anchors: mappings with `position`, and whatever else an `Anchor` has but span, token_id and text; confidence 1
            where there is neither confidence nor target_probability.
        model: of the original.

    Raises:
        TypeError, ValueError: `field: expected ..., got ...; remedy`.
    """
    known = tokenizer if isinstance(tokenizer, KnownTokenizer) else KnownTokenizer(tokenizer)
    answer = [int(token) for token in token_ids]
    _check_ids(answer, "token_ids", known)
    spelling = known.spell(answer)
    found = []
    for index, anchor in enumerate(anchors):
        if not isinstance(anchor, Mapping):
            raise TypeError(f"anchors[{index}]: expected a mapping with position, got {show(anchor)}")
        position = _whole(anchor.get("position"), f"anchors[{index}].position", 0, len(answer))
        start, end = spelling.spans[position]
        strength = {} if any(anchor.get(name) is not None for name in STRENGTHS) else {"confidence": 1.0}
        own = {"span": [start, end], "token_id": answer[position], "text": spelling.text[start:end]}
        found.append({**{name: value for name, value in anchor.items() if value is not None}, **strength, **own})
    value = {
        "format": FORMAT, "version": VERSION, "id": uuid.uuid4().hex, "messages": [dict(m) for m in messages],
        "message_index": len(messages), "prompt_ids": [int(token) for token in prompt_ids],
        "completion": {"token_ids": answer, "text": spelling.text}, "anchors": found,
        "tokenizer": {"name": known.name, "digest": known.digest},
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }  # fmt: skip
    value |= {} if tools is None else {"tools": list(tools)}
    value |= {} if model is None else {"model": vars(model).copy()}
    return record_from(value, known, spelling)


def record_from(value: Any, known: KnownTokenizer | None = None, spelling: Spelling | None = None) -> Record:
    """The record of a line's object, checked.

    Args:
        value: what JSON makes of the line.
        known: then its digest must be the record's, if that has one, all ids must be its own, and texts and spans what
            it makes of the ids.
        spelling: of the completion, where that is known already.

    Raises:
        Fault: `field: expected ..., got ...; remedy`.
    """
    if not isinstance(value, dict):
        raise Fault(f"expected an object with {listed(REQUIRED)}, got {show(value)}; write one record a line")
    _check_version(value)
    _check_names(value, "record", REQUIRED, OPTIONAL)
    if not isinstance(value["id"], str) or not NAME.fullmatch(value["id"]):
        raise Fault(f"id: expected 1 to 64 letters, digits, - or _, got {show(value['id'])}; give uuid.uuid4().hex")
    messages = check_messages(value["messages"])
    if type(value["message_index"]) is not int or value["message_index"] != len(messages):
        raise Fault(
            f"message_index: expected {len(messages)}, the number of messages before the answer, got "
            f"{show(value['message_index'])}; end messages where the answer begins"
        )
    tools = value.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise Fault(f"tools: expected a list, got {show(tools)}; leave tools out where there are none")
    tokenizer = _source(value.get("tokenizer"), "tokenizer")
    if known is not None:
        _check_digest(tokenizer, known)
    prompt = _ids(value["prompt_ids"], "prompt_ids", known)
    completion, spelling = _completion(value["completion"], known, spelling)
    return Record(
        id=value["id"],
        messages=messages,
        message_index=len(messages),
        prompt_ids=prompt,
        completion=completion,
        anchors=_anchors(value["anchors"], completion, known, spelling, bool(prompt)),
        tools=None if tools is None else tuple(tools),
        model=_source(value.get("model"), "model"),
        tokenizer=tokenizer,
        created=_created(value.get("created")),
    )


def check_known(record: Record, known: KnownTokenizer) -> None:
    """Raises Fault where a record is of another tokenizer, as far as digest and ids tell."""
    _check_digest(record.tokenizer, known)
    _check_ids(record.prompt_ids, "prompt_ids", known)
    _check_ids(record.completion.token_ids, "completion.token_ids", known)


def _check_digest(tokenizer: Source | None, known: KnownTokenizer) -> None:
    if tokenizer is not None and tokenizer.digest != known.digest:
        raise Fault(
            f"tokenizer.digest: expected {known.digest[:12]}..., that of the tokenizer {show_path(known.name)}, got "
            f"{tokenizer.digest[:12]}... of {show_path(tokenizer.name)}; take the tokenizer the record was made with, "
            "or annotate anew"
        )


def _check_version(value: dict[str, Any]) -> None:
    if value.get("format") != FORMAT:
        got = f"got {show(value['format'])}" if "format" in value else "there is none"
        remedy = "read files of lawftrack with read_lawftrack, and text with marked spans with read_marked"
        raise Fault(f"format: expected {FORMAT!r}, {got}; {remedy}")
    if type(value.get("version")) is not int or value["version"] != VERSION:
        raise Fault(f"version: expected {VERSION}, got {show(value.get('version'))}; update fused_losses")


def _check_names(
    value: Mapping[str, Any], field: str, required: Sequence[str], optional: Sequence[str], among: str = ""
) -> None:
    for name in required:
        if value.get(name) is None:
            raise Fault(f"{among}{name}: expected a value, but the {field} has none; add it")
    for name in value:
        if name not in required and name not in optional:
            raise Fault(f"{field}: expected fields of {listed([*required, *optional])}, got {show(name)}; remove it")


def check_messages(value: Any) -> tuple[dict[str, Any], ...]:
    remedy = 'give messages such as {"role": "user", "content": "..."}'
    if not isinstance(value, list):
        raise Fault(f"messages: expected a list, got {show(value)}; {remedy}")
    for index, message in enumerate(value):
        field = f"messages[{index}]"
        if not isinstance(message, dict):
            raise Fault(f"{field}: expected an object, got {show(message)}; {remedy}")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise Fault(f"{field}.role: expected a name such as user or assistant, got {show(role)}; {remedy}")
        if not isinstance(content, (str, list)) and not (content is None and message.get("tool_calls")):
            raise Fault(
                f"{field}.content: expected text, a list of parts, or tool_calls, got {show(content)}; {remedy}"
            )
    return tuple(value)


def _source(value: Any, field: str) -> Source | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise Fault(f"{field}: expected an object with name and digest, got {show(value)}; leave it out if unknown")
    _check_names(value, field, ("name", "digest"), (), f"{field}.")
    if not isinstance(value["name"], str):
        raise Fault(f"{field}.name: expected text, got {show(value['name'])}; give the name it was loaded by")
    if not isinstance(value["digest"], str) or not DIGEST.fullmatch(value["digest"]):
        raise Fault(
            f"{field}.digest: expected 1 to 128 letters, digits, _, : or -, got {show(value['digest'])}; leave "
            f"{field} out if unknown"
        )
    return Source(value["name"], value["digest"])


def _created(value: Any) -> str | None:
    if value is None:
        return None
    try:
        if datetime.fromisoformat(re.sub("Z$", "+00:00", value)).tzinfo is None:
            raise ValueError
    except (TypeError, ValueError):
        raise Fault(
            f"created: expected a time such as 2026-11-26T09:00:00Z, got {show(value)}; leave it out if unknown"
        ) from None
    return value


def _ids(value: Any, field: str, known: KnownTokenizer | None) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise Fault(f"{field}: expected a list of token ids, got {show(value)}; give integers")
    _check_ids(value, field, known)
    return tuple(value)


def _check_ids(ids: Sequence[Any], field: str, known: KnownTokenizer | None) -> None:
    size = MOST_ID if known is None else known.size
    for at, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < size:
            whose = "" if known is None else ", the ids of the tokenizer"
            remedy = "give integers" if known is None else "take the tokenizer the record was made with"
            raise Fault(f"{field}[{at}]: expected 0 ≤ id < {size}{whose}, got {show(token)}; {remedy}")


def _completion(
    value: Any, known: KnownTokenizer | None, spelling: Spelling | None
) -> tuple[Completion, Spelling | None]:
    if not isinstance(value, dict):
        raise Fault(f"completion: expected an object with token_ids and text, got {show(value)}; give both")
    _check_names(value, "completion", ("token_ids", "text"), (), "completion.")
    ids, text = _ids(value["token_ids"], "completion.token_ids", known), value["text"]
    if not ids:
        raise Fault("completion.token_ids: expected at least one id, got none; leave the record out")
    _check_text(text, "completion.text")
    if known is not None:
        spelling = known.spell(ids) if spelling is None else spelling
        if text != spelling.text:
            at = common(text, spelling.text)
            raise Fault(
                f"completion.text: expected what the ids decode to, with {show(spelling.text[at : at + 20])} at "
                f"character {at}, got {show(text[at : at + 20])}; correct answers by their tokens, not in the text"
            )
    return Completion(ids, text), spelling


def _anchors(
    value: Any, completion: Completion, known: KnownTokenizer | None, spelling: Spelling | None, prompted: bool
) -> tuple[Anchor, ...]:
    if not isinstance(value, list):
        raise Fault(f"anchors: expected a list, got {show(value)}; give [] where all is to be retained")
    found: list[Anchor] = []
    seen: dict[int, int] = {}
    for index, item in enumerate(value):
        field = f"anchors[{index}]"
        anchor = _anchor(item, field, completion, known)
        if anchor.position in seen:
            raise Fault(
                f"{field}.position: expected each position once, got {anchor.position}, which anchors"
                f"[{seen[anchor.position]}] has; remove one of them"
            )
        if anchor.position == 0 and not prompted:
            raise Fault(
                f"{field}.position: expected a token that something predicts, got 0 with empty prompt_ids; give the "
                "prompt, or begin it with bos_token"
            )
        if spelling is not None and anchor.span != spelling.spans[anchor.position]:
            start, end = spelling.spans[anchor.position]
            raise Fault(
                f"{field}.span: expected [{start}, {end}], the characters of token {anchor.position}, got "
                f"{list(anchor.span)}; correct it"
            )
        seen[anchor.position] = index
        found.append(anchor)
    return tuple(found)


def _anchor(value: Any, field: str, completion: Completion, known: KnownTokenizer | None) -> Anchor:
    if not isinstance(value, dict):
        raise Fault(f"{field}: expected an object with {listed(OF_ANCHORS)}, got {show(value)}; give each as a field")
    _check_names(value, field, OF_ANCHORS, (*STRENGTHS, *MORE_OF_ANCHORS), f"{field}.")
    position = _whole(value["position"], f"{field}.position", 0, len(completion.token_ids))
    span, text = value["span"], completion.text
    if not isinstance(span, list) or [type(x) for x in span] != [int, int] or not 0 <= span[0] <= span[1] <= len(text):
        raise Fault(
            f"{field}.span: expected [start, end] with 0 ≤ start ≤ end ≤ {len(text)}, the characters of "
            f"completion.text, got {show(span)}; correct it"
        )
    token = completion.token_ids[position]
    if type(value["token_id"]) is not int or value["token_id"] != token:
        raise Fault(
            f"{field}.token_id: expected {token}, that of completion.token_ids at {position}, got "
            f"{show(value['token_id'])}; the completion must have the right token, and original_token_id the wrong one"
        )
    if value["text"] != text[span[0] : span[1]]:
        raise Fault(
            f"{field}.text: expected {show(text[span[0] : span[1]])}, that of completion.text in the span {span}, got "
            f"{show(value['text'])}; correct span or text"
        )
    given = [name for name in STRENGTHS if value.get(name) is not None]
    if len(given) != 1:
        raise Fault(
            f"{field}: expected one of confidence and target_probability, got {'both' if given else 'none'}; "
            f"{'remove one' if given else 'give confidence 1.0 if the token is certain'}"
        )
    if value.get("original_token_id") is not None:
        _check_ids([value["original_token_id"]], f"{field}.original_token_id", known)
    if value.get("original_text") is not None:
        _check_text(value["original_text"], f"{field}.original_text")
    return Anchor(
        position=position,
        span=(span[0], span[1]),
        token_id=token,
        text=value["text"],
        original_token_id=value.get("original_token_id"),
        original_text=value.get("original_text"),
        probability=_number(value, "probability", field, PROBABILITY),
        original_probability=_number(value, "original_probability", field, PROBABILITY),
        confidence=_number(value, "confidence", field, CONFIDENCE),
        target_probability=_number(value, "target_probability", field, TARGET),
        alternatives=_alternatives(value.get("alternatives"), f"{field}.alternatives", known),
        round=1 if value.get("round") is None else _whole(value["round"], f"{field}.round", 1, MOST_ID),
    )


def _alternatives(value: Any, field: str, known: KnownTokenizer | None) -> tuple[Alternative, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise Fault(f"{field}: expected a list, got {show(value)}; leave it out where there are none")
    found = []
    for index, item in enumerate(value):
        here = f"{field}[{index}]"
        names = ("token_id", "text", "probability")
        if not isinstance(item, dict):
            raise Fault(f"{here}: expected an object with {listed(names)}, got {show(item)}; give each as a field")
        _check_names(item, here, names, (), f"{here}.")
        _check_ids([item["token_id"]], f"{here}.token_id", known)
        _check_text(item["text"], f"{here}.text")
        found.append(Alternative(item["token_id"], item["text"], _number(item, "probability", here, PROBABILITY)))
    return tuple(found)


def _check_text(value: Any, field: str) -> None:
    if not isinstance(value, str):
        raise Fault(f"{field}: expected text, got {show(value)}; give a string")
    try:
        check_text(value)
    except Fault as fault:
        raise Fault(f"{field}: {fault}") from None


def _whole(value: Any, field: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value < high:
        name = field.rpartition(".")[2]
        raise Fault(f"{field}: expected a whole number, {low} ≤ {name} < {high}, got {show(value)}; correct it")
    return value


Bounds = tuple[str, Callable[[float], bool]]
PROBABILITY: Bounds = ("[0, 1]", lambda x: 0 <= x <= 1)
CONFIDENCE: Bounds = ("(0, 1]", lambda x: 0 < x <= 1)
TARGET: Bounds = ("(0, 1)", lambda x: 0 < x < 1)


def _number(value: Mapping[str, Any], name: str, field: str, bounds: Bounds) -> float | None:
    number = value.get(name)
    if number is None:
        return None
    interval, inside = bounds
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not inside(number):
        remedy = "leave it out if unknown" if bounds is PROBABILITY else "a token that is no anchor has no entry"
        raise Fault(f"{field}.{name}: expected a number in {interval}, got {show(number)}; {remedy}")
    return float(number)
