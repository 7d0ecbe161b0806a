"""ms-swift: a file for `--external_plugins FILE --callbacks fused_losses`, which `fused-losses swift-plugin` writes.

Read and tested with ms-swift 4.6.0. The callback patches the model when training begins.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ..huggingface.patch_callback import PatchCallback
from .batches import collated
from .settings import LossSettings, refuse

NAME = "fused_losses"
SWITCHES = {
    "enable_dft_loss": "name dft as the loss of the plugin",
    "loss_type": "leave it out",
    "enable_channel_loss": "it is made of logits; leave it out",
    "use_liger_kernel": "it puts Liger's own cross-entropy into the model's forward; leave it out",
    "label_smoothing_factor": "name sft as the loss of the plugin, with label_smoothing as its option",
}


class FusedLossesCallback(PatchCallback):
    """What `--callbacks fused_losses` makes: `PatchCallback`, and a collator that passes on the fields of the loss.

    Raises ValueError beside a switch of ms-swift's that makes the loss too, and with sequence parallelism.
    """

    def __init__(self, settings: LossSettings, args: Any, trainer: Any) -> None:
        refuse({name: getattr(args, name, None) for name in SWITCHES}, SWITCHES, "ms-swift")
        parallel = getattr(getattr(trainer, "template", None), "sequence_parallel_size", 1)
        if parallel > 1:
            raise ValueError(
                f"sequence_parallel_size: expected 1, got {parallel}, with which ms-swift makes the loss of parts of a "
                "sequence itself; leave it out, or the plugin"
            )
        super().__init__(settings.objective(), **settings.patch_options("auto"))
        self.own_reference = settings.loads_reference
        self._trainer = trainer

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, self._trainer = self._trainer, None
        trainer.data_collator = collated(trainer.data_collator, self.loss, scale="loss_scale")
        if self.loss.batch_fields():
            args.use_logits_to_keep = False  # it cuts labels, and would have to cut the fields too


def register(loss: str, options: Mapping[str, Any] | None = None, **settings: Any) -> None:
    """Makes `--callbacks fused_losses` known to ms-swift, with this loss.

    `settings`: reference, reference_cache, keep_logits, eval_loss, as `LossSettings` has them.

    Raises: ValueError, TypeError for wrong ones; ImportError without ms-swift.
    """
    checked = LossSettings(loss, options or {}, **settings)
    try:
        from swift.callbacks import callbacks_map
    except ImportError as error:
        raise ImportError(f"fused_losses.integrations.swift needs ms-swift: pip install ms-swift ({error})") from error
    callbacks_map[NAME] = functools.partial(FusedLossesCallback, checked)


def source(loss: str, options: Mapping[str, Any], **settings: Any) -> str:
    """The text of a plug-in file with this loss; checked."""
    LossSettings(loss, options, **settings)
    given = {"options": dict(options) or None, **settings}
    arguments = [repr(loss), *(f"{name}={value!r}" for name, value in given.items() if value is not None)]
    return (
        '"""For ms-swift: --external_plugins THIS_FILE --callbacks fused_losses."""\n\n'
        f"from fused_losses.integrations.swift import register\n\nregister({', '.join(arguments)})\n"
    )
