"""FLOW: sequences that the initial model finds easy count most."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..compiled import capturable
from ..problem import Statistics
from .arguments import Field, checked
from .base import HeadLike, Objective
from .sequences import sequence_numbers


class FLOWLoss(Objective):
    """Σ_s w_s Σ_{t in s} nll / n, w_s = exp(−mean nll of s under the initial model / τ).

    Take it where a data set has easy and hard samples, and the hard ones tear at the model. Not where the hard ones are
    what shall be learned. `fused_losses.initial_losses` makes initial_nll and τ in one pass.

    Easy samples count most. initial_nll and τ are fixed before training: `temperature` τ > 0 is the data set's median
    of the initial model's mean nll per sequence.

    Args of the call: hidden, head, labels; `initial_nll`: the initial model's mean nll of each sequence, [rows of 2-D
    labels], or with `sequence_ids` indexed by these, [ids]; `num_items`.

    3 GEMMs; 2 with a frozen head. Source: arXiv 2502.02797.
    """

    fields: ClassVar = {
        "initial_nll": Field("the initial model's mean nll of each sequence, [sequences]", of_sequences=True),
        "sequence_ids": Field("of packed sequences, an index of initial_nll", optional=True),
    }
    bounds: ClassVar = {"temperature": dict(above=0)}

    def __init__(self, temperature: float, **options: Any) -> None:
        super().__init__(**options)
        self.temperature = temperature

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"

    def token_loss(self, out: Statistics, weight: Tensor) -> Tensor:
        return weight * out.nll

    @capturable
    def forward(
        self,
        hidden: Tensor,
        head: HeadLike,
        labels: Tensor,
        *,
        initial_nll: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        num_items: Any = None,
    ) -> Tensor:
        tokens = self.prepare(hidden, head, labels)
        if initial_nll is None:
            raise ValueError("FLOWLoss needs initial_nll=: the initial model's mean nll of each sequence, [sequences]")
        if not isinstance(initial_nll, Tensor) or initial_nll.dim() != 1 or not initial_nll.is_floating_point():
            raise ValueError("initial_nll: expected a float tensor [sequences], the initial model's mean nll of each")
        initial_nll = checked(initial_nll.detach(), "initial_nll", "losses")
        sequence = sequence_numbers(tokens, labels, sequence_ids)
        if sequence_ids is not None:
            sequence = tokens.check(sequence, "sequence_ids", "indices", len(initial_nll))
        elif len(initial_nll) != labels.shape[0]:
            raise ValueError(
                f"initial_nll: expected {labels.shape[0]} numbers, one per row of labels, got {len(initial_nll)}"
            )
        weight = (-initial_nll.to(sequence.device, tokens.problem.accumulator) / self.temperature).exp()[sequence]
        return self.reduce(tokens, num_items, weight=weight)
