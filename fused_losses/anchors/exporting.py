"""An answer with its marks → a `Record`, with the names and digests of the model and the tokenizer."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..huggingface import adapters
from ..huggingface.digest import Unchanged, model_digest
from .checked import new_record
from .forwards import inner_model
from .history import Edit, Mark, State
from .records import Alternative, Anchor, Record, Source
from .spans import KnownTokenizer, Span, text_of

_DIGESTS: weakref.WeakKeyDictionary[Any, dict[bool, tuple[Unchanged, str]]] = weakref.WeakKeyDictionary()


def state_of(record: Record, ends: frozenset[int]) -> State:
    """The answer of a record, each of its anchors an edit; without predictions."""
    ids = list(record.completion.token_ids)
    state = State(ids, ended="end of turn" if ids and ids[-1] in ends else None)
    for anchor in record.anchors:
        original = anchor.token_id if anchor.original_token_id is None else anchor.original_token_id
        goal = anchor.confidence, anchor.target_probability, anchor.round
        state.edits.append(Edit(anchor.position, (anchor.token_id,), original, *goal))
        seen = tuple((choice.token_id, choice.probability) for choice in anchor.alternatives)
        state.marks[anchor.position] = Mark(
            anchor.original_token_id, anchor.probability, anchor.original_probability, seen, *goal
        )
    return state


def anchor_of(tokenizer: Any, position: int, token_id: int, text: str, span: Span, mark: Mark) -> Anchor:
    fields = _fields(tokenizer, mark)
    alternatives = tuple(Alternative(**choice) for choice in fields.pop("alternatives"))
    return Anchor(position, span, token_id, text, alternatives=alternatives, **fields)


def _fields(tokenizer: Any, mark: Mark) -> dict[str, Any]:
    """What an anchor has besides its token."""
    fields = vars(mark).copy()
    if mark.original_token_id is not None:
        fields["original_text"] = text_of(tokenizer, [mark.original_token_id])
    fields["alternatives"] = [
        {"token_id": token, "text": text_of(tokenizer, [token]), "probability": p} for token, p in mark.alternatives
    ]
    return fields


def record_of(
    known: KnownTokenizer,
    original: Original,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    marks: Mapping[int, Mark],
) -> Record:
    return new_record(
        known,
        messages=messages,
        tools=tools,
        prompt_ids=prompt_ids,
        token_ids=token_ids,
        anchors=[{"position": at} | _fields(known.tokenizer, mark) for at, mark in sorted(marks.items())],
        model=Source(original.name, original.digest),
    )


@dataclass(frozen=True)
class Original:
    """The model whose probabilities records hold. `adapted`: with its adapter, where it has one."""

    model: Any
    adapted: bool

    @property
    def name(self) -> str:
        return str(getattr(self.model, "name_or_path", "") or type(self.model).__name__)

    @property
    def digest(self) -> str:
        """`model_digest` of its parameters and buffers, under the names that they have without PEFT.

        So a model has the same digest before an adapter is put on it and with the adapter off. It is taken once, and
        anew only when tensors have changed (as far as `Unchanged` sees).
        """
        known = _DIGESTS.setdefault(self.model, {})
        if self.adapted not in known or not known[self.adapted][0].holds():
            guard = Unchanged(functools.partial(_tensors, weakref.ref(self.model), self.adapted))
            facts = adapters.facts(inner_model(self.model)) if self.adapted else ()
            known[self.adapted] = guard, model_digest(self.tensors(), *facts)
        return known[self.adapted][1]

    def tensors(self) -> list[tuple[str, Tensor]]:
        return _tensors(lambda: self.model, self.adapted)


def _tensors(model: Callable[[], Any], adapted: bool) -> list[tuple[str, Tensor]]:
    inner = inner_model(model())
    own = set() if adapted else adapters.parameters(inner)
    named = [*inner.named_parameters(), *inner.named_buffers()]
    return [
        (name if adapted else name.replace(".base_layer", "").replace(".original_module", ""), tensor)
        for name, tensor in named
        if id(tensor) not in own
    ]


def original_of(model: Any, reference: Any) -> Original:
    if reference is None:
        return Original(model, adapters.has_layers(inner_model(model)))
    return Original(model, False) if isinstance(reference, str) else Original(reference, False)
