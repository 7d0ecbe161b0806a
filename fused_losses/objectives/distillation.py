"""What losses against a teacher share: a temperature, and a cross-entropy part that has none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from ..head import Reference
from ..preparation import prepare
from ..problem import Statistics
from ..tokens import Tokens
from ..validation import Options
from .arguments import item_count
from .base import HeadLike, Objective

TWO_SOFTMAXES = "the logits are taken at two temperatures, whose gradients have no common sparse form"


class Distillation(Objective):
    """A divergence at `temperature`, plus nll_weight · nll at temperature 1.

    Where temperature is not 1 the nll is that of another softmax, so it takes a pass of its own, and gradients of both
    are exact: a certificate of one would say nothing of their sum.
    """

    bounds: ClassVar = {"temperature": dict(above=0), "nll_weight": dict(least=0)}
    temperature: float = 1.0
    nll_weight: float = 0.0

    @property
    def temperature_of_logits(self) -> float:  # type: ignore[override]
        return self.temperature

    @property
    def has_two_softmaxes(self) -> bool:
        return self.nll_weight > 0 and self.temperature != 1

    def plus_nll(self, loss: Tensor, out: Statistics) -> Tensor:
        """Of the tokens of a pass: their loss and, where it is that at temperature 1, their nll."""
        return loss + self.nll_weight * out.nll if self.nll_weight > 0 and self.temperature == 1 else loss

    def prepare(
        self, hidden: Tensor, head: HeadLike, labels: Tensor, reference: Reference | None = None, **ids: Any
    ) -> Tokens:
        tokens = super().prepare(hidden, head, labels, reference, **ids)
        if not self.has_two_softmaxes:
            return tokens
        if tokens.problem.tolerance is not None:
            tokens.report.note = TWO_SOFTMAXES
        return replace(tokens, problem=replace(tokens.problem, tolerance=None), observer=None)

    def plus_nll_of_another_pass(
        self, loss: Tensor, hidden: Tensor, head: HeadLike, labels: Tensor, num_items: Any
    ) -> Tensor:
        if not self.has_two_softmaxes:
            return loss
        options = Options(self.ignore_index, "exact", self.tolerance, self.backend, self.scan)
        tokens = replace(prepare(hidden, head, labels, None, options), observer=self._observer)
        return loss + tokens.summed(self._weighted_nll, frozenset()) / item_count(num_items, tokens.count)

    def _weighted_nll(self, out: Statistics) -> Tensor:
        return self.nll_weight * out.nll
