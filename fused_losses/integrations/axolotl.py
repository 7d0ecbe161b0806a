"""axolotl: `plugins: [fused_losses.integrations.axolotl.FusedLossesPlugin]` in its YAML.

Read and tested with axolotl 0.19.0. Patches the model after it has loaded it and its adapter, so before the Trainer is
made, and puts the loss's fields into the batches.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, model_validator

from ..checks import slip_of
from ..objectives import Objective
from ..objectives.named import NAMED
from ..objectives.options import OTHER_NAMES, option_names
from .batches import WithFields, collated
from .settings import KEYS, LossSettings, refuse, take

try:
    from axolotl.integrations.base import BasePlugin

    from ..huggingface.metrics import Callback

    MISSING = ""
except ImportError as error:
    BasePlugin = Callback = object  # type: ignore[assignment, misc]
    MISSING = str(error)

REMEDY = "leave it out"
SWITCHES = {
    "liger_fused_linear_cross_entropy": f"{REMEDY}; Liger's other kernels may stay",
    "liger_cross_entropy": f"{REMEDY}; Liger's other kernels may stay",
    "liger_use_token_scaling": "take fused_loss: dft, which is the same loss",
    "cut_cross_entropy": f"{REMEDY}; no logits are formed here either",
    "chunked_cross_entropy": f"{REMEDY}; no logits are formed here either",
    "use_eaft": "take fused_loss: eaft, with fused_loss_options: {alpha: ...} in place of eaft_alpha",
    "label_smoothing_factor": "take fused_loss: sft with fused_loss_options: {label_smoothing: ...}",
    "rl": "preference and RL trainers need log-probabilities of their own; leave one of the two out",
    "reward_model": f"{REMEDY}, as a reward model has no LM head",
    "process_reward_model": f"{REMEDY}, as a reward model has no LM head",
    "kd_trainer": "take fused_loss: topk-distillation with the teacher's ids and log-probabilities as columns, or "
    "leave one of the two out",
}


class FusedLossesArgs(BaseModel):
    """What axolotl's configuration takes besides its own keys; `settings.KEYS` says what they mean."""

    fused_loss: str | None = None
    fused_loss_options: dict[str, Any] | None = None
    fused_loss_reference: str | None = None
    fused_loss_reference_cache: str | None = None
    fused_loss_keep_logits: bool | str | None = None
    fused_loss_eval_loss: str | None = None

    @model_validator(mode="before")
    @classmethod
    def check_fused_loss(cls, data: Any) -> Any:
        try:
            check(data, cls.model_fields)
        except TypeError as error:  # pydantic lists ValueErrors beside its own, and lets others through
            raise ValueError(str(error)) from error
        return data


class FusedLossesPlugin(BasePlugin):
    """The plugin that axolotl loads.

    axolotl keeps it for later configurations of the same process; for those that have no `fused_loss` it does nothing.

    Raises ImportError without axolotl.
    """

    def __init__(self) -> None:
        if MISSING:
            raise ImportError(
                "fused_losses.integrations.axolotl needs axolotl, which makes the plugin by its `plugins:`; install "
                f"axolotl first ({MISSING})"
            )
        super().__init__()

    def get_input_args(self) -> str:
        return f"{__name__}.{FusedLossesArgs.__name__}"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        settings = settings_of(cfg)
        if settings is not None and not cfg.get("merge_lora"):  # nothing is trained then
            settings.patch(model)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Makes the trainer fit too: `axolotl evaluate` calls no other hook with it."""
        settings = settings_of(cfg)
        if settings is None:
            return []
        loss = settings.objective()
        # axolotl looks for num_items_in_batch below the patched forward, and takes the mean of batches' means without.
        trainer.model_accepts_loss_kwargs = loss.divides_by_items
        for name in ("data_collator", "eval_data_collator"):
            if getattr(trainer, name, None) is not None:
                setattr(trainer, name, collated(getattr(trainer, name), loss))
        for name in ("train_dataset", "eval_dataset"):  # the Trainer takes columns out before a collator sees them
            WithFields(None, loss).name_unused(getattr(getattr(trainer, name, None), "column_names", None) or ())
        PerplexityCallback().add_to(trainer)  # first, so that what prints or reports has the numbers
        return []


class PerplexityCallback(Callback):
    """`fused_losses.huggingface.Callback`, with ppl = exp(nll): axolotl's is exp of the loss, which may be no nll."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        before = self.last
        super().on_log(args, state, control, logs=logs, **kwargs)
        nll = None if self.last is before else self.last.get("nll")
        if nll is None or "ppl" not in logs:
            return
        ppl = math.exp(nll) if nll < 700 else math.inf
        logs["ppl"] = round(ppl, int(os.getenv("AXOLOTL_METRIC_NDIGITS", "5")))
        if state.log_history and "ppl" in state.log_history[-1]:
            state.log_history[-1]["ppl"] = logs["ppl"]


def settings_of(cfg: Any) -> LossSettings | None:
    """What a configuration says, as YAML or as axolotl has checked it; None without a loss. Raises as `take` does."""
    return take({key: cfg[key] for key in list(cfg) if str(key).startswith("fused_loss")})


def check(cfg: Any, known: Collection[str] = ()) -> None:
    """What a configuration as YAML has it leaves of the loss, as axolotl drops keys that are not `known` to it.

    Raises ValueError for a wrong key, also one that is nearly ours; for the plugin without a loss; beside a switch of
    axolotl's that makes the loss too; for an option of a loss, or what is nearly one of this loss, among axolotl's
    keys; and for an original that the model's adapter, or its want of one, cannot give.
    """
    for key in map(str, cfg):
        near = slip_of(key, KEYS)
        if near:
            raise ValueError(f"{key}: there is no such key; did you mean {near}? There are {', '.join(KEYS)}")
    settings = settings_of(cfg)
    if settings is None:
        if any(str(name).startswith(f"{__name__}.") for name in cfg.get("plugins") or []):
            raise ValueError(
                "fused_loss: is not in the configuration, though plugins: has its plugin; name a loss, such as "
                "fused_loss: talr (fused_loss: sft is cross-entropy), or take the plugin out"
            )
        return
    refuse(cfg, SWITCHES, "axolotl")
    kind = type(settings.objective())
    for name in map(str, cfg):
        if name not in known and name not in KEYS and cfg.get(name) is not None:
            check_option(name, cfg[name], kind)
    if settings.reference not in ("base", "adapter-off"):
        return
    if not cfg.get("adapter"):
        raise ValueError(
            f"fused_loss_reference: {settings.reference} is the model without its adapter, and adapter: is not in the "
            "configuration; take start, which keeps a frozen copy, or give the folder of the original"
        )
    if cfg.get("relora"):
        raise ValueError(
            f"fused_loss_reference: {settings.reference} is the model without its adapter, and relora: merges the "
            "adapter into it again and again; give the folder of the original"
        )


def check_option(name: str, value: Any, kind: type[Objective]) -> None:
    """ValueError where a key that axolotl would drop is an option of a loss, or nearly one of this loss."""
    names = option_names(kind)
    if name == "backend":  # a key of axolotl's too
        return
    remedy = f"so axolotl would drop it; write fused_loss_options: {{{name}: {value}}}"
    if name in names:
        raise ValueError(f"{name}: is an option of {kind.__name__} and no key of its own, {remedy}")
    whose = [other.__name__ for other in NAMED.values() if name in option_names(other)]
    if whose:
        raise ValueError(
            f"{name}: is an option of {', '.join(whose)}, not of {kind.__name__}, and no key of axolotl's, which would "
            f"drop it; leave it out, or name that loss; {kind.__name__} has {', '.join(names)}"
        )
    known = OTHER_NAMES.get(name.lower(), "")
    close = known if known in names else slip_of(name, names)
    if close:
        raise ValueError(
            f"{name}: is no key of axolotl's, which would drop it; did you mean fused_loss_options: "
            f"{{{close}: {value}}}?"
        )


assert set(FusedLossesArgs.model_fields) == set(KEYS)
