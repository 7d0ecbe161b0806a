"""What a training has done so far: anchors' probabilities, KL to the original elsewhere, nll of held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..anchors.spans import spell
from ..head import Reference
from ..huggingface.exchange import in_force, other_patch
from ..huggingface.reference_forward import evaluating
from ..labels import plain
from ..objectives import LAwFLoss, Objective
from ..objectives.arguments import item_count
from .data import IGNORED, Row
from .objective import anchored, labelled
from .settings import MEASURED_TOKENS


class Seen(Objective):
    """Keeps the statistics of a call's tokens."""

    reference_is_optional = True
    fields: ClassVar = {name: replace(field, optional=True) for name, field in LAwFLoss.fields.items()}

    def forward(
        self, hidden: Tensor, head: Any, labels: Tensor, *, confidence: Tensor | None = None,
        target_probability: Tensor | None = None, reference: Reference | None = None, num_items: Any = None,
    ) -> Tensor:  # fmt: skip
        tokens = self.prepare(hidden, head, labels, reference)
        out = tokens.losses(frozenset())
        self.out = out
        self.confidence = None if confidence is None else tokens.select(confidence, "confidence").to(out.nll)
        self.target = (
            None if target_probability is None else tokens.select(target_probability, "target_probability").to(out.nll)
        )
        return tokens.total(out.nll) / item_count(num_items, tokens.count)


class Measurement:
    """Measures a patched model, in eval() and without gradients; its patch is as before afterwards.

    anchor_probability: mean of p[label] over the corrected tokens; least_anchor: the least of p[label] / q[label],
    where q is what the anchor asks for, c + (1 − c)·p_ref[label] or p*; kl_retained: mean of KL(p_ref ‖ p) over the
    tokens of corrected and retained rows that are no anchors; nll_heldout: mean nll of the held-out text's labels. What
    there is none of is left out. `least`, of the last measurement: the row and the position of the least anchor.

    Args:
        model: patched.
        rows: of which the corrected and retained ones are measured, up to MEASURED_TOKENS.
        heldout: rows of held-out text.
        collate: a collator that carries anchors; `plain_collate`: one without.
        reference: as in `other_patch`.
    """

    def __init__(
        self, model: nn.Module, rows: Sequence[Row], heldout: Sequence[Row], collate: Callable, plain_collate: Callable,
        reference: Any, batch_size: int = 8,
    ) -> None:  # fmt: skip
        self.model, self.batch_size = model, batch_size
        self.rows = _some([row for row in rows if row.corrected or row.role == "retain"])
        self.heldout = list(heldout)
        self.collate, self.plain_collate = collate, plain_collate
        self.seen = Seen()
        self.with_reference = other_patch(model, self.seen, reference) if self.rows else None
        self.alone = other_patch(model, self.seen)
        self.targeted = any(row.target_probability is not None for row in self.rows)
        # In the order in which a batch's tokens come.
        self.anchors = [(row, at) for row in self.rows for at in sorted(at for at, _ in row.anchors)]
        self.least: tuple[Row, int] | None = None

    def __call__(self, heldout: bool = True) -> dict[str, float]:
        found: dict[str, float] = {}
        with evaluating(self.model), torch.no_grad():
            if self.rows:
                found |= self._of_rows()
            if self.heldout and heldout:
                with in_force(self.model, self.alone):
                    parts = [out.nll for out in self._batches(labelled(self.heldout), self.plain_collate)]
                found["nll_heldout"] = float(torch.cat(parts).cpu().double().mean())
        return found

    def _of_rows(self) -> dict[str, float]:
        probability, share, kl = [], [], []
        with in_force(self.model, self.with_reference):
            for out in self._batches([self._fields(row) for row in self.rows], self.collate):
                c = self.seen.confidence
                anchor = c > 0
                r = (-out.reference_nll).exp()
                asked = c + (1 - c) * r
                if self.seen.target is not None:
                    asked = torch.maximum(torch.where(anchor, self.seen.target, asked), r)
                p = (-out.nll).exp()
                probability.append(p[anchor])
                share.append((p / asked)[anchor])
                kl.append(out.kl[~anchor])
        found = {}
        if len(of_anchors := torch.cat(probability)):
            found["anchor_probability"] = float(of_anchors.cpu().double().mean())
            least, at = torch.cat(share).min(0)
            found["least_anchor"], self.least = float(least), self.anchors[int(at)]
        if len(retained := torch.cat(kl)):
            found["kl_retained"] = float(retained.cpu().double().mean())
        return found

    def _fields(self, row: Row) -> dict[str, Any]:
        fields = anchored(row)
        if self.targeted:
            fields.setdefault("target_probability", [0.0] * len(row.input_ids))
        return fields

    def _batches(self, rows: list[dict], collate: Callable) -> Iterator[Any]:
        device = next(self.model.parameters()).device
        for at in range(0, len(rows), self.batch_size):
            batch = collate(rows[at : at + self.batch_size])
            self.model(**{name: plain(v).to(device) for name, v in batch.items()}, use_cache=False)
            yield self.seen.out


def where_is(row: Row, at: int, tokenizer: Any) -> dict[str, Any]:
    """A corrected token: its record, its position in the answer, its text, and the text before it in the answer."""
    start = next(i for i, label in enumerate(row.labels) if label != IGNORED)
    text, spans = spell(tokenizer, row.input_ids[start:])
    begin, end = spans[at - start]
    return {"record": row.where, "position": at - start, "text": text[begin:end], "before": text[:begin]}


def _some(rows: list[Row]) -> list[Row]:
    """As many as have MEASURED_TOKENS, corrected and retained ones in turn, at least one."""
    kinds = [[row for row in rows if row.corrected], [row for row in rows if not row.corrected]]
    found: list[Row] = []
    for kind in kinds:
        left = MEASURED_TOKENS
        for row in kind:
            left -= len(row.input_ids)
            if left >= 0 or row is kind[0]:
                found.append(row)
    return found
