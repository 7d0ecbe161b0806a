"""Losses of this package in the configuration of trainers that others wrote, one small file a trainer.

    axolotl.py        FusedLossesPlugin, for `plugins:` in axolotl's YAML
    llamafactory.py   python -m fused_losses.integrations.llamafactory config.yaml
    swift.py          what the file says that `fused-losses swift-plugin` writes for ms-swift
    automodel.py      FusedLoss, a `_target_` of NeMo Automodel's `loss_fn:`
    torchtitan.py     FusedLoss, a `loss` of its Trainer.Config
    verl.py           use(...), in a module that `model.external_lib` names

The first three read the same keys (`settings.py`) and share the collator that gives a loss its fields (`batches.py`).
Each imports its trainer only where it uses it.
"""
