"""`Callback`: what a patched model's loss knows of its tokens, in the logs of any Trainer."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .callbacks import check_start, patch_of

# Sums over tokens since the last log, and the counts that divide them.
SUMS = ("nll", "tokens", "kl", "retained", "probability", "anchors", "weight", "weighted")
MEANS = {
    "nll": ("nll", "tokens"),
    "kl": ("kl", "retained"),
    "anchor_probability": ("probability", "anchors"),
    "mean_weight": ("weight", "weighted"),
}


class Callback(TrainerCallback, ExportableState):
    """Logs what a patched model's loss sees of its tokens, beside the loss of any Trainer.

        nll                   mean of −ln p[label] over the tokens with a label
        kl                    mean of KL(p_ref ‖ p) over those that are no anchors; where the objective has a reference
        anchor_probability    mean of p[label] over the anchors, tokens of confidence > 0; where the batches have any
        mean_weight           mean of ∂ℓ_t / ∂nll_t over the tokens with a label, ℓ_t being the loss of token t before
                              the sum is divided: 1 for cross-entropy, exp(−nll/τ) for TALR, p[label] for DFT, the
                              confidence for LAwF, nll_weight for JSD and top-k distillation

    Each is the mean over all tokens that were trained on since the last log, like the Trainer's "loss": over
    accumulated batches and over all ranks together. Evaluation does not count. What there is none of is left out. All
    come from the forward of the loss; nothing is computed for them but sums over vectors of one number a token. A loss
    at a temperature (JSD, reverse KL, top-k distillation) has nll and kl at that temperature; where it has an
    nll_weight too, the nll is that at temperature 1, and kl is left out. Where no token since the last log had a label,
    a warning says so, once.

    Use::

        fl.patch(model, fl.LAwFLoss(), reference="base")
        Trainer(model, ..., callbacks=[fl.huggingface.Callback()])

    The numbers are in trainer.state.log_history and on the progress bar. A Trainer calls what reports elsewhere
    (TensorBoard, W&B, ...) before the callbacks it is given; ``fl.huggingface.Callback().add_to(trainer)`` puts this
    one first, so that they are reported too.

    They are in the checkpoints, so training that is resumed between two logs goes on with the sums.

    Attributes: `last`, a dict of what was logged last.

    Args:
        prefix: of the names, such as "train/"; "" by default.

    Raises: TypeError for a prefix that is no text; ValueError, when training begins, where the model is not patched,
    or what it is held to is no original but the checkpoint that training is resumed from.

    Cost: sums of N numbers in each batch; with several ranks eight numbers are summed over them in each step.
    """

    def __init__(self, prefix: str = "") -> None:
        if not isinstance(prefix, str):
            raise TypeError(f"prefix: expected text that begins the names, such as 'train/', got {prefix!r}")
        self.prefix = prefix
        self.last: dict[str, float] = {}
        self._since_log: Tensor | None = None  # [8] SUMS over all ranks, without
        self._since_step: Tensor | None = None  # those of this rank since the last step
        self._patch: Any = None
        self._warned = False

    def __repr__(self) -> str:
        return f"Callback(prefix={self.prefix!r})"

    def add_to(self, trainer: Any) -> Any:
        """Puts it before all other callbacks of the Trainer; returns the Trainer."""
        trainer.callback_handler.callbacks.insert(0, self)
        trainer.state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        return trainer

    def state(self) -> dict[str, Any]:
        """For checkpoints."""
        sums = None if self._since_log is None else self._since_log.tolist()
        return {"args": {"prefix": self.prefix}, "attributes": {"sums": sums}}

    @property
    def sums(self) -> list[float] | None:
        """Since the last log, in the order of SUMS."""
        return None if self._since_log is None else self._since_log.tolist()

    @sums.setter
    def sums(self, values: list[float] | None) -> None:
        self._since_log = None if values is None else torch.tensor(values, dtype=torch.float64)

    # --- events of a Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._stop_listening()
        self._patch = patch_of(model)
        if self._patch is None:
            raise ValueError(
                f"Callback: {type(model).__name__} is not patched, so nothing is known of its tokens; call "
                "fused_losses.patch(model, loss) first, or put PatchCallback before this one"
            )
        check_start(type(self).__name__, model, state)
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # looked up by whoever saves
        saved = saved[-1] if isinstance(saved, list) else saved
        self.sums = saved["attributes"]["sums"] if state.global_step else None
        self._since_step, self.last = None, {}
        self._patch.listeners.append(self._listen)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since_step = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, self._since_step = self._since_step, None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # Not every backend and device sums float64; a step has no more tokens than float32 can count.
            step = torch.zeros(len(SUMS)) if step is None else step.float()
            step = step.to(args.device)
            dist.all_reduce(step)
        if step is not None:
            step = step.double().cpu() if step.device.type == "mps" else step.double()
            self._since_log = step if self._since_log is None else self._since_log.to(step) + step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._patch is None or self._since_log is None or logs is None or "loss" not in logs:
            return
        sums = dict(zip(SUMS, self._since_log.tolist(), strict=True))
        self._since_log = None
        if not (sums["tokens"] or self._warned) and state.is_world_process_zero:
            self._warned = True
            warnings.warn(
                f"Callback: none of the tokens up to step {state.global_step} since the last log had a label, so "
                "nothing was learned; see whether the rows have answers, and whether they are cut off",
                stacklevel=2,
            )
        self.last = {
            self.prefix + name: sums[total] / sums[count] for name, (total, count) in MEANS.items() if sums[count] > 0
        }
        logs.update(self.last)
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1].update(self.last)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_listening()

    # --- inside

    def _listen(
        self,
        nll: Tensor,
        valid: Tensor,
        kl: Tensor | None = None,
        weight: Tensor | None = None,
        confidence: Tensor | None = None,
    ) -> None:
        nothing = torch.zeros_like(valid)
        anchors = nothing if confidence is None else valid & (confidence > 0)
        retained = nothing if kl is None else valid & ~anchors
        zero = torch.zeros_like(nll)
        parts = [
            (nll, valid), (zero if kl is None else kl, retained), ((-nll).exp(), anchors),
            (zero if weight is None else weight, nothing if weight is None else valid),
        ]  # fmt: skip
        sums = [value for values, where in parts for value in (torch.where(where, values, 0).sum(), where.sum())]
        part = torch.stack([value.to(nll.dtype) for value in sums])
        self._since_step = part if self._since_step is None else self._since_step + part.to(self._since_step)

    def _stop_listening(self) -> None:
        if self._patch is not None and self._listen in self._patch.listeners:
            self._patch.listeners.remove(self._listen)
        self._patch = None
