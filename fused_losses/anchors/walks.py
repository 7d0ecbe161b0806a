"""Records without a person: the anchors of a right answer that is given, and the model's own answers to retain."""

from __future__ import annotations

import contextlib
import os
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..huggingface.reference_forward import evaluating
from .answering import ALTERNATIVES
from .arguments import check_goal, check_integer, check_sampling
from .chat import render
from .exporting import original_of, record_of
from .files import RecordFile
from .forwards import Forward, most_positions, reference_forward
from .history import Mark
from .predictions import Prediction, predictions_of
from .prompts import as_messages, check_ids, check_tokenizer, end_ids, end_of_turn, ids_after
from .records import Record
from .spans import KnownTokenizer


def anchors_from_answer(
    model: Any,
    tokenizer: Any,
    messages: str | Sequence[Mapping[str, Any]],
    answer: str | Sequence[int],
    *,
    tools: list | None = None,
    prompt_ids: Sequence[int] | None = None,
    end: bool = True,
    confidence: float | None = None,
    target_probability: float | None = None,
    below: float | None = None,
    reference: Any = None,
    round: int = 1,
    template_options: Mapping[str, Any] | None = None,
) -> Record:
    """A right answer that is given → its record. Its anchors are the tokens that the original does not rank first.

    The same walk as with `AnchorSession`, where whoever corrects knows the answer: the model reads the right tokens
    before each position; where it would say the right one next by itself, there is nothing to learn. Tokens that stand
    where the model would have said something else are anchors, so an answer in other words than the model's own has
    many: better correct its own answer, or give few.

    Args:
        model, tokenizer, tools, prompt_ids, reference, round, template_options: as in `AnchorSession` and its `start`.
            Only the original is called.
        messages: one message of the user as a string, or the conversation.
        answer: text, or token ids.
        end: puts the end-of-turn token of the chat template after it, unless it ends with one.
        confidence, target_probability: c in (0, 1], default 1, or p* in (0, 1), of all anchors.
        below: a token is an anchor only where the original gives it a probability below this (and does not rank it
            first). Default: p* where that is given, else no bound.

    Returns:
        A `Record`. Its anchors are () where the original says every token by itself.

    Raises:
        TypeError, ValueError: naming the argument: no answer, ids that the model does not have, an answer longer than
        its context, no chat template.

    Cost: one forward of prompt and answer; at most 512 rows [V] of logits in memory, more only for recurrent models.
    """
    goal = check_goal(confidence, target_probability)
    check_integer("round", round, 1)
    if below is None:
        below = target_probability
    elif isinstance(below, bool) or not isinstance(below, (int, float)) or not 0 < below <= 1:
        raise ValueError(f"below: expected a number in (0, 1], or None, got {below!r}")
    size = check_tokenizer(model, tokenizer)
    original = reference_forward(model, reference, size) or Forward(model)
    messages = as_messages(messages, given=prompt_ids is not None)
    if prompt_ids is None:
        prompt_ids = render(tokenizer, messages, tools, template_options)
    prompt_ids = check_ids(prompt_ids, size, "prompt_ids")
    if isinstance(answer, str):
        answer = ids_after(tokenizer, prompt_ids, answer, "answer")
    ids, ends = check_ids(answer, size, "answer"), end_ids(model, tokenizer)
    if end and ids[-1] not in ends:
        ids.append(end_of_turn(tokenizer, ends, messages, tools, template_options))
    most = most_positions(model)
    if most is not None and len(prompt_ids) + len(ids) > most:
        raise ValueError(
            f"answer: prompt and answer have {len(prompt_ids) + len(ids)} tokens, the model's context "
            f"{most}; shorten it"
        )
    said = predictions_of(original, prompt_ids, ids)
    marks = {at: _mark(p, goal, round) for at, p in enumerate(said) if p.rank > 1 and p.probability < (below or 2)}
    return record_of(KnownTokenizer(tokenizer), original_of(model, reference), messages, tools, prompt_ids, ids, marks)


def _mark(said: Prediction, goal: tuple[float | None, float | None], round: int) -> Mark:
    choices = said.likeliest(ALTERNATIVES)
    return Mark(said.ids[0], said.probability, choices[0][1], choices, *goal, round)


def retain_rows(
    model: Any,
    tokenizer: Any,
    prompts: Iterable[str | Sequence[Mapping[str, Any]]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 8,
    seed: int = 0,
    reference: Any = None,
    output: str | os.PathLike | None = None,
    progress: bool = True,
    template_options: Mapping[str, Any] | None = None,
) -> list[Record]:
    """The model's own answers to `prompts`, as records without anchors: what training holds to the original.

    Args:
        model, tokenizer, temperature, top_p, reference, template_options: as in `AnchorSession`. With a reference the
            answers are the original's: "base", without the adapter.
        prompts: one message of the user each, or a conversation each.
        max_new_tokens: of an answer; a longer one is cut there and then has no end-of-turn token.
        batch_size: answers generated together, padded on the left, those with prompts of like length. Padding may
            change the last bits of a probability, so one in a great many tokens may differ from that of a batch of one.
        seed: of the draws at a temperature above 0; the same seed, prompts and batch_size give the same answers.
        output: a file that gets each record as soon as its batch is done. If it has records of some of the prompts
            already, these are not generated anew: an interrupted call goes on where it was.
        progress: a progress bar, where tqdm is installed.

    Returns:
        A record for each prompt, in their order.

    Raises:
        TypeError, ValueError: naming the argument.

    Cost: `model.generate` of each batch, with its KV cache. The state of torch's generators stays as it is.
    """
    check_integer("max_new_tokens", max_new_tokens, 1)
    check_integer("batch_size", batch_size, 1)
    check_sampling(temperature, top_p, seed)
    size = check_tokenizer(model, tokenizer)
    original = reference_forward(model, reference, size) or Forward(model)
    most = most_positions(model)
    conversations, rendered = _rendered(tokenizer, prompts, template_options, size, most)
    found: dict[int, Record] = {}
    tokens = KnownTokenizer(tokenizer)
    order = sorted(range(len(rendered)), key=lambda k: len(rendered[k]))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    sampling = Sampling(max_new_tokens, temperature, top_p, end_ids(model, tokenizer), seed)
    with contextlib.nullcontext() if output is None else RecordFile(output, tokenizer) as file:
        known = defaultdict(list)
        for record in file.records if file is not None else ():
            known[record.prompt_ids].append(record)
        for k, ids in enumerate(rendered):
            if known[tuple(ids)]:
                found[k] = known[tuple(ids)].pop(0)
        with _bar(len(rendered), progress) as bar:
            bar.update(len(found))
            for number, batch in enumerate(batches):
                missing = [k for k in batch if k not in found]
                if not missing:
                    continue
                longest = max(len(rendered[k]) for k in batch)
                room = max_new_tokens if most is None else most - longest
                # The whole batch, so that draws do not depend on where an earlier call was interrupted.
                answers = _answers(original, tokenizer, [rendered[k] for k in batch], room, number, sampling)
                for k, answer in zip(batch, answers, strict=True):
                    if k in missing:
                        of = original_of(model, reference)
                        found[k] = record_of(tokens, of, conversations[k], None, rendered[k], answer, {})
                        if file is not None:
                            file.append(found[k])
                bar.update(len(missing))
    return [found[k] for k in range(len(rendered))]


def _rendered(
    tokenizer: Any, prompts: Any, template_options: Mapping[str, Any] | None, size: int, most: int | None
) -> tuple[list[list[dict]], list[list[int]]]:
    """The conversations and their tokens, checked."""
    if isinstance(prompts, (str, Mapping)):
        raise TypeError(f"prompts: expected a list, a prompt each, got {type(prompts).__name__}; put it into a list")
    conversations = [as_messages(prompt, name=f"prompts[{k}]") for k, prompt in enumerate(prompts)]
    rendered = [
        render(tokenizer, messages, None, template_options, f"prompts[{k}]") for k, messages in enumerate(conversations)
    ]
    for k, ids in enumerate(rendered):
        check_ids(ids, size, f"prompts[{k}]")
        if most is not None and len(ids) >= most:
            raise ValueError(f"prompts[{k}]: {len(ids)} tokens leave no room in the model's context of {most}; shorten")
    return conversations, rendered


@dataclass(frozen=True)
class Sampling:
    """How answers are generated."""

    max_new_tokens: int
    temperature: float
    top_p: float
    ends: frozenset[int]
    seed: int


@torch.no_grad()
def _answers(
    original: Forward, tokenizer: Any, prompts: list[list[int]], room: int, number: int, sampling: Sampling
) -> list[list[int]]:
    """An answer to each, from one batch; `room`: for tokens in the context; `number`: of the batch, for its draws."""
    from transformers import GenerationConfig

    ends = sampling.ends
    width = max(map(len, prompts))
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id, *sorted(ends)) if t is not None), 0)
    device = original.model.get_input_embeddings().weight.device
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    # All that could bend the distribution is set, as the model's own generation_config fills what is not.
    plain = dict(repetition_penalty=1.0, no_repeat_ngram_size=0, num_beams=1, top_k=0, min_new_tokens=0)
    drawn: dict[str, Any] = dict(do_sample=False)
    if sampling.temperature:
        drawn = dict(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p)
    most = min(room, sampling.max_new_tokens)
    config = GenerationConfig(
        max_new_tokens=most, eos_token_id=sorted(ends) or None, pad_token_id=pad, use_cache=True, **plain, **drawn
    )
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), evaluating(original.model), original.within():
        torch.manual_seed(
            random.Random(f"{sampling.seed}/{number}").getrandbits(32)
        )  # all that a CPU's generator takes
        out = original.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [_until_end(row, ends) for row in out[:, width:].tolist()]


def _until_end(ids: list[int], ends: frozenset[int]) -> list[int]:
    return next((ids[: at + 1] for at, token in enumerate(ids) if token in ends), ids)


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    """tqdm's bar, where it is installed and wanted; else one that shows nothing."""
    try:
        if not shown:
            raise ImportError
        from tqdm.auto import tqdm
    except ImportError:
        yield _NoBar()
        return
    with tqdm(total=total, desc="answers", unit="answer") as bar:
        yield bar


class _NoBar:
    def update(self, count: int) -> None:
        """Shows nothing."""
