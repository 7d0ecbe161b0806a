"""NeMo Automodel: a `loss_fn` for its YAML, in the place of its FusedLinearCrossEntropy.

    loss_fn:
      _target_: fused_losses.integrations.automodel.FusedLoss
      loss: talr
      options: {temperature: 2.0}

Its recipes hand hidden states and the head's weight, in place of logits, to subclasses of that class, and ask for
`output_hidden_states: true` in the model's section. Read and tested with nemo-automodel 0.7.0, whose recipes were not
run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..head import LMHead
from .settings import loss_of_labels

try:
    from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy

    MISSING = ""
except ImportError as error:
    FusedLinearCrossEntropy, MISSING = nn.Module, str(error)


class FusedLoss(FusedLinearCrossEntropy):
    """A loss of this package, by name and options, of hidden states [B, T, D] and a head's weight [V, D].

    loss = Σ_t loss_t / num_label_tokens; the sum where that is None. Labels [B, T] are aligned already. `loss_weights`
    [B, T] are the weights of WeightedLoss.

    Args:
        loss: a name, as `fused_losses.objectives.named.NAMED` has them.
        options: of its constructor.
        ignore_index, logit_softcapping: as of FusedLinearCrossEntropy.

    Raises, when it is made: ValueError for a loss that compares with a frozen original, reads a field of the batch, or
    takes means of groups, as Automodel hands none of these over; what `loss_of_labels` raises; ImportError without
    Automodel.
    """

    def __init__(
        self,
        loss: str = "sft",
        options: Mapping[str, Any] | None = None,
        ignore_index: int = -100,
        logit_softcapping: float = 0,
    ) -> None:
        if MISSING:
            raise ImportError(
                f"fused_losses.integrations.automodel needs NeMo Automodel: pip install nemo-automodel ({MISSING})"
            )
        super().__init__(ignore_index=ignore_index, logit_softcapping=logit_softcapping, reduction="sum")
        given = options.to_dict() if hasattr(options, "to_dict") else dict(options or {})
        self.objective = loss_of_labels(loss, {"ignore_index": ignore_index, **given}, "Automodel", ["weights"])

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        lm_weight: Tensor,
        num_label_tokens: int | None = None,
        grad_reduce_group: Any = None,
        loss_weights: Tensor | None = None,
    ) -> Tensor:
        weight = self.materialize_lm_weight(lm_weight, grad_reduce_group=grad_reduce_group)
        head = LMHead(weight, softcap=self.logit_softcapping or None)
        fields = {} if loss_weights is None else {"weights": loss_weights}
        return self.objective(hidden_states, head, labels, num_items=num_label_tokens or 1, **fields)
