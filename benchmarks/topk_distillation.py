"""Distillation from a teacher's top 32 against distillation from all of its vocabulary: SmolLM2-135M-Instruct.

    python benchmarks/topk_distillation.py [--steps 60] [--k 32] [--text generated]

Teacher: the model as it is. Student: the same with a LoRA adapter on every linear layer of its last 10 blocks whose B
is noise, at a KL of about half a nat from it, which training has to undo. The text is the teacher's own, one answer
of 64 tokens a step, or Python's documentation, which is hard for it. Each run starts from the same student and sees
the same batches, in float32, AdamW with a learning rate that falls linearly to 0; only the loss differs. The curve is
the KL(teacher ‖ student) of all of the vocabulary on each step's batch, before its update, whatever the loss is.

Writes benchmarks/results/topk_distillation.json after every finished run, goes on from there when started again, and
prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import texts
import torch
from torch import Tensor
from tqdm import trange

import fused_losses as fl
from fused_losses.demo.model import hidden_states

RESULTS = Path(__file__).parent / "results" / "topk_distillation.json"
LOSSES: dict[str, fl.Objective] = {
    "whole vocabulary": fl.JSDLoss(0, gradient="exact"),
    "whole vocabulary, sparse gradients": fl.JSDLoss(0, gradient="sparse"),
    "top k, bucket": fl.TopKDistillationLoss(rest="bucket", gradient="exact"),
    "top k, bucket, sparse gradients": fl.TopKDistillationLoss(rest="bucket", gradient="sparse"),
    "top k, no rest": fl.TopKDistillationLoss(gradient="exact"),
    "top k, no rest, renormalised": fl.TopKDistillationLoss(normalise=True, gradient="exact"),
}
LENGTH, RANK, NOISE, BLOCKS = 64, 8, 0.7, 10
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


Batch = tuple[Tensor, Tensor]


def batches_of(model: Any, tokenizer: Any, text: str, steps: int) -> list[Batch]:
    """Ids and labels [1, T] of each step, in an order fixed by the seed: one answer, or LENGTH tokens of a text."""
    if text == "generated":
        rows, starts = texts.generated(model, tokenizer)
    else:
        ids = {"documentation": texts.documentation, "code": texts.code}[text](tokenizer, 6000)
        rows = list(torch.tensor(ids).unfold(0, LENGTH + 1, LENGTH // 4))
        starts = [1] * len(rows)
    pairs = []
    for row, start in zip(rows, starts, strict=True):
        labels = row[1:].clone()
        labels[: start - 1] = -100
        pairs.append((row[None, :-1], labels[None]))
    g = torch.Generator().manual_seed(0)
    order = [int(i) for _ in range(steps) for i in torch.randperm(len(pairs), generator=g)]
    return [pairs[i] for i in order[:steps]]


@torch.no_grad()
def states_of(model: Any, batches: list[Batch]) -> list[Tensor]:
    """The teacher's last hidden states of each step, computed once for each row."""
    known: dict[Tensor, Tensor] = {}
    for ids, _ in batches:
        if ids not in known:
            known[ids] = hidden_states(model, ids)
    return [known[ids] for ids, _ in batches]


def student(base: Any) -> Any:
    """The model with an adapter that disturbs it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    last = list(range(base.config.num_hidden_layers))[-BLOCKS:]
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=LINEAR, layers_to_transform=last)
    model = get_peft_model(base, config).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(NOISE * torch.randn(parameter.shape, generator=g))
    return model


def train(
    model: Any, loss: fl.Objective, batches: list[Batch], states: list[Tensor], rate: float, k: int, name: str = ""
) -> dict[str, Any]:
    """The KL of all of the vocabulary at each step; `states`: the teacher's. Afterwards the student is as it was."""
    head = model.get_base_model().lm_head.weight
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    curve, left = [], []
    for step in trange(len(batches), desc=name):
        (ids, labels), original = batches[step], states[step]
        hidden, valid = hidden_states(model, ids), labels >= 0
        arguments: dict[str, Any] = {"reference": fl.Reference(original)}
        if isinstance(loss, fl.TopKDistillationLoss):
            with torch.no_grad():
                curve.append(fl.token_losses(hidden.detach(), head, labels, **arguments).kl[valid].mean().item())
                logprobs, named = (original @ head.T).log_softmax(-1).topk(k)
            arguments = {"teacher_ids": named, "teacher_logprobs": logprobs}
            left.append(1 - logprobs[valid].exp().sum(-1).mean().item())
        value = loss(hidden, head, labels, **arguments)
        value.backward()
        if not left:
            curve.append(value.item())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        for parameter, start in zip(trained, before, strict=True):
            parameter.copy_(start)
    return {"kl": curve} | ({"rest": sum(left) / len(left)} if left else {})


def compared(runs: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each loss the KL at the first and last steps, and how far its curve is from that of the whole vocabulary."""
    whole = torch.tensor(runs["whole vocabulary"]["kl"])
    found = []
    for name, run in runs.items():
        kl = torch.tensor(run["kl"])
        away = (kl / whole - 1).abs()
        last = slice(-max(1, len(kl) // 6), None)
        found.append({
            "loss": name, "first": kl[0].item(), "last": kl[last].mean().item(), "worst": away.max().item(),
            "mean": (kl.sum() / whole.sum() - 1).abs().item(), "rest": run.get("rest"),
        })  # fmt: skip
    return found


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| loss | teacher's rest | KL at first | mean of the last sixth | largest difference of a step | of the sum |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        rest = "–" if row["rest"] is None else f"{row['rest']:.3f}"
        cells = (f"{row['first']:.4f}", f"{row['last']:.4f}", f"{row['worst']:.2%}", f"{row['mean']:.2%}")
        lines.append(f"| {' | '.join((row['loss'], rest, *cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--text", choices=["documentation", "generated", "code"], default="generated")
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    settings = {
        "steps": options.steps, "text": options.text, "length": LENGTH, "k": options.k, "blocks": BLOCKS,
        "noise": NOISE, "learning_rate": options.learning_rate, "rank": RANK,
    }  # fmt: skip
    record = json.loads(options.output.read_text()) if options.output.is_file() else {}
    if any(record.get(key) != value for key, value in settings.items()):
        record = {}
    device = {"machine": platform.machine(), "torch": torch.__version__, "fused_losses": fl.__version__}
    record = {**settings, "device": device, "runs": record.get("runs", {})}
    missing = [name for name in options.losses if name not in record["runs"]]
    if missing:
        base, tokenizer = texts.model_and_tokenizer()
        batches = batches_of(base, tokenizer, options.text, options.steps)
        states = states_of(base, batches)
        model = student(base)
    for name in missing:
        record["runs"][name] = train(model, LOSSES[name], batches, states, options.learning_rate, options.k, name)
        temporary = options.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1))
        os.replace(temporary, options.output)
    if "whole vocabulary" in record["runs"]:
        print(table(compared(record["runs"])))


if __name__ == "__main__":
    main()
