"""Cross-entropy, with PyTorch's label smoothing and class weights, and a z-loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..compiled import capturable
from ..head import LMHead, Reference, as_head
from ..problem import Statistics
from ..tokens import Tokens, TracedTokens
from .arguments import item_count
from .base import HeadLike, Objective, _of_this_package
from .smoothing import entropy_of_classes, reference_of_classes, total_logits

REDUCTIONS = ("token_mean", "weighted_mean")


class CrossEntropyLoss(Objective):
    """Cross-entropy: Σ nll / n; with options Σ ((1 − ε)·w[label]·nll + ε/V·Σ_v w_v·(−log p_v) + z_loss·lse²) / n.

    Take it where everything in the data is to be learned, and as the baseline of all others. Smoothing keeps the model
    from certainty, and pulls all of its distribution, not only that of the label, towards the uniform one: against
    forgetting take a KL to the original (SFTKL, LAwF). A z-loss (1e-4) keeps the logits of a model that is trained from
    scratch, or in half precision, from drifting off.

    Args:
        label_smoothing: ε in [0, 1], exactly as of torch.nn.functional.cross_entropy: ε / V on every class.
        z_loss: ≥ 0; times lse², of each token, whatever its class weight.
        class_weights: [V] finite numbers, not all 0, that multiply each class's term; PyTorch's `weight`. Below 0 a
            class is unlearned, without a floor to its loss; smoothing under a soft-cap takes none below 0. No parameter
            and in no state dict. It moves with `.to(device)`, and where the call is elsewhere it is copied there each
            time.
        reduction: "token_mean": all is divided by n. "weighted_mean": as PyTorch's and Liger's mean, which divide by
            Σ w[label] (by 1 where that is 0), the z-loss by n. No difference without class_weights. With accumulated
            gradients, also in a Trainer, that is the mean of the parts' means, as PyTorch's is, unless `num_items` is
            given.

    Args of the call: hidden [..., D], head, labels [...] int64, `num_items` (a number or a tensor of one; default: the
    tokens with a label; for weighted_mean a pair: Σ w[label], and n). Returns a scalar, float32 (float64 for float64).

    Raises, besides what every objective raises: ValueError for class_weights of another length than V, and for some
    below 0 with smoothing under a soft-cap.

    3 GEMMs; 2 with a frozen head. All off: nothing is added. z_loss: a gather of N rows of the head. Smoothing costs a
    pass over the head's weight, and for a trained head a gradient of its size while backward adds it up; it is exact,
    with sparse gradients too, and not part of what their bound is about. Under a soft-cap it is a KL to a reference
    with that distribution at every token: the passes of a reference, without its GEMM, and exact gradients, as the
    report says.
    """

    bounds: ClassVar = {"label_smoothing": dict(least=0, most=1), "z_loss": dict(least=0)}
    class_weights: Tensor | None

    def __init__(
        self,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        *,
        class_weights: Any = None,
        reduction: str = "token_mean",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.label_smoothing, self.z_loss, self.reduction = label_smoothing, z_loss, reduction
        checked = _checked_weights(class_weights)
        self.register_buffer("class_weights", checked, persistent=False)
        self._least_class_weight = _least(checked)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "reduction" and value not in REDUCTIONS:
            raise ValueError(f"reduction: expected {' or '.join(REDUCTIONS)}, got {value!r}")
        if name == "class_weights":
            value = _checked_weights(value)
            self._least_class_weight = _least(value)
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        given = [f"{name}={getattr(self, name)}" for name in ("label_smoothing", "z_loss") if getattr(self, name)]
        if self.class_weights is not None:
            given += [f"class_weights=[{len(self.class_weights)}]", f"reduction={self.reduction!r}"]
        return ", ".join(given)

    @property
    def is_plain(self) -> bool:
        """Whether it is the mean nll."""
        return not self.label_smoothing and not self.z_loss and self.class_weights is None

    @property
    def is_own(self) -> bool:
        """A subclass with a token_loss of its own is one, as of `Objective`."""
        own = type(self).token_loss is not CrossEntropyLoss.token_loss
        return own and not type(self).fields and not _of_this_package(type(self))

    @property
    def divides_by_items(self) -> bool:
        """A mean over weights cannot be divided by the tokens of several batches."""
        return self.class_weights is None or self.reduction != "weighted_mean"

    def token_loss(
        self, out: Statistics, weight: Tensor | None = None, smoothing: Tensor | None = None,
        entropy: Tensor | None = None, z_weight: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """[C] weights of nll, of the smoothing (its lse, or under a soft-cap its KL and `entropy`), and of lse²."""
        loss = out.nll if weight is None else weight * out.nll
        if smoothing is not None:
            loss = loss + smoothing * (out.lse if entropy is None else out.kl + entropy)
        return loss if z_weight is None else loss + z_weight * out.lse.square()

    @capturable
    def forward(
        self,
        hidden: Tensor,
        head: HeadLike,
        labels: Tensor,
        *,
        reference: Reference | None = None,
        num_items: Any = None,
        **fields: Tensor,
    ) -> Tensor:
        if isinstance(num_items, (tuple, list)) and self.class_weights is None:
            raise ValueError(
                f"num_items: expected the number of tokens, got {num_items!r}; a pair is for class_weights with "
                "reduction='weighted_mean'"
            )
        if self.is_plain or self.is_own:
            return super().forward(hidden, head, labels, reference=reference, num_items=num_items, **fields)
        self.check_call(reference, fields)
        whole = as_head(head).local()
        if not self.label_smoothing or whole.softcap is None or not isinstance(hidden, Tensor):
            return self._of_tokens(self.prepare(hidden, whole, labels), num_items)
        self._check_length(whole)
        if self._least_class_weight < 0:
            raise ValueError(
                "class_weights: expected numbers ≥ 0 with label_smoothing under a soft-cap, got "
                f"{self._least_class_weight}; take label_smoothing=0, or a head without softcap"
            )
        classes = reference_of_classes(hidden, whole, self.class_weights, self.temperature_of_logits)
        tokens = self.prepare(hidden, whole, labels, classes)
        if tokens.problem.tolerance is not None:  # all of that distribution is in what the entries leave out
            tokens.report.note = "label smoothing under a soft-cap has no sparse form"
            tokens = replace(tokens, problem=replace(tokens.problem, tolerance=None))
        return self._of_tokens(tokens, num_items)

    def _of_tokens(self, tokens: Tokens, num_items: Any) -> Tensor:
        problem, epsilon = tokens.problem, self.label_smoothing
        vocabulary, acc = problem.head.vocabulary, problem.accumulator
        one = problem.hidden.new_ones(problem.labels.shape, dtype=acc)
        weight, classes, mass, n = one, None, one.new_ones(()) * vocabulary, None
        if self.class_weights is not None:
            self._check_length(problem.head)
            classes = self.class_weights.to(problem.labels.device, acc)
            weight, mass = _of_labels(classes, tokens), classes.sum()
            if self.reduction == "weighted_mean":
                n, num_items = _sum_of_weights(num_items, weight)
        # In the weights, as a gradient in bfloat16 that is divided afterwards is rounded once more.
        n_of_z = item_count(num_items, tokens.count)
        n = n_of_z if n is None else n
        per_token = {"weight": (1 - epsilon) * weight / n}
        if self.z_loss:
            per_token["z_weight"] = self.z_loss * one / n_of_z
        if epsilon:
            per_token["smoothing"] = epsilon * mass / vocabulary * one / n
            if problem.has_reference:
                per_token["entropy"] = one * entropy_of_classes(classes, vocabulary)
        loss = self.reduce(tokens, 1, **per_token)
        if tokens.observer is not None:
            tokens.observer.were_divided(n)
        if not epsilon or problem.has_reference:
            return loss
        return tokens.reported(loss - epsilon / vocabulary * total_logits(tokens, classes) / n)

    def _check_length(self, head: Any) -> None:
        """Of one process's head; of one spread over ranks all of them are counted in `prepare`."""
        weights, spread = self.class_weights, isinstance(head, LMHead) and head.is_spread
        if weights is not None and not spread and len(weights) != head.vocabulary:
            raise ValueError(
                f"class_weights: expected [V] with V = {head.vocabulary}, the rows of the head's weight, got "
                f"[{len(weights)}]; give one number for each id, and for those that pad the vocabulary"
            )


def _of_labels(classes: Tensor, tokens: Tokens) -> Tensor:
    """The weight of each token's label; labels out of range, which in a graph are not known yet, have any."""
    labels = tokens.problem.labels
    if isinstance(tokens, TracedTokens):
        labels = torch.where(tokens.valid, labels, 0).clamp(0, len(classes) - 1)
        return torch.where(tokens.valid, classes[labels], 0)
    return classes[labels]


def _sum_of_weights(num_items: Any, weight: Tensor) -> tuple[Any, Any]:
    """Σ w[label], and what is left of `num_items`."""
    if num_items is None:
        total = weight.sum()
        return torch.where(total != 0, total, 1), None
    if not isinstance(num_items, (tuple, list)) or len(num_items) != 2 or any(x is None for x in num_items):
        raise ValueError(
            "num_items: for reduction='weighted_mean' expected a pair (the sum of the labels' class weights, the "
            f"number of tokens), got {num_items!r}"
        )
    return item_count(num_items[0], 0), num_items[1]


def _least(weights: Tensor | None) -> float:
    return 0.0 if weights is None else weights.min().item()


def _checked_weights(weights: Any) -> Tensor | None:
    if weights is None:
        return None
    if getattr(weights, "requires_grad", False):
        raise ValueError(
            "class_weights: expected numbers, got a tensor that requires a gradient, which would be lost; give it "
            "detached"
        )
    expected = "class_weights: expected [V] finite numbers, not all 0"
    try:
        found = torch.as_tensor(weights)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{expected}, got {type(weights).__name__}: {error}") from error
    if found.dtype == torch.bool or found.is_complex():
        raise TypeError(f"{expected}, got {found.dtype}")
    if found.dim() != 1:
        raise ValueError(f"{expected}, got shape {list(found.shape)}; one for each class, whatever the token")
    found = found if found.is_floating_point() else found.float()
    if not bool(found.isfinite().all()) or not bool((found != 0).any()):
        wrong = found[~found.isfinite()].tolist() or [0]
        raise ValueError(f"{expected}, got {wrong[0]}")
    return found.detach()
