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
from tqdm import tqdm

import fused_losses as fl
from fused_losses import backends
from fused_losses.bench import states as bench_states
from fused_losses.bench import texts as bench_texts

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs"


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
    sources = (texts, bench_texts, bench_states)
    digest = hashlib.sha256(b"".join(Path(module.__file__).read_bytes() for module in sources)).hexdigest()[:12]
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
    adapted = bench_states.trained_adapter(model, rows["code"][0][0])
    for kind in tqdm(texts.TUNED, desc="hidden states of the adapted model"):
        text = texts.Text(*result["texts"][kind])
        result["adapted"][kind] = tuple(bench_states.with_adapter(adapted, weight, rows[kind], text))
    torch.save(result, path)
    return result
