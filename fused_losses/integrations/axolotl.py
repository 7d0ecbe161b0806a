"""axolotl: `plugins: [fused_losses.integrations.axolotl.FusedLossesPlugin]` in its YAML.

Read and tested with axolotl 0.19.0. Patches the model after it has loaded it and its adapter, so before the Trainer is
made, and puts the loss's fields into the batches.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, model_validator

from .batches import collated
from .settings import KEYS, LossSettings, refuse, take

try:
    from axolotl.integrations.base import BasePlugin

    MISSING = ""
except ImportError as error:
    BasePlugin, MISSING = object, str(error)

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
        settings_of(data)
        return data


class FusedLossesPlugin(BasePlugin):
    """The plugin that axolotl loads; with no `fused_loss` in the configuration it does nothing.

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
        if settings is not None:
            settings.patch(model)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        settings = settings_of(cfg)
        if settings is None:
            return
        loss = settings.objective()
        # axolotl looks for num_items_in_batch below the patched forward, and takes the mean of batches' means without.
        trainer.model_accepts_loss_kwargs = loss.divides_by_items
        for name in ("data_collator", "eval_data_collator"):
            if getattr(trainer, name, None) is not None:
                setattr(trainer, name, collated(getattr(trainer, name), loss))

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        from ..huggingface.metrics import Callback

        return [] if settings_of(cfg) is None else [Callback()]


def settings_of(cfg: Any) -> LossSettings | None:
    """What a configuration says, as YAML or as axolotl has checked it; None without a loss.

    Raises ValueError for a wrong key, and beside a switch of axolotl's that makes the loss too.
    """
    settings = take({key: cfg[key] for key in list(cfg) if str(key).startswith("fused_loss")})
    if settings is not None:
        refuse(cfg, SWITCHES, "axolotl")
    return settings


assert set(FusedLossesArgs.model_fields) == set(KEYS)
