"""verl: a module of yours for `model.external_lib`, which calls `use`.

    # my_loss.py
    from fused_losses.integrations.verl import use

    use("talr", {"temperature": 2.0})

    python -m verl.trainer.sft_trainer ... model.external_lib=my_loss model.use_fused_kernels=true

verl imports it before it builds the model and looks its loss up, in every process. Read and tested with verl 0.9.1; its
engine with FSDP, which needs a GPU, was not run.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..head import LMHead
from ..huggingface.per_token import PerToken, Request
from ..objectives import CrossEntropyLoss, Objective, TALRLoss
from ..objectives.base import OPTIONS
from ..objectives.talr import INTERPOLATION, median_temperature
from .settings import loss_of_labels


def use(loss: str = "sft", options: Mapping[str, Any] | None = None, head: bool = True) -> None:
    """Puts a loss of this package in the place of verl's `sft_loss`, for this process.

    loss = Σ_t loss_t / batch_num_tokens · dp_size, of the log-probabilities that verl's model returns; a median τ of
    TALR is that of the sequences of a micro-batch.

    Args:
        loss: a name, as `fused_losses.objectives.named.NAMED` has them, of a loss of the label's probability alone.
        options: of its constructor.
        head: log-probabilities and entropies with `use_fused_kernels` and `impl_backend: torch` come from
            `fused_losses.token_losses`, with the options gradient, tolerance, backend and scan; for PPO and its like
            too.

    Raises: ValueError for a loss that needs more than log-probabilities; what `loss_of_labels` raises; ImportError
    without verl.
    """
    objective = loss_of_labels(loss, options or {}, "verl")
    _check(objective)
    try:
        from verl.utils.experimental.torch_functional import FusedLinearForPPO
        from verl.workers.utils import losses
    except ImportError as error:
        raise ImportError(f"fused_losses.integrations.verl needs verl: pip install verl ({error})") from error
    losses.sft_loss = functools.partial(sft_loss, objective)
    if head:
        given = {name: getattr(objective, name) for name in OPTIONS}
        FusedLinearForPPO.forward = functools.partialmethod(log_probs_and_entropy, given)


def sft_loss(
    objective: Objective, config: Any, model_output: Mapping[str, Any], data: Any, dp_group: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """In the place of verl's function of this name: log_probs and loss_mask are nested tensors [B, ragged], or with
    `response_mask` padded ones [B, T]."""
    nll, mask = (
        -model_output["log_probs"],
        data["loss_mask" if model_output["log_probs"].is_nested else "response_mask"],
    )
    if nll.is_nested:
        lengths = nll.offsets().diff()
        # The mask is that of inputs, log-probabilities are of the token after each.
        nll, mask = nll.values(), mask.values().roll(-1)
        row = torch.repeat_interleave(torch.arange(len(lengths), device=nll.device), lengths)
    else:
        row = torch.arange(len(nll), device=nll.device)[:, None].expand_as(nll)
    valid = mask.bool()
    total = of_nll(objective, nll[valid], row[valid])
    return total / data["batch_num_tokens"] * data["dp_size"], {}


def of_nll(objective: Objective, nll: Tensor, sequence: Tensor) -> Tensor:
    """Σ loss_t of nlls [n] of the sequences of these numbers [n]."""
    options = {}
    if isinstance(objective, TALRLoss) and objective.temperature == "median":
        count = int(sequence.max()) + 1 if len(sequence) else 1
        options["temperature"] = median_temperature(
            nll.detach(), sequence, count, INTERPOLATION[objective.even_median], objective.process_group
        )
    return objective.token_loss(_only(nll), **options).sum()


def _only(nll: Tensor) -> Any:
    """Statistics of tokens that have but a nll: another is an AttributeError."""
    return SimpleNamespace(nll=nll)


def _check(objective: Objective) -> None:
    name, needs = type(objective).__name__, ", ".join(sorted(objective.wanted))
    if isinstance(objective, CrossEntropyLoss) and not objective.is_plain:
        needs = "logits for label_smoothing, z_loss and class_weights"
    if not needs:
        try:
            of_nll(objective, torch.ones(1), torch.zeros(1, dtype=torch.int64))
        except AttributeError as error:
            needs = str(error.name)
    if needs:
        raise ValueError(
            f"loss: {name} needs {needs}, and verl hands log-probabilities alone to its loss; take sft, talr, dft or "
            "infosft"
        )


def log_probs_and_entropy(
    _: Any, options: Mapping[str, Any], hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """In the place of FusedLinearForPPO.forward: log-probabilities of input_ids [B, T] or [T] in float32, entropies in
    the dtype of the hidden states; both differentiable."""
    rows, labels = hidden_states.flatten(0, -2), input_ids.flatten().to(torch.int64)
    found = PerToken(Request(float(temperature), outputs=("log_probs", "entropy")))
    positions = torch.arange(len(labels), device=labels.device)
    found.add((positions, labels.shape), rows, LMHead(vocab_weights), labels, dict(options))
    log_probs, entropy = (found.values[name].view(input_ids.shape) for name in ("log_probs", "entropy"))
    return log_probs.float(), entropy.to(hidden_states.dtype)
