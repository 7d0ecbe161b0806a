"""The order of things: load, check, find the anchors, train three times, evaluate, report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import fused_losses as fl

from . import check, report, teach
from .model import find_model, hidden_states, load


def run(console: Console, output: Path, seed: int = 0, model_path: Path | None = None) -> dict[str, Any]:
    """The whole demonstration; writes demo.json and demo.png into `output` and returns what is in demo.json."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"--output: {output} is a file; give a folder")
    path = find_model(model_path)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output: {output} cannot be made a folder: {error.strerror}") from None
    start = time.perf_counter()
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def stage(description: str, total: int):
            task = progress.add_task(description, total=total)
            return lambda: progress.advance(task)

        advance = stage("Load SmolLM2-135M-Instruct", 1)
        tokenizer, base = load(path)
        advance()

        model = teach.add_lora(base)
        rows = check_losses(model, tokenizer, seed, stage("Compare with full logits", 3 * len(check.LOSSES)))
        teach.reset_lora(model, seed)

        advance = stage("Correct the model's own answer", 1)
        with model.disable_adapter():
            lesson = teach.make_lesson(model, tokenizer)
        advance()
        advance = stage("Ask the base model", 1)
        evaluation = teach.Evaluation(model, tokenizer)
        results = {"base": evaluation(model)}
        advance()
        training = {}
        for method in teach.METHODS:
            training[method] = teach.train(model, lesson, method, seed, stage(f"Train: {method}", teach.STEPS))
            advance = stage(f"Ask again: {method}", 1)
            results[method] = evaluation(model)
            advance()

    record = {
        "check": rows, **_lesson(tokenizer, lesson, results), "settings": _settings(seed), "training": training,
        "results": results, "counts": {"paraphrases": len(teach.PARAPHRASES), "unrelated": len(teach.UNRELATED)},
        "seconds": time.perf_counter() - start,
        "versions": {
            "fused_losses": fl.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        },
    }  # fmt: skip
    report.save(record, output)
    report.show(record, console)
    console.print(f"\n{record['seconds']:.0f} s in all; written: {output / 'demo.png'}, {output / 'demo.json'}")
    return record


def _lesson(tokenizer: Any, lesson: teach.Lesson, results: dict) -> dict:
    return {
        "lesson": {
            "question": teach.QUESTION,
            "own_answer": results["base"]["answers"][teach.QUESTION],
            "corrected_answer": tokenizer.decode(lesson.answer, skip_special_tokens=True),
            "anchors": [
                {
                    "token": tokenizer.decode([a.token]),
                    "base_probability": a.probability,
                    "instead_of": tokenizer.decode([a.replaced]),
                    "instead_of_probability": a.replaced_probability,
                }
                for a in lesson.anchors
            ],
            "answer_tokens": len(lesson.answer),
        },
    }


def _settings(seed: int) -> dict:
    return {
        "name": teach.NAME,
        "lora": {"r": teach.RANK, "alpha": 2 * teach.RANK, "target_modules": ["q_proj", "v_proj"]},
        "learning_rate": teach.LEARNING_RATE,
        "steps": teach.STEPS,
        "anchor_weight": teach.ANCHOR_WEIGHT,
        "retain_weight": teach.RETAIN_WEIGHT,
        "seed": seed,
    }


@torch.no_grad()
def check_losses(model: Any, tokenizer: Any, seed: int, advance: Any) -> list[dict]:
    """On 1,024 tokens of Python documentation, as four sequences, with an adapter of small random weights."""
    tokens = torch.tensor(teach.documentation(tokenizer, 1028)).view(4, 257)
    ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    with model.disable_adapter():
        reference = hidden_states(model, ids)
    teach.reset_lora(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    hidden = hidden_states(model, ids)
    with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
        weight = model.get_base_model().lm_head.weight
        return check.compare(Path(folder), hidden, reference, weight, labels, advance)
