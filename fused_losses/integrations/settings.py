"""The keys that trainers' configurations have of this package, and what they make."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checks import meant, slip_of
from ..huggingface import patch
from ..huggingface.references import NAMES as REFERENCES
from ..objectives import Objective
from ..objectives.named import make_objective
from ..objectives.options import option_names

PREFIX = "fused_loss"
KEYS = {
    "fused_loss": "its name: talr, lawf, sft, ... as in `fused-losses train --method`, or a class's, such as TALRLoss",
    "fused_loss_options": "options of its constructor by name, such as {temperature: 2.0}",
    "fused_loss_reference": "the frozen original: base, start, or the folder of a model",
    "fused_loss_reference_cache": "a folder for the original's hidden states",
    "fused_loss_keep_logits": "true or eval: real logits, of full size, always or in evaluation",
    "fused_loss_eval_loss": "nll or objective: what evaluation computes",
}


@dataclass
class LossSettings:
    """What the keys of KEYS say, checked when it is made.

    Args: as KEYS has them, without the prefix.

    Raises: ValueError, TypeError, naming the key, what came and the remedy; before any model is loaded.
    """

    loss: str
    options: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None
    reference_cache: str | None = None
    keep_logits: bool | str = False
    eval_loss: str = "nll"

    def __post_init__(self) -> None:
        objective = self.objective()
        name = type(objective).__name__
        if self.reference is None and objective.needs_reference:
            raise ValueError(
                f"fused_loss_reference: {name} compares with a frozen original model: give base (the model without its "
                "LoRA or other adapter), start (the model as it is loaded), or the folder of a model"
            )
        if self.reference is not None and not objective.takes_reference:
            raise ValueError(f"fused_loss_reference: {name} has no use for one; leave it out")
        if self.reference in REFERENCES and objective.only_follows:
            has_labels = "nll_weight" in option_names(type(objective))
            labels = ", or the option nll_weight, to learn the labels too" if has_labels else ""
            raise ValueError(
                f"fused_loss_reference: {self.reference} is the model that the training starts from, from which {name} "
                f"is 0, so nothing would be learned; give the folder of the teacher{labels}"
            )
        if self.loads_reference and not _is_model_folder(self.reference):
            raise ValueError(
                f"fused_loss_reference: expected base, start or the folder of a model (with its config.json), got "
                f"{self.reference!r}"
            )
        if self.loads_reference:
            _check_causal(str(self.reference))
        if self.reference_cache is not None and self.reference is None:
            raise ValueError("fused_loss_reference_cache: given without fused_loss_reference; there is nothing to keep")
        if self.keep_logits not in (True, False, "eval"):
            raise ValueError(f"fused_loss_keep_logits: expected true, false or eval, got {self.keep_logits!r}")
        if self.eval_loss not in ("nll", "objective"):
            raise ValueError(f"fused_loss_eval_loss: expected nll or objective, got {self.eval_loss!r}")

    def objective(self) -> Objective:
        return make_objective(self.loss, self.options, "fused_loss")

    def reference_for(self, dtype: Any) -> Any:
        """As `fl.patch` takes it: a name, None, or the model in that folder, frozen."""
        if not self.loads_reference:
            return self.reference
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.reference, dtype=dtype).requires_grad_(False).eval()

    def patch(self, model: Any) -> Any:
        """`fl.patch` as the keys say; returns the model."""
        options = self.patch_options(model.dtype)
        if self.loads_reference:
            options["reference"].to(model.device)
        return patch(model, self.objective(), **options)

    def callback(self, stays: bool = False) -> Any:
        """A `PatchCallback` as the keys say."""
        from ..huggingface.patch_callback import PatchCallback

        made = PatchCallback(self.objective(), **self.patch_options("auto"), stays=stays)
        made.own_reference = self.loads_reference
        return made

    @property
    def loads_reference(self) -> bool:
        """Whether the reference is a model of its own, which `reference_for` loads."""
        return self.reference is not None and self.reference not in REFERENCES

    def patch_options(self, dtype: Any) -> dict[str, Any]:
        """Of `fl.patch`; `dtype`: of a reference that is loaded."""
        return {
            "reference": self.reference_for(dtype), "reference_cache": self.reference_cache,
            "keep_logits": self.keep_logits, "eval_loss": self.eval_loss,
        }  # fmt: skip


def take(config: dict[str, Any]) -> LossSettings | None:
    """What a configuration says, with our keys removed from it; None where it has none of them.

    Raises ValueError for a key that only begins like ours, or is one of ours but for a slip, and for options without a
    loss.
    """
    ours = {key: config.pop(key) for key in list(config) if isinstance(key, str) and _is_ours(key)}
    unknown = [key for key in ours if key not in KEYS]
    if unknown:
        raise ValueError(f"{unknown[0]}: there is no such key{meant(unknown[0], KEYS)}; there are {', '.join(KEYS)}")
    ours = {key: value for key, value in ours.items() if value is not None}
    if not ours:
        return None
    if "fused_loss" not in ours:
        raise ValueError(f"{next(iter(ours))}: given without fused_loss; name the loss, such as fused_loss: talr")
    return LossSettings(ours.pop("fused_loss"), **{key.removeprefix("fused_loss_"): v for key, v in ours.items()})


def loss_of_labels(name: Any, options: Mapping[str, Any], who: str, fields: Collection[str] = ()) -> Objective:
    """The objective of that name, for a trainer that hands over labels, and of a batch's fields none but `fields`.

    Raises: ValueError for one that compares with a frozen original, reads another field, or takes means of groups; what
    `make_objective` raises.
    """
    objective = make_objective(name, options)
    kind = type(objective).__name__
    missing = [field for field, about in objective.batch_fields().items() if not about.optional and field not in fields]
    if objective.needs_reference or missing:
        what = "a frozen original" if objective.needs_reference else ", ".join(missing)
        raise ValueError(
            f"loss: {kind} needs {what}, which {who} does not hand to a loss; take one of nll alone, such as talr or "
            "dft"
        )
    if not objective.divides_by_items:
        raise ValueError(f"loss: {kind} takes means of groups; give options: {{reduction: token_mean}}")
    return objective


def refuse(config: Mapping[str, Any], switches: Mapping[str, str], who: str) -> None:
    """ValueError for the first switch of the trainer's own that is on; `switches`: what to do in its place."""
    for name, remedy in switches.items():
        if config.get(name) not in (None, False, 0, "", "none"):
            raise ValueError(f"{name}: {who} would make the loss itself, and fused_loss makes it; {remedy}")


def _is_ours(key: str) -> bool:
    """fused_los and fuse_loss_options too: some trainers ignore keys that they do not know."""
    return key.startswith(PREFIX) or slip_of(key, KEYS) is not None


def _is_model_folder(name: Any) -> bool:
    return isinstance(name, str) and (Path(name) / "config.json").is_file()


def _check_causal(folder: str) -> None:
    """Before it is loaded: one without an LM head would be loaded with a head of random numbers."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    kinds = config.get("architectures") or []
    what = ""
    if config.get("is_encoder_decoder"):
        what = "is an encoder-decoder"
    elif kinds and "auto_map" not in config and not any(map(_has_lm_head, kinds)):
        what = f"is a {kinds[0]}, without an LM head"
    if what:
        raise ValueError(
            f"fused_loss_reference: the model in {folder} {what}; give a causal language model, such as the one that "
            "the training starts from"
        )


def _has_lm_head(name: str) -> bool:
    """Of a class of transformers."""
    return name.endswith("LM") or "LMHead" in name or "ConditionalGeneration" in name
