"""STM: what the start model finds hard to predict is not learned."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..compiled import capturable
from ..head import Reference
from ..problem import Statistics
from ..tokens import loss_of_chunk
from .arguments import Field, item_count
from .base import HeadLike, Objective

REDUCTIONS = ("token_mean", "kept_mean")


class STMLoss(Objective):
    """Selective token masking: Σ nll / n over the tokens whose perplexity under the start model is below `threshold`.

    That perplexity is exp(nll) of the label under the model as it was before training: 1 / its probability. Take it
    where the data's style is far from the model's own and general ability must stay: what is dropped is what changes
    the model most. Not where new facts are to be learned: the tokens that carry them are hard, and the ones dropped.

    Args:
        threshold: of the perplexity, > 1.
        reduction: "token_mean": n is the number of tokens with a label, or `num_items`, so the loss falls with the part
            that is kept. "kept_mean": n is the number of kept tokens of the call, as where their labels are set to −100
            beforehand, which is what the authors do; `num_items` then counts kept tokens.

    Args of the call: hidden [..., D], head, labels int64 [...]; one of `reference`, the start model, and
    `initial_token_nll` [...], its nll of each token (`token_losses(...).nll` before training; anything where the label
    is ignored), which needs no model at hand; `num_items`.

    Raises, besides what every objective raises: ValueError without either of the two, or with both.

    GEMMs: 3, 2 with a frozen head; with a reference one more, and 6 (4) for reduction="kept_mean" without num_items.
    Source: arXiv 2501.14315 and appier-research/robust-llm-finetunes, whose threshold is 2.5.
    """

    reference_is_optional = True
    fields: ClassVar = {
        "initial_token_nll": Field("the start model's nll of each token, of the labels' shape", "losses", optional=True)
    }
    bounds: ClassVar = {"threshold": dict(above=1)}

    def __init__(self, threshold: float = 2.5, reduction: str = "token_mean", **options: Any) -> None:
        super().__init__(**options)
        self.threshold, self.reduction = threshold, reduction

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "reduction" and value not in REDUCTIONS:
            raise ValueError(f"reduction: expected {' or '.join(REDUCTIONS)}, got {value!r}")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, reduction={self.reduction!r}"

    @property
    def divides_by_items(self) -> bool:
        """The tokens that a Trainer counts are not those that are kept."""
        return self.reduction != "kept_mean"

    def token_loss(self, out: Statistics, initial_token_nll: Tensor | None = None) -> Tensor:
        initial = out.reference_nll if initial_token_nll is None else initial_token_nll
        return torch.where(initial < math.log(self.threshold), out.nll, 0)

    @capturable
    def forward(
        self,
        hidden: Tensor,
        head: HeadLike,
        labels: Tensor,
        *,
        reference: Reference | None = None,
        initial_token_nll: Tensor | None = None,
        num_items: Any = None,
    ) -> Tensor:
        if (reference is None) == (initial_token_nll is None):
            raise ValueError(
                "STMLoss needs one of reference=, the start model's hidden states, and initial_token_nll=, its nll of "
                f"each token; got {'neither' if reference is None else 'both'}"
            )
        tokens = self.prepare(hidden, head, labels, reference)
        per_token = {}
        if initial_token_nll is not None:
            field = self.fields["initial_token_nll"]
            per_token["initial_token_nll"] = field.read(tokens, initial_token_nll, "initial_token_nll")
        if self.reduction == "token_mean" or num_items is not None:
            return self.reduce(tokens, num_items, **per_token)
        if per_token:
            kept = tokens.total(per_token["initial_token_nll"] < math.log(self.threshold))
            return self.reduce(tokens, 1, **per_token) / item_count(None, kept)
        wanted, k = self._statistics()
        out = tokens.losses(wanted, k)
        kept = tokens.total(out.reference_nll < math.log(self.threshold))
        masked = loss_of_chunk(self.token_loss, {}, wanted, tokens)
        return tokens.total(masked(out, slice(None))) / item_count(None, kept)
