"""Training with exact and with sparse gradients, and with 8-bit products besides: SmolLM2-135M-Instruct, all parameters
and LoRA, TALR and LAwF.

    python benchmarks/training.py [--steps 60]

Both runs of a pair start from the same weights and see the same batches in float32, AdamW with a learning rate that
falls linearly to 0 (the default of transformers' Trainer); only `gradient=` and `scan=` differ. LAwF with all
parameters has a reference with a head of its own, and so no 8-bit products. Writes
benchmarks/results/training.json after every finished run, and goes on from there when started again.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
from pathlib import Path

import texts
import torch
from tqdm import trange

import fused_losses as fl
from fused_losses.demo.model import hidden_states

RESULTS = Path(__file__).parent / "results" / "training.json"
LEARNING_RATE = {"full": 5e-6, "LoRA": 1e-4}
ROWS, LENGTH = 4, 48
KINDS = {
    "exact": {"gradient": "exact"}, "sparse": {"gradient": "sparse"}, "int8": {"gradient": "sparse", "scan": "int8"},
}  # fmt: skip


def batches(tokenizer, steps: int) -> list[torch.Tensor]:
    """[ROWS, LENGTH + 1] ids of a text on clinical scores, in an order fixed by the seed."""
    ids = torch.tensor(texts.clinical(tokenizer, 6000))
    windows = ids.unfold(0, LENGTH + 1, LENGTH // 2)
    g = torch.Generator().manual_seed(0)
    return [windows[torch.randint(len(windows), (ROWS,), generator=g)] for _ in range(steps)]


def run(parameters: str, loss_name: str, kind: str, steps: int) -> dict:
    base, tokenizer = texts.model_and_tokenizer()
    original = copy.deepcopy(base.lm_head.weight.detach())
    torch.manual_seed(0)
    if parameters == "LoRA":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(base, config)
        reference_model = None
    else:
        model = base.requires_grad_(True)
        reference_model = copy.deepcopy(base).requires_grad_(False) if loss_name == "LAwF" else None
    head = base.lm_head.weight
    loss_of = {"TALR": fl.TALRLoss, "LAwF": fl.LAwFLoss}[loss_name](**KINDS[kind])
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE[parameters], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses, bounds = [], []
    data = batches(tokenizer, steps)
    for step in trange(steps, desc=f"{parameters} {loss_name} {kind}"):
        ids, labels = data[step][:, :-1], data[step][:, 1:]
        options = {}
        if loss_name == "LAwF":
            with torch.no_grad():
                if reference_model is None:
                    with model.disable_adapter():
                        options["reference"] = fl.Reference(hidden_states(model, ids))
                else:
                    options["reference"] = fl.Reference(hidden_states(reference_model, ids), original)
            options["confidence"] = (torch.arange(LENGTH) % 8 == 0).float().expand(ROWS, -1)
        loss = loss_of(hidden_states(model, ids), head, labels, **options)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        bounds.append(loss_of.gradient_report.bound)
    return {"losses": losses, "bounds": bounds}


def record_of(steps: int) -> dict:
    record = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"runs": {}}
    settings = {"steps": steps, "rows": ROWS, "length": LENGTH, "learning_rate": LEARNING_RATE}
    if any(record.get(key, value) != value for key, value in settings.items()):
        record = {"runs": {}}
    device = {"machine": platform.machine(), "torch": torch.__version__, "fused_losses": fl.__version__}
    return record | settings | {"device": device}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--parameters", nargs="+", choices=["full", "LoRA"], default=["full", "LoRA"])
    options = parser.parse_args()
    for parameters in options.parameters:
        for loss_name in ("TALR", "LAwF"):
            kinds = [kind for kind in KINDS if (parameters, loss_name, kind) != ("full", "LAwF", "int8")]
            for kind in kinds:
                key = f"{parameters} {loss_name} {kind}"
                if key not in record_of(options.steps)["runs"]:
                    result = run(parameters, loss_name, kind, options.steps)
                    record = record_of(options.steps)
                    record["runs"][key] = result
                    temporary = RESULTS.with_suffix(f".{parameters}.tmp")
                    temporary.write_text(json.dumps(record, indent=1))
                    os.replace(temporary, RESULTS)
            runs = record_of(options.steps)["runs"]
            exact, *others = (runs[f"{parameters} {loss_name} {kind}"]["losses"] for kind in kinds)
            for kind, losses in zip(kinds[1:], others, strict=True):
                worst = max(abs(a - b) / abs(a) for a, b in zip(exact, losses, strict=True))
                print(f"{parameters} {loss_name} {kind}: to {exact[-1]:.4f}, largest difference {worst:.3%}")


if __name__ == "__main__":
    main()
