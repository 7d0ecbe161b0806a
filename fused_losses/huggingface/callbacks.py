"""`FinchCallback`: a learning rate that falls where the loss is high, as such batches make a model forget most."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..objectives.options import check_number
from .sharding import is_sharded
from .wrappers import STATE

EPSILON = 1e-8
MAX_FACTOR = 2.5  # where no largest learning rate is given
STEPS_IN_BACKWARD = ("lomo", "adalomo", "layerwise")  # of the names of optimizers


class FinchCallback(TrainerCallback, ExportableState):
    """FINCH, a loss-adaptive learning rate for a Trainer with a patched model.

        η_i = min(η / √(L̄_i / target + ε), max_learning_rate),   L̄_i = smoothing · L̄_{i−1} + (1 − smoothing) · L_i

    η is what the learning-rate schedule has set, for each group of parameters; L_i the mean nll of the tokens with a
    label in the i-th batch, all accumulated parts and all ranks together, whatever the objective is; L̄_1 = L_1. The
    first-order bound of what a step forgets, η_i √L, is then about the same for every batch. With linear or cosine
    decay FINCH multiplies it; the paper's schedule is FINCH alone, so lr_scheduler_type="constant".

    Take it where hard tokens are what is to be learned (new knowledge, a language of which little was seen), so that
    weighting them down, as TALR or FLOW do, would keep the model from learning them. It leaves the objective as it
    is, and goes with any. Not with losses that are not likelihoods, such as JSD at a temperature, whose nll is that
    of another softmax; nor where a batch is small and losses differ wildly: raise `smoothing` then.

    Of the paper (2605.20005, read in two summaries and one implementation of others, not in the original): the bound,
    the form min(η_base / √(L̄ + ε), η_max), the average with 0.9, and η_max = 5e-5. Ours: that η is the schedule's;
    `target`, a loss at which the learning rate is the schedule's own (the paper's is 1); ε = 1e-8; and the default of
    max_learning_rate.

    Args:
        smoothing: in [0, 1); 0: each batch by itself.
        max_learning_rate: η_max, > 0. None: 2.5 times what the schedule has set (5e-5 for the 2e-5 of that
            implementation).
        target: > 0, in nats.

    Attributes: `average`, L̄, None before the first step; `factor`, η_i / η of the first group. Both are added to
    what the Trainer logs, as finch_nll and finch_factor; its "learning_rate" is the schedule's.

    Use: ``Trainer(fl.patch(model), ..., callbacks=[fl.huggingface.FinchCallback()])``. fl.patch(model) alone leaves
    the loss as it is. Gradient accumulation, evaluation in between, several groups and any schedule work: the
    learning rates are set just before the optimizer's step and put back right after. L̄ is in the checkpoints, and
    training that is resumed goes on with it. A batch without labels, or with a loss that is not finite, leaves L̄ as
    it is.

    Raises, when training begins: ValueError where the model is not patched, or what it is held to is no original but
    the checkpoint that training is resumed from; NotImplementedError with DeepSpeed, LOMO and layerwise optimizers,
    which take their step within backward, before the loss of the batch is known. In the first step: RuntimeError for
    a trainer that does not ask the model for a loss.

    Cost: one number is read from the device in each step, and with several ranks summed over them.
    """

    def __init__(self, smoothing: float = 0.9, max_learning_rate: float | None = None, target: float = 1.0) -> None:
        self.smoothing = check_number(smoothing, "smoothing", least=0, most=1)
        if self.smoothing == 1:
            raise ValueError("smoothing: expected a number below 1, with which the average would never change, got 1")
        self.target = check_number(target, "target", above=0)
        self.max_learning_rate = max_learning_rate
        if max_learning_rate is not None:
            self.max_learning_rate = check_number(max_learning_rate, "max_learning_rate", above=0)
        self.average: float | None = None
        self.factor = 1.0
        self._total: Tensor | None = None  # [2] the sum of nll and the tokens since the last step
        self._scheduled: list[tuple[dict, Any]] = []
        self._patch: Any = None

    def __repr__(self) -> str:
        return (
            f"FinchCallback(smoothing={self.smoothing}, max_learning_rate={self.max_learning_rate}, "
            f"target={self.target})"
        )

    def state(self) -> dict[str, Any]:
        """For checkpoints."""
        args = {"smoothing": self.smoothing, "max_learning_rate": self.max_learning_rate, "target": self.target}
        return {"args": args, "attributes": {"average": self.average}}

    # --- events of a Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._check(args, model)
        check_start("FinchCallback", model, state)
        name = type(self).__name__
        saved = state.stateful_callbacks.setdefault(name, self.state())  # a Trainer looks it up when it saves
        saved = saved[0] if isinstance(saved, list) else saved
        self.average = saved["attributes"]["average"] if state.global_step else None
        self._total, self.factor = None, 1.0
        self._patch = patch_of(model)
        self._patch.listeners.append(self._listen)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._put_back()
        self._total = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        nll, tokens = self._summed(args.device)
        if self._patch is not None and not self._patch.used:
            raise RuntimeError(
                "FinchCallback: the trainer made a step without asking the model for a loss, so the nll of its batches "
                "is not known; it makes its loss of logits or elsewhere. Leave the callback out, or train where the "
                "model is asked, as Trainer and SFTTrainer do"
            )
        if tokens > 0 and math.isfinite(nll):
            mean = nll / tokens
            kept = mean if self.average is None else self.average
            self.average = self.smoothing * kept + (1 - self.smoothing) * mean
        if self.average is None:
            return
        factor = 1 / math.sqrt(self.average / self.target + EPSILON)
        for at, group in enumerate(optimizer.param_groups):
            rate = float(group["lr"])
            most = MAX_FACTOR * rate if self.max_learning_rate is None else self.max_learning_rate
            new = min(rate * factor, most)
            if at == 0:
                self.factor = new / rate if rate else factor
            self._set(group, new)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._put_back()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._patch is None or self.average is None or logs is None or "loss" not in logs:
            return
        more = {"finch_nll": self.average, "finch_factor": self.factor}
        logs.update(more)
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1].update(more)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._put_back()
        self._stop_listening()

    # --- inside

    def _check(self, args: Any, model: Any) -> None:
        self._stop_listening()
        if patch_of(model) is None:
            raise ValueError(
                f"FinchCallback: {type(model).__name__} is not patched, so the nll of its batches is not known; call "
                "fused_losses.patch(model) first, which leaves its loss as it is, or put PatchCallback before this one"
            )
        optim = getattr(args.optim, "value", str(args.optim))
        if getattr(args, "deepspeed", None) or any(name in optim for name in STEPS_IN_BACKWARD):
            who = "DeepSpeed" if getattr(args, "deepspeed", None) else f"optim={optim!r}"
            raise NotImplementedError(
                f"FinchCallback: {who} takes its step within backward, before the loss of the batch is known; leave "
                "one of the two out"
            )

    def _listen(self, nll: Tensor, valid: Tensor, **others: Any) -> None:
        part = torch.stack([nll.sum(), valid.sum().to(nll.dtype)])
        self._total = part if self._total is None else self._total + part.to(self._total)

    def _summed(self, device: Any) -> tuple[float, float]:
        """Σ nll and the number of tokens since the last step, over all ranks."""
        total = self._total
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            total = torch.zeros(2) if total is None else total.float()
            total = total.to(device)
            dist.all_reduce(total)
        self._total = None
        nll, tokens = (0.0, 0.0) if total is None else total.tolist()
        return nll, tokens

    def _set(self, group: dict, rate: float) -> None:
        before = group["lr"]
        if isinstance(before, Tensor):  # of a compiled or captured optimizer, which holds on to it
            self._scheduled.append((group, before.clone()))
            before.fill_(rate)
        else:
            self._scheduled.append((group, before))
            group["lr"] = rate

    def _put_back(self) -> None:
        for group, rate in self._scheduled:
            if isinstance(rate, Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate
        self._scheduled = []

    def _stop_listening(self) -> None:
        if self._patch is not None and self._listen in self._patch.listeners:
            self._patch.listeners.remove(self._listen)
        self._patch = None


def patch_of(model: Any) -> Any:
    """What a patched model carries, through whatever is around it; None where it is not patched."""
    found = _patched(model)
    return None if found is None else vars(found)[STATE]


def _patched(model: Any) -> Any:
    """The patched model in whatever is around it, or None."""
    seen = 0
    while isinstance(model, nn.Module) and seen < 8:
        state = vars(model).get(STATE)
        if state is not None:
            return None if state.loss is None else model
        inner = vars(model).get("_orig_mod", vars(model)["_modules"].get("_orig_mod"))
        inner = inner if inner is not None else vars(model)["_modules"].get("module")
        if inner is None and hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            inner = model.get_base_model()  # type: ignore[operator]
        model, seen = inner, seen + 1
    return None


def check_start(who: str, model: Any, state: Any) -> None:
    """When training begins: ValueError where it is resumed and reference="start" has the checkpoint's weights.

    They are the checkpoint's where somebody has loaded it before the model was patched, as some trainers load an
    adapter. Nothing is known of a model in pieces on several ranks.
    """
    patch = patch_of(model)
    if not state.global_step or patch is None or patch.source is None:
        return
    pairs = list(patch.source.trained(_patched(model)))
    if pairs and all(_known_equal(*pair) for pair in pairs):
        raise ValueError(
            f"{who}: reference='start' has the weights of the checkpoint that training is resumed from, at step "
            f"{state.global_step}, and not those of the model it started from: the checkpoint was loaded before the "
            "model was patched; load the model as it was at first and patch that, take reference='base' with a PEFT "
            "adapter, or give the original model. Where the steps before have moved no weight, begin anew"
        )


def _known_equal(begun: Tensor, now: Tensor) -> bool:
    if any(t.device.type == "meta" or is_sharded(t) for t in (begun, now)) or begun.shape != now.shape:
        return False
    return torch.equal(begun, now.detach().to(begun))
