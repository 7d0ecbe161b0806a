"""A divergence from a teacher: generalised Jensen-Shannon as GKD has it, and the reverse KL."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..compiled import capturable
from ..head import Reference
from ..problem import Statistics
from .base import HeadLike
from .distillation import Distillation


class OfAReference(Distillation):
    """The divergence that `beta` names, from the reference."""

    needs_reference = True

    @property
    def only_follows(self) -> bool:
        return not self.nll_weight

    def token_loss(self, out: Statistics) -> Tensor:
        return self.plus_nll(out.divergence, out)

    @capturable
    def forward(
        self,
        hidden: Tensor,
        head: HeadLike,
        labels: Tensor,
        *,
        reference: Reference | None = None,
        num_items: Any = None,
    ) -> Tensor:
        self.check_call(reference, {})
        loss = self.reduce(self.prepare(hidden, head, labels, reference), num_items)
        return self.plus_nll_of_another_pass(loss, hidden, head, labels, num_items)


class JSDLoss(OfAReference):
    """Generalised Jensen-Shannon distillation: Σ (JSD_β + nll_weight · nll) / n.

    JSD_β = β KL(p_ref ‖ m) + (1 − β) KL(p ‖ m), m = β p_ref + (1 − β) p, where p is softmax(z / temperature) of the
    logits z, and p_ref likewise of the reference. β = 0 is the forward KL(p_ref ‖ p), the limit of JSD_β / β; β = 1 is
    the reverse KL(p ‖ p_ref), the limit of JSD_β / (1 − β). There is no factor temperature².

    Take it to distil from a teacher with the same vocabulary that is in memory, or to stay near the model one starts
    from, on text of the student's own (GKD) or of a data set. The forward KL covers all that the teacher may say, and
    learns most from a data set; towards β = 1 the student keeps to what it does well, which suits text of its own.
    Between them the loss of a token is bounded, by ln 2 at β = 0.5, so those on which the two disagree altogether
    hardly count. Not for teachers who give a few log-probabilities only: `TopKDistillationLoss`.

    Args:
        beta: β in [0, 1].
        temperature: > 0; divides the logits of both models in the divergence, not in the nll.
        nll_weight: ≥ 0, of the cross-entropy with the labels. Hinton's α T² KL + (1 − α) nll is α T² times this loss
            with β = 0 and nll_weight = (1 − α) / (α T²).

    Args of the call: hidden [..., D], head, labels int64 [...] (every token to distil on needs one), `reference`: the
    teacher's hidden states and head, `num_items`. Returns a scalar, float32 (float64 for float64).

    4 GEMMs; 3 with a frozen head. With both a temperature and an nll_weight 3 (2) more, for a pass at temperature 1:
    a patched model logs the nll of that one, `gradient_report` is of the other. Gradients are exact then,
    and where β > 0.
    Source: arXiv 2306.13649; conventions as in TRL's `DistillationTrainer`.
    """

    bounds: ClassVar = Distillation.bounds | {"beta": dict(least=0, most=1)}

    def __init__(self, beta: float = 0.5, temperature: float = 1.0, nll_weight: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.beta, self.temperature, self.nll_weight = beta, temperature, nll_weight

    def extra_repr(self) -> str:
        return f"beta={self.beta}, temperature={self.temperature}, nll_weight={self.nll_weight}"


class ReverseKLLoss(OfAReference):
    """Reverse KL: Σ KL(p ‖ p_ref) / n, p = softmax(z / temperature). It is `JSDLoss` with β = 1.

    Take it where the student samples the text itself (on-policy): the mean of its sums over answers is then the KL of
    whole answers. It seeks modes: what the teacher rules out is unlearned, while little pulls towards what the
    student never says, so it changes the student least. On text of a data set, and for what the student does not know
    yet, the forward KL, `JSDLoss(0)`, is the one to take.

    Args:
        temperature: > 0; divides the logits of both models. There is no factor temperature².

    Args of the call: hidden [..., D], head, labels int64 [...], `reference`: the teacher's hidden states and head,
    `num_items`.

    4 GEMMs; 3 with a frozen head. Gradients are exact. Source: arXiv 2306.08543, 2306.13649.
    """

    beta = 1.0
    bounds: ClassVar = {"temperature": dict(above=0)}

    def __init__(self, temperature: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.temperature = temperature

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
