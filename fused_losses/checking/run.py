"""`check`: ask both models, measure, and add up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..anchors.spans import spell
from .answers import Asker, Ids
from .facts import Question, leaks_of, says_it
from .inputs import Probe
from .intervals import mean
from .pair import Advance, Measured, Pair, Row
from .plan import Plan, checked_limits, make_plan
from .report import AnchorResult, Answer, Piece, Progress, Report, Spoken, TextResult
from .summary import broken_limits, summary

STAGES = ("Ask the original", "Ask the tuned model", "Measure answers", "Measure texts")


def check(
    model: nn.Module,
    tokenizer: Any,
    *,
    original: nn.Module | None = None,
    anchors: Sequence[Any] = (),
    probes: Sequence[Probe] = (),
    prompts: Iterable[Any] | None = None,
    texts: Mapping[str, str] | None = None,
    facts: Sequence[str] | None = None,
    max_kl: float | None = None,
    min_recall: float | None = None,
    min_paraphrase_recall: float | None = None,
    answer_tokens: int = 64,
    text_tokens: int = 4096,
    seed: int = 0,
    cache: str | os.PathLike | None = None,
    names: tuple[str, str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """What a fine-tuned model has learnt, and what it has forgotten, beside the model that it was made of.

    Both answer greedily. Then, of every token of an answer or a text, with the full vocabulary and without [tokens ×
    vocabulary] logits::

        kl[t] = KL(p_original[t] ‖ p_tuned[t]);  ΔL = mean of nll_tuned[t] − nll_original[t]  (arXiv 2509.20758)

    Learnt: whether each anchor is ranked first, and its probability, after the prompt that was corrected and after
    paraphrases, with the corrected answer up to there given; whether answers say it, also to reverse questions.
    Forgotten: KL along the original's own answers to general prompts (mean over prompts, share above 0.1, 0.25 and
    0.5), ΔL on general text. Leaked: answers that say a fact where it does not belong. docs/check.md says how to read
    each.

    Args:
        model: the tuned one: a causal language model of transformers with a linear head, with PEFT or without.
        tokenizer: of both models.
        original: None: the model without its adapters. Of a full fine-tune, or where the adapter is merged: the model
            that it was made of, with the same tokenizer.
        anchors: records, from `fl.anchors.read_records`; those without anchors are left out, and of records with the
            same prompt and answer all but the last.
        probes: from `read_probes`.
        prompts: that have nothing to do with what was taught: text, messages or `Prompt`. Default: `PROMPTS`, 28.
        texts: general text by name. Default: prose, Python's documentation, and code.
        facts: what must not show in answers to `prompts`, and to "unrelated" probes that say no other. Default: the
            words of the anchors, and what paraphrases and unrelated probes expect.
        max_kl: limit of the mean KL along the original's answers to `prompts`. min_recall: limit of the share of
            anchors, after the prompts that were corrected, that are ranked first; needs anchors.
            min_paraphrase_recall: the same after paraphrases; needs paraphrases with `anchor`. A limit that is broken
            stands in `Report.broken`.
        answer_tokens: at most so many tokens an answer. text_tokens: at most so many of each text.
        seed: of the bootstrap.
        cache: a directory for answers, by digest of the model: a check that was stopped goes on, and the original is
            asked once for many adapters.
        names: of the tuned model and the original, for the report.
        progress: called with (stage, done, total).

    Returns:
        `Report`; the same for the same arguments on the same machine.

    Raises:
        TypeError, ValueError: naming the argument: no adapter and no original, a merged adapter, a tokenizer or
            vocabulary that does not fit, a prompt longer than the model can read.

    Cost: generation of all answers by both models; a forward of both over all answers twice and over the texts, with 2
    GEMMs of the head. With a cache a digest of the model, a second or two per GB. The model is left as it was.
    """
    prompts, probes = None if prompts is None else list(prompts), list(probes)
    limits = checked_limits(max_kl, min_recall, min_paraphrase_recall, anchors, probes, prompts)
    pair = Pair(model, original)
    plan = make_plan(pair, tokenizer, list(anchors), probes, prompts, texts, facts, answer_tokens, text_tokens)
    return _report(pair, plan, limits, seed, Asker(pair, tokenizer, answer_tokens, cache), names, progress)


def _report(
    pair: Pair, plan: Plan, limits: dict[str, float], seed: int, asker: Asker, names: tuple[str, str] | None,
    progress: Progress | None,
) -> Report:  # fmt: skip
    report = progress or (lambda *_: None)
    ids = [question.ids for question in plan.questions]
    said = {tuned: asker.answers(ids, tuned, _counter(report, STAGES[tuned], len(ids))) for tuned in (False, True)}
    with pair.measuring() as measure:
        answers = _answers(asker, measure, plan.questions, said, report)
        anchors = _anchors(measure, [q for q in plan.questions if q.has_anchors])
        measured = measure(plan.rows, advance=_counter(report, STAGES[3], len(plan.rows)))
    texts = _texts(plan.windows, measured, seed)
    metrics = summary(answers, anchors, texts, _pooled(measured, seed), seed)
    return Report(
        names=dict(zip(("tuned", "original"), names or _names(pair), strict=True)),
        settings=plan.settings | {"seed": seed}, metrics=metrics, answers=answers, anchors=anchors, texts=texts,
        leaks=leaks_of(answers), limits=limits, broken=broken_limits(metrics, limits),
    )  # fmt: skip


def _answers(
    asker: Asker, measure: Callable[..., list[Measured]], questions: list[Question], said: dict[bool, list[Ids]],
    report: Progress,
) -> tuple[Answer, ...]:  # fmt: skip
    """Both answers of each question, measured along each; an answer without tokens has KL 0."""
    rows = [Row(q.ids, ids) for tuned in (False, True) for q, ids in zip(questions, said[tuned], strict=True)]
    some = list(dict.fromkeys(row for row in rows if row.measured))
    known = dict(zip(some, measure(some, advance=_counter(report, STAGES[2], len(some))), strict=True))
    found = []
    for at, question in enumerate(questions):
        both = (rows[at], rows[len(questions) + at])
        original, tuned = (_spoken(asker, row.measured, known.get(row)) for row in both)
        along = known.get(both[0])
        change = 0.0 if along is None else float((along.nll - along.original_nll).mean())
        found.append(
            Answer(question.kind, question.text, question.expect, original, tuned,
                   says_it(original.text, question), says_it(tuned.text, question), change)
        )  # fmt: skip
    return tuple(found)


def _spoken(asker: Asker, ids: Ids, measured: Measured | None) -> Spoken:
    text = asker.tokenizer.decode(list(ids), skip_special_tokens=True)
    if measured is None:
        return Spoken(text, False, 0.0, 0, ())
    special = set(getattr(asker.tokenizer, "all_special_ids", ()))
    kl = measured.kl.tolist()
    spelled = spell(asker.tokenizer, ids)
    pieces: list[Piece] = []
    begin = last = 0
    for at, (start, end) in enumerate(spelled.spans):
        if pieces and start < last:  # both are parts of one character
            begin = min(begin, start)
            pieces[-1] = Piece(spelled.text[begin : max(end, last)], max(pieces[-1].kl, kl[at]), pieces[-1].special)
        else:
            begin = start
            pieces.append(Piece(spelled.text[start:end], kl[at], ids[at] in special))
        last = max(end, last)
    return Spoken(text, asker.finished(ids), float(measured.kl.mean()), len(ids), tuple(pieces))


def _anchors(measure: Callable[..., list[Measured]], questions: list[Question]) -> tuple[AnchorResult, ...]:
    found = []
    measured = measure([question.forced() for question in questions], ranks=True)
    for question, values in zip(questions, measured, strict=True):
        for anchor in sorted(question.record.anchors, key=lambda anchor: anchor.position):
            t = anchor.position
            found.append(
                AnchorResult(
                    question.kind, question.record.id, question.text, t, anchor.text,
                    float((-values.original_nll[t]).exp()), float((-values.nll[t]).exp()),
                    int(values.original_rank[t]), int(values.rank[t]),
                )
            )  # fmt: skip
    return tuple(found)


def _texts(windows: list[tuple[str, int, int]], measured: list[Measured], seed: int) -> tuple[TextResult, ...]:
    found = []
    for name, count, left_out in windows:
        some, measured = measured[:count], measured[count:]
        nll, original, kl = (torch.cat([getattr(m, field) for m in some]) for field in ("nll", "original_nll", "kl"))
        found.append(
            TextResult(name, len(nll), left_out, float(original.mean()), float(nll.mean()), _pooled(some, seed),
                       float(kl.mean()))
        )  # fmt: skip
    return tuple(found)


def _pooled(measured: list[Measured], seed: int) -> Any:
    """ΔL over all tokens, its interval from windows, which are resampled as wholes."""
    changes = [float((m.nll - m.original_nll).mean()) for m in measured]
    return mean(changes, [len(m.nll) for m in measured], seed)


def _names(pair: Pair) -> tuple[str, str]:
    names = [str(getattr(model, "name_or_path", "") or type(model).__name__) for model in (pair.base, pair.inner)]
    return (names[0], names[1]) if pair.original is not None else (f"{names[0]} + adapter", names[1])


def _counter(report: Progress, stage: str, total: int) -> Advance:
    done = 0
    report(stage, 0, total)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report(stage, done, total)

    return advance
