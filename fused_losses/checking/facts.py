"""What was taught: the words of the anchors, what each prompt is asked for, and where a fact does not belong."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..anchors.spans import text_of
from .answers import Ids, prompt_ids
from .inputs import Probe, Prompt
from .pair import Row
from .report import Answer, Leak
from .words import bare, has_word, normal, says, whole_words


@dataclass(frozen=True)
class Question:
    """A prompt that both models are asked. `record`: whose anchors are looked for after it."""

    kind: str
    text: str
    ids: Ids
    expect: tuple[str, ...] = ()
    record: Any = field(default=None, compare=False)

    @property
    def has_anchors(self) -> bool:
        return self.record is not None and bool(self.record.anchors)

    def forced(self) -> Row:
        """The corrected answer up to its last anchor, after this prompt."""
        end = 1 + max(anchor.position for anchor in self.record.anchors)
        return Row(self.ids, tuple(self.record.completion.token_ids[:end]))


def words_of(record: Any, special: Collection[int] = ()) -> tuple[str, ...]:
    """The words that a record's anchors are of: neighbouring anchors together, extended to whole words.

    Punctuation around them is left out, as the full stop that ends an answer; so are `special` tokens, which no answer
    shows.
    """
    some = (anchor for anchor in record.anchors if anchor.token_id not in special)
    anchors = sorted(some, key=lambda anchor: anchor.position)
    runs: list[list[Any]] = []
    for anchor in anchors:
        if runs and runs[-1][-1].position + 1 == anchor.position:
            runs[-1].append(anchor)
        else:
            runs.append([anchor])
    found = (whole_words(record.completion.text, run[0].span[0], run[-1].span[1]) for run in runs)
    return distinct(bare(words) for words in found if has_word(words))


def special_ids(tokenizer: Any) -> frozenset[int]:
    return frozenset(getattr(tokenizer, "all_special_ids", ()))


def distinct(phrases: Iterable[str]) -> tuple[str, ...]:
    """Each once, whatever its case, in order."""
    found: dict[str, str] = {}
    for phrase in phrases:
        found.setdefault(normal(phrase), phrase)
    return tuple(found.values())


def questions_of(
    tokenizer: Any, records: Sequence[Any], probes: Sequence[Probe], prompts: Sequence[Prompt], facts: tuple[str, ...]
) -> list[Question]:
    """All that is asked, in the order in which it is reported.

    A paraphrase with an anchor stands in the place of the record's last message, after those before it.
    """
    found, special = [], special_ids(tokenizer)
    for record in records:
        if record.anchors:
            asked = Prompt(tuple(record.messages)).text or text_of(tokenizer, record.prompt_ids)
            found.append(Question("corrected", asked, tuple(record.prompt_ids), words_of(record, special), record))
    for at, probe in enumerate(probes):
        record = None if probe.anchor is None else _record(records, probe.anchor, at)
        prompt = probe.prompt
        if probe.kind == "paraphrase" and record is not None and len(prompt.messages) == 1:
            before = tuple(record.messages[:-1])
            prompt = Prompt((*before, *prompt.messages), prompt.tools or record.tools)
        expect = probe.expect or facts
        kept = record if probe.kind == "paraphrase" else None
        found.append(Question(probe.kind, probe.prompt.text, prompt_ids(tokenizer, prompt), expect, kept))
    for prompt in prompts:
        found.append(Question("general", prompt.text, prompt_ids(tokenizer, prompt), facts))
    return found


def facts_of(records: Sequence[Any], probes: Sequence[Probe], special: Collection[int] = ()) -> tuple[str, ...]:
    """What was taught, where nobody says it: the words of the anchors, and what paraphrases ask for."""
    words = [word for record in records for word in words_of(record, special)]
    return distinct([*words, *(phrase for p in probes if p.kind in ("paraphrase", "unrelated") for phrase in p.expect)])


def says_it(text: str, question: Question) -> bool | None:
    """All corrected words of an answer that was corrected; of others one of the phrases. None: nothing is expected."""
    if not question.expect:
        return None
    every = all if question.kind == "corrected" else any
    return every(says(text, phrase) for phrase in question.expect)


def _record(records: Sequence[Any], name: str, at: int) -> Any:
    found = [record for record in records if record.id == name] or [r for r in records if r.id.startswith(name)]
    if len(found) == 1:
        return found[0]
    if not records:
        raise ValueError(
            f"probes[{at}]: belongs to anchor {name!r}, and there are no records of anchors; give them as anchors "
            "(--anchors), or leave the field out"
        )
    what = "none" if not found else f"{len(found)}: {', '.join(record.id for record in found[:3])}"
    raise ValueError(
        f"probes[{at}]: expected the id of a record of anchors, or the beginning of just one, got {name!r}, which fits "
        f"{what}; correct it"
    )


def leaks_of(answers: Sequence[Answer]) -> tuple[Leak, ...]:
    """For each fact the answers that must not say it. A prompt that says it itself counts for nothing."""
    apart = [a for a in answers if a.kind in ("unrelated", "general")]
    facts = distinct(phrase for a in apart for phrase in a.expect)
    found = []
    for fact in facts:
        known = normal(fact)
        some = [a for a in apart if known in map(normal, a.expect) and not says(a.prompt, fact)]
        before, after = ([says(spoken.text, fact) for spoken in column]
                         for column in ([a.original for a in some], [a.tuned for a in some]))  # fmt: skip
        new = (a.prompt for a, b, c in zip(some, before, after, strict=True) if c and not b)
        found.append(Leak(fact, len(some), sum(before), sum(after), tuple(new)))
    return tuple(leak for leak in found if leak.answers)
