"""What a check asks and measures, made of its arguments, with their checks: all before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from .. import __version__, checks
from ..anchors.checked import check_known
from ..anchors.files import latest
from ..anchors.jsonl import Fault
from ..anchors.records import Record
from ..anchors.spans import KnownTokenizer
from .facts import Question, distinct, facts_of, questions_of, special_ids
from .general import PROMPTS, general_texts
from .inputs import Probe, as_prompts
from .pair import Pair, Row
from .words import normal

WINDOW = 512  # tokens of a text that are read together


@dataclass(frozen=True)
class Plan:
    """`rows`: of all texts, one text after the other; `windows`: of each text its name, its number of rows, and how
    many of its tokens are left out. `settings`: for the report."""

    questions: list[Question]
    rows: list[Row]
    windows: list[tuple[str, int, int]]
    settings: dict[str, Any]


def make_plan(
    pair: Pair, tokenizer: Any, records: list[Any], probes: list[Probe], prompts: Iterable[Any] | None,
    texts: Mapping[str, str] | None, facts: Sequence[str] | None, answer_tokens: Any, text_tokens: Any,
) -> Plan:  # fmt: skip
    """Arguments as in `check`."""
    answer_tokens, text_tokens = _count(answer_tokens, "answer_tokens"), _count(text_tokens, "text_tokens")
    known, questions = asked(tokenizer, records, probes, prompts, facts)
    rows, windows = _windows(tokenizer, general_texts() if texts is None else texts, pair, text_tokens)
    _check_ids(pair, questions, rows, answer_tokens)
    settings = {
        "answer_tokens": answer_tokens, "text_tokens": text_tokens, "facts": list(known),
        "prompts": "built in" if prompts is None else "given", "texts": "built in" if texts is None else "given",
        "original": "the model without its adapter" if pair.original is None else "another model",
        "dtype": str(getattr(pair.base, "dtype", "")).removeprefix("torch."), "versions": _versions(),
    }  # fmt: skip
    return Plan(questions, rows, windows, settings)


def asked(
    tokenizer: Any, records: list[Any], probes: list[Probe], prompts: Iterable[Any] | None, facts: Sequence[str] | None
) -> tuple[tuple[str, ...], list[Question]]:
    """The facts, and all that is asked, for which no model is needed. Arguments as in `check`."""
    _check_records(records, tokenizer)
    records = latest(records)
    known = facts_of(records, probes, special_ids(tokenizer)) if facts is None else distinct(_phrases(facts))
    general = as_prompts(PROMPTS if prompts is None else prompts, "prompts")
    return known, questions_of(tokenizer, records, probes, general, known)


def checked_limits(
    max_kl: Any, min_recall: Any, min_paraphrase_recall: Any, anchors: Sequence[Any], probes: Sequence[Probe],
    prompts: Any,
) -> dict[str, float]:  # fmt: skip
    """The limits that are given, each with something to measure it on."""
    found: dict[str, float] = {}
    given = {"max_kl": max_kl, "min_recall": min_recall, "min_paraphrase_recall": min_paraphrase_recall}
    for name, value in given.items():
        most = float("inf") if name == "max_kl" else 1.0
        if value is None:
            continue
        limit = checks.number(value)
        if limit is None or not 0 <= limit <= most:
            bounds = "a number ≥ 0" if most > 1 else "a share from 0 to 1"
            raise ValueError(f"{name}: expected {bounds}, or None for no limit, got {value!r}")
        found[name] = limit
    if min_recall is not None and not any(record.anchors for record in anchors):
        raise ValueError("min_recall: needs anchors to measure recall on, got none; give records with anchors")
    if min_paraphrase_recall is not None and not any(p.kind == "paraphrase" and p.anchor for p in probes):
        raise ValueError(
            "min_paraphrase_recall: needs paraphrases that name a record of anchors, got none; give such probes an "
            "anchor, the record's id"
        )
    if max_kl is not None and prompts is not None and not len(list(prompts)):
        raise ValueError("max_kl: needs prompts to measure KL on, got none; leave prompts out for the built-in ones")
    return found


def _windows(
    tokenizer: Any, texts: Mapping[str, str], pair: Pair, most: int
) -> tuple[list[Row], list[tuple[str, int, int]]]:
    """Rows of all texts one after the other; of each text its name, its number of rows, and tokens left out.

    Each row begins with a token that is not measured: the tokenizer's for beginnings, else for ends, else its first.
    """
    size = min(WINDOW, _room(pair) - 1)
    first = next((t for n in ("bos_token_id", "eos_token_id") if (t := getattr(tokenizer, n, None)) is not None), None)
    rows, found = [], []
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if len(ids) < 2:
            raise ValueError(f"texts[{name!r}]: expected text of at least 2 tokens, got {len(ids)}; give more")
        start, rest = ((first,), ids[:most]) if first is not None else ((ids[0],), ids[1 : most + 1])
        some = [Row(start, tuple(rest[at : at + size])) for at in range(0, len(rest), size)]
        rows += some
        found.append((str(name), len(some), max(0, len(ids) - most)))
    return rows, found


def _check_records(records: list[Any], tokenizer: Any) -> None:
    known = KnownTokenizer(tokenizer)
    for at, record in enumerate(records):
        if not isinstance(record, Record):
            kind = type(record).__name__
            raise TypeError(f"anchors[{at}]: expected a Record, got {kind}; read a file with fl.anchors.read_records")
        try:
            check_known(record, known)
        except Fault as fault:
            raise ValueError(f"anchors[{at}]: {fault}") from None


def _check_ids(pair: Pair, questions: list[Question], rows: list[Row], answer_tokens: int) -> None:
    """Before any work: ids that the model knows, and no more than it can read."""
    vocabulary, room = pair.base.get_output_embeddings().weight.shape[0], _room(pair)
    most = max((max(row.before + row.measured) for row in rows), default=0)
    if most >= vocabulary:
        raise ValueError(
            f"tokenizer: expected that of the model, of {vocabulary} tokens, got the id {most} in texts; give the "
            "model's own tokenizer"
        )
    for question in questions:
        more = len(question.forced().measured) if question.has_anchors else 0
        used = [*question.ids, *(question.record.completion.token_ids if question.has_anchors else ())]
        what = f"the {question.kind} prompt {question.text[:60]!r}"
        if not question.ids:
            raise ValueError(f"prompts: expected at least one token, got none of {what}; leave it out")
        if max(used) >= vocabulary:
            raise ValueError(
                f"tokenizer: expected that of the model, of {vocabulary} tokens, got the id {max(used)} of {what}; "
                "give the model's own tokenizer, and records of it"
            )
        if len(question.ids) + max(more, answer_tokens) > room:
            raise ValueError(
                f"prompts: {what} has {len(question.ids)} tokens, and with {max(more, answer_tokens)} of an answer the "
                f"model can read {room}; shorten it, or lower answer_tokens"
            )


def _room(pair: Pair) -> int:
    """How many tokens both models can read."""
    configs = [model.config.get_text_config() for model in (pair.base, pair.inner)]
    known = [getattr(c, "max_position_embeddings", None) or getattr(c, "n_positions", None) for c in configs]
    return min([n for n in known if isinstance(n, int) and n > 1] or [1 << 20])


def _count(value: Any, name: str) -> int:
    count = checks.integer(value)
    if count is None or count < 1:
        raise ValueError(f"{name}: expected an integer ≥ 1, got {value!r}")
    return count


def _phrases(facts: Any) -> list[str]:
    if isinstance(facts, str) or not all(isinstance(fact, str) and normal(fact) for fact in facts):
        raise ValueError(f"facts: expected a list of texts, none of them empty, got {facts!r}")
    return list(facts)


def _versions() -> dict[str, str]:
    found = {"fused_losses": __version__}
    for name in ("torch", "transformers", "peft"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
