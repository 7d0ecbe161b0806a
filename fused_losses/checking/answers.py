"""Greedy answers of both models to prompts, and a file of them, with which a stopped check goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..anchors.chat import render
from ..anchors.jsonl import show
from .inputs import Prompt
from .pair import Pair, batches

Ids = tuple[int, ...]
BATCH_ROWS = 8


def prompt_ids(tokenizer: Any, prompt: Prompt) -> Ids:
    """What the model sees: the chat template up to where the answer begins; plain text where there is no template."""
    if getattr(tokenizer, "chat_template", None):
        return tuple(render(tokenizer, prompt.messages, prompt.tools, name=f"prompts: {show(prompt.text)}"))
    if len(prompt.messages) > 1 or not isinstance(prompt.messages[0]["content"], str):
        raise ValueError("prompts: the tokenizer has no chat template, so only prompts of plain text can be asked")
    return tuple(tokenizer(prompt.messages[0]["content"]).input_ids)


class AnswerFile:
    """Answers of one model, one JSON line each, appended as soon as they are there.

    A line that was cut off, or is no answer, is not read. Several processes may append: each line is one write.
    """

    def __init__(self, directory: str | os.PathLike, digest: str, vocabulary: int) -> None:
        self.path, self.vocabulary = Path(directory).expanduser() / f"{digest}.jsonl", vocabulary
        self.known: dict[str, Ids] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                file.seek(0)
                raw = file.read()
                if raw and not raw.endswith(b"\n"):  # cut off by a kill: the next line must not continue it
                    file.write(b"\n")
        except OSError as error:
            raise OSError(
                f"cache: answers cannot be kept in {self.path}: {error.strerror}; give another directory"
            ) from None
        for line in raw.splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                record = json.loads(line)
                ids = tuple(record["ids"])
                if all(type(i) is int and 0 <= i < vocabulary for i in ids):
                    self.known[str(record["key"])] = ids

    def put(self, key: str, ids: Ids) -> None:
        self.known[key] = ids
        line = json.dumps({"key": key, "ids": ids}).encode() + b"\n"
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as error:
            warnings.warn(f"an answer could not be kept in {self.path}: {error}", RuntimeWarning, stacklevel=2)


class Asker:
    """Greedy answers of at most `length` tokens, in left-padded batches."""

    def __init__(self, pair: Pair, tokenizer: Any, length: int, cache: str | os.PathLike | None) -> None:
        self.pair, self.tokenizer, self.length, self.cache = pair, tokenizer, length, cache
        self.ends = _end_ids(pair, tokenizer)

    def answers(self, prompts: Sequence[Ids], tuned: bool, advance: Callable[[int], Any]) -> list[Ids]:
        """The tokens of each answer, its end token included where it came to an end."""
        with self.pair.asked(tuned) as model:
            file, settings = None, self._settings(model)
            digest = None if self.cache is None else self._digest(tuned)
            if digest is not None:
                file = AnswerFile(self.cache, digest, model.get_output_embeddings().weight.shape[0])
            keys = [_key(prompt, self.length, settings) for prompt in prompts]
            found = {} if file is None else {key: file.known[key] for key in keys if key in file.known}
            advance(sum(key in found for key in keys))
            missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in found}
            for some in self._batches(list(missing.items())):
                for (key, _), ids in zip(some, self._generate(model, [p for _, p in some]), strict=True):
                    found[key] = ids
                    if file is not None:
                        file.put(key, ids)
                advance(sum(keys.count(key) for key, _ in some))
            return [found[key] for key in keys]

    def _digest(self, tuned: bool) -> str | None:
        try:
            return self.pair.digest(tuned)
        except (TypeError, ValueError) as error:  # quantised or sharded
            warnings.warn(
                f"answers are not kept, as the model cannot be told from others: {error}", RuntimeWarning, stacklevel=5
            )
            return None

    @staticmethod
    def _batches(asked: list[tuple[str, Ids]]) -> Iterator[list[tuple[str, Ids]]]:
        for numbers in batches([len(prompt) for _, prompt in asked], rows=BATCH_ROWS):
            yield [asked[i] for i in numbers]

    def _settings(self, model: Any) -> str:
        """What generation takes from the model besides its weights: penalties, tokens that are never said, ..."""
        config = getattr(model, "generation_config", None)
        known = {} if config is None else config.to_dict()
        known.pop("transformers_version", None)
        return json.dumps([known, self.ends], sort_keys=True, default=str)

    def _generate(self, model: Any, prompts: list[Ids]) -> list[Ids]:
        width, pad = max(map(len, prompts)), self.ends[0] if self.ends else 0
        device = next(model.parameters()).device
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=self.length, do_sample=False, num_beams=1,
            temperature=None, top_p=None, top_k=None, pad_token_id=pad, eos_token_id=self.ends or None,
        )  # fmt: skip
        return [self._cut(row) for row in out[:, width:].tolist()]

    def _cut(self, row: list[int]) -> Ids:
        for at, token in enumerate(row):
            if token in self.ends:
                return tuple(row[: at + 1])
        return tuple(row)

    def finished(self, ids: Ids) -> bool:
        return bool(ids) and ids[-1] in self.ends


def _end_ids(pair: Pair, tokenizer: Any) -> list[int]:
    """Tokens at which an answer ends, the tokenizer's own first."""
    config = getattr(pair.inner, "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    ends = [getattr(tokenizer, "eos_token_id", None), *(more if isinstance(more, (list, tuple)) else [more])]
    return list(dict.fromkeys(int(end) for end in ends if end is not None))


def _key(prompt: Ids, length: int, settings: str) -> str:
    return hashlib.blake2b(json.dumps([prompt, length, settings]).encode(), digest_size=16).hexdigest()
