"""Hidden states of a real model on real text that sparse.py measures with, and where results go."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from pathlib import Path

import texts
import torch
from torch import Tensor
from tqdm import tqdm

import fused_losses as fl
from fused_losses import backends

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs"
KL_TARGET = 0.003


def save(name: str, content: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    content["device"] = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "fused_losses": fl.__version__,
        "backend": backends.choose("auto", "cpu"),
    }
    temporary = RESULTS / f"{name}.tmp"
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, RESULTS / f"{name}.json")


def load_states() -> dict:
    """{"weight", "texts": {kind: (hidden, labels)}, "adapted": {kind: (hidden, hidden of the original, labels)}}."""
    digest = hashlib.sha256(Path(texts.__file__).read_bytes()).hexdigest()[:12]
    path = Path(tempfile.gettempdir()) / f"fused-losses-states-{digest}.pt"
    if path.is_file():
        return torch.load(path)
    model, tokenizer = texts.model_and_tokenizer()
    weight = model.lm_head.weight.detach().clone()
    rows = {kind: texts.rows_of(kind, model, tokenizer) for kind in ("generated", "documentation", "code", "clinical")}
    result: dict = {"weight": weight, "texts": {}, "adapted": {}}
    for kind, parts in tqdm(rows.items(), desc="hidden states"):
        text = texts.states(model, *parts)
        result["texts"][kind] = (text.hidden, text.labels)
    adapted = trained_adapter(model, rows["code"][0][0])
    for kind in tqdm(texts.TUNED, desc="hidden states of the adapted model"):
        original, labels = result["texts"][kind]
        low, high = 0.0, 1.0
        for _ in range(7):  # the adapter's strength that gives the KL of LAwF's working range
            strength = (low + high) / 2
            scale_adapter(adapted, strength)
            some = [r[:513] for r in rows[kind][0]], rows[kind][1]
            x = texts.states(adapted, *some)
            reference = torch.cat([original[: len(x.labels)]]) if kind != "generated" else original
            out = fl.token_losses(x.hidden, weight, x.labels, reference=fl.Reference(reference))
            low, high = (strength, high) if out.kl.mean() < KL_TARGET else (low, strength)
        x = texts.states(adapted, *rows[kind])
        result["adapted"][kind] = (x.hidden, original, labels)
    torch.save(result, path)
    return result


def trained_adapter(model, ids: Tensor):
    """A LoRA trained for a few steps on code, so that its changes are those that training makes."""
    from fused_losses.demo.model import hidden_states
    from fused_losses.training.model import add_lora

    adapted = add_lora(model, 8, None).eval()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    head = model.lm_head.weight.detach()
    for _ in tqdm(range(12), desc="adapter"):
        hidden = hidden_states(adapted, ids[None, :256])
        fl.CrossEntropyLoss()(hidden, head, ids[None, 1:257]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.requires_grad_(False)


def scale_adapter(adapted, strength: float) -> None:
    for module in adapted.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling = {name: 2.0 * strength for name in module.scaling}
