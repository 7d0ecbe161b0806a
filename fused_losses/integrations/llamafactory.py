"""LLaMA-Factory: `python -m fused_losses.integrations.llamafactory config.yaml` for `llamafactory-cli train`.

Its YAML with our keys besides. Read and tested with llamafactory 0.9.5. It has no plugins, but `run_exp` takes
callbacks: ours patches the model when training begins.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..objectives import Objective
from .batches import collated
from .settings import KEYS, LossSettings, refuse, take

SWITCHES = {
    "use_dft_loss": "take fused_loss: dft in its place",
    "use_asft_loss": "take fused_loss: asft with fused_loss_options: {kl_weight: ...} in place of asft_alpha, and "
    "fused_loss_reference: base",
    "use_eaft_loss": "take fused_loss: eaft with fused_loss_options: {alpha: ...} in place of eaft_alpha",
    "enable_liger_kernel": "it puts Liger's own cross-entropy into the model's forward, and there is no switch for its "
    "other kernels alone; leave it out",
    "label_smoothing_factor": "take fused_loss: sft with fused_loss_options: {label_smoothing: ...}",
    "use_mca": "Megatron has a forward of its own; leave one of the two out",
    "use_hyper_parallel": "it has a trainer of its own; leave one of the two out",
    "use_ray": "its workers do not get callbacks; start the training with torchrun instead",
    "use_unsloth": "Unsloth has a forward of its own; leave one of the two out",
}
STAGES = ("sft", "pt")
USE = "python -m fused_losses.integrations.llamafactory config.yaml [key=value ...]"


def split(config: dict[str, Any]) -> tuple[dict[str, Any], LossSettings]:
    """LLaMA-Factory's own keys, and what ours say.

    Raises ValueError without a loss, for a wrong key, for stages other than sft and pt, and beside a switch of
    LLaMA-Factory's that makes the loss too.
    """
    config = dict(config)
    settings = take(config)
    if settings is None:
        raise ValueError(
            f"fused_loss: is not in the configuration; there are {', '.join(KEYS)}, or start llamafactory-cli train "
            "for LLaMA-Factory's own loss"
        )
    stage = config.get("stage", "sft")
    if stage not in STAGES:
        raise ValueError(
            f"stage: expected {' or '.join(STAGES)}, got {stage!r}, whose loss is made of log-probabilities; leave "
            "fused_loss out"
        )
    refuse(config, SWITCHES, "LLaMA-Factory")
    if config.get("compute_accuracy") and not settings.keep_logits:
        raise ValueError("compute_accuracy: needs logits in evaluation; give fused_loss_keep_logits: eval")
    return config, settings


def train(config: dict[str, Any]) -> None:
    """What `llamafactory-cli train` does with the configuration, with the loss that our keys name."""
    own, settings = split(config)
    run_exp = _run_exp()
    with _collators(settings.objective()):
        run_exp(own, callbacks=[settings.callback()])


def main(arguments: Sequence[str] | None = None) -> None:
    """`config.yaml key=value ...`, as LLaMA-Factory reads them; a mistake ends it with a line and status 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(f"usage: {USE}\n\n" + "\n".join(f"{key}: {what}" for key, what in KEYS.items()))
        raise SystemExit(0 if given else 2)
    try:
        config = _read(given)
        split(config)
        _run_exp()
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    train(config)


def _read(given: list[str]) -> dict[str, Any]:
    import yaml

    with open(given[0], encoding="utf-8") as file:
        try:
            config = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"{given[0]}: is no YAML: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{given[0]}: expected keys and values, got {type(config).__name__}")
    for more in given[1:]:
        key, equals, value = more.partition("=")
        if not equals:
            raise ValueError(f"{more}: expected key=value")
        config[key] = yaml.safe_load(value)
    return config


def _run_exp() -> Callable[..., None]:
    try:
        from llamafactory.train.tuner import run_exp
    except ImportError as error:
        raise ImportError(
            f"fused_losses.integrations.llamafactory needs LLaMA-Factory: pip install llamafactory ({error})"
        ) from error
    return run_exp


@contextlib.contextmanager
def _collators(loss: Objective) -> Iterator[None]:
    """Within it the collators that LLaMA-Factory makes pass on the fields of the loss."""
    if not loss.batch_fields():
        yield
        return
    from llamafactory.train.pt import workflow as pt
    from llamafactory.train.sft import workflow as sft

    names = ((sft, "SFTDataCollatorWith4DAttentionMask"), (pt, "DataCollatorForLanguageModeling"))
    before = [(module, name, getattr(module, name)) for module, name in names]
    for module, name, made in before:
        setattr(module, name, lambda *args, _made=made, **options: collated(_made(*args, **options), loss))
    try:
        yield
    finally:
        for module, name, made in before:
            setattr(module, name, made)


if __name__ == "__main__":
    main()
