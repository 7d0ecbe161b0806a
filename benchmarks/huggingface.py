"""A patched model in Trainer and SFTTrainer, beside the same training unpatched: time, peak memory, losses.

    python benchmarks/huggingface.py [--rounds 2]

SmolLM2-135M-Instruct in float32 on the CPU, 2 rows of 512 tokens a step. Each contestant trains in a process of its
own; rounds are interleaved. Unpatched means what one writes without this package: the model's own full logits, and for
LAwF those of the model without its adapter too. Writes benchmarks/results/huggingface.json; after an interruption it
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results" / "huggingface.json"
ROWS, LENGTH = 2, 512
STEPS_OF_EPOCH = 2  # of two epochs; the second is timed
CONTESTANTS = {
    "Trainer, all parameters": ("cross-entropy", "cross-entropy patched", "TALR", "TALR patched"),
    "SFTTrainer, LoRA": ("cross-entropy", "cross-entropy patched", "LAwF", "LAwF patched", "LAwF patched, cached"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("TRAINER", "LOSS"), help="one contestant, in this process")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("expected --rounds ≥ 1")
    if options.one:
        print(json.dumps(run(*options.one)))
        return
    pairs = [(trainer, loss) for trainer, losses in CONTESTANTS.items() for loss in losses]
    # What is finished, for a start that goes on from there.
    part = RESULTS.with_suffix(".part")
    finished: dict[str, dict] = json.loads(part.read_text()) if part.exists() else {}
    for i in tqdm(range(len(pairs) * options.rounds)):
        trainer, loss = pairs[i % len(pairs)]
        if str(i) in finished:
            continue
        command = [sys.executable, __file__, "--one", trainer, loss]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{trainer}, {loss}: exit {done.returncode}")
        finished[str(i)] = json.loads(done.stdout.splitlines()[-1])
        write(part, finished)
    rounds = range(options.rounds)
    runs = {pair: [finished[str(k * len(pairs) + i)] for k in rounds] for i, pair in enumerate(pairs)}
    record = record_of(options, runs)
    write(RESULTS, record)
    part.unlink()
    print(table(record))


def write(path: Path, content: dict) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def record_of(options: argparse.Namespace, runs: dict) -> dict:
    import peft
    import transformers
    import trl

    return {
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl, peft)},
        "rows": ROWS,
        "length": LENGTH,
        "rounds": options.rounds,
        "contestants": [
            {
                "trainer": trainer,
                "loss": loss,
                "seconds": statistics.median(s for r in rounds for s in r["seconds"]),
                "first_epoch_seconds": statistics.median(s for r in rounds for s in r["first_epoch_seconds"]),
                "peak_mib": statistics.median(r["peak_mib"] for r in rounds),
                "before_mib": statistics.median(r["before_mib"] for r in rounds),
                "losses": rounds[0]["losses"],
                "runs": rounds,
            }
            for (trainer, loss), rounds in runs.items()
        ],
    }


def table(record: dict) -> str:
    lines = [
        "| | loss | s per step, 2nd epoch | 1st epoch | peak MiB above start | loss of the steps |",
        "|---|---|---|---|---|---|",
    ]
    for c in record["contestants"]:
        losses = " ".join(f"{x:.4f}" for x in c["losses"])
        lines.append(
            f"| {c['trainer']} | {c['loss']} | {c['seconds']:.1f} | {c['first_epoch_seconds']:.1f} | "
            f"{c['peak_mib'] - c['before_mib']:.0f} | {losses} |"
        )
    return "\n".join(lines)


def run(trainer: str, loss: str) -> dict:
    warnings.simplefilter("ignore")
    import texts
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model, tokenizer = texts.model_and_tokenizer()
    model = unquantised(model)
    rows = dataset(tokenizer)
    train = with_trainer if trainer.startswith("Trainer") else with_sft_trainer
    return train(model, tokenizer, loss, rows)


def unquantised(model):
    """The same in float32 without the mark of the GGUF file it came from, with which Trainer refuses it."""
    config = model.config
    del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    return plain.requires_grad_(False)


def dataset(tokenizer) -> list[dict]:
    """One epoch: windows of Python's documentation; every 32nd token an anchor."""
    import texts

    ids = texts.documentation(tokenizer, STEPS_OF_EPOCH * ROWS * LENGTH)
    rows = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]
    confidence = [float(t % 32 == 31) for t in range(LENGTH)]
    return [{"input_ids": r, "labels": r, "confidence": confidence} for r in rows]


class Clock:
    """Seconds of each step."""

    def __new__(cls):
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            seconds: list[float] = []  # noqa: RUF012

            def on_step_begin(self, *args, **kwargs):
                self.start = time.perf_counter()

            def on_step_end(self, *args, **kwargs):
                self.seconds.append(time.perf_counter() - self.start)

        return Callback()


def arguments() -> dict:
    return dict(
        output_dir="/tmp/unused", per_device_train_batch_size=ROWS, max_steps=2 * STEPS_OF_EPOCH, learning_rate=1e-5,
        report_to=[], use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, remove_unused_columns=False,
        seed=0, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip


def measured(trainer, clock) -> dict:
    before = psutil.Process().memory_info().rss
    trainer.train()
    return {
        "seconds": clock.seconds[STEPS_OF_EPOCH:],
        "first_epoch_seconds": clock.seconds[1:STEPS_OF_EPOCH],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "before_mib": before / 2**20,
        "losses": [h["loss"] for h in trainer.state.log_history if "loss" in h],
    }


def with_trainer(model, tokenizer, loss: str, rows: list[dict]) -> dict:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator

    import fused_losses as fl

    model.requires_grad_(True).train()
    if loss.endswith("patched"):
        fl.patch(model, fl.TALRLoss() if loss.startswith("TALR") else fl.CrossEntropyLoss())
    clock = Clock()
    trainer = Trainer(
        model,
        TrainingArguments(**arguments()),
        train_dataset=Dataset.from_list([{"input_ids": r["input_ids"], "labels": r["labels"]} for r in rows]),
        data_collator=default_data_collator,
        compute_loss_func=plain_talr if loss == "TALR" else None,
        callbacks=[clock],
    )
    return measured(trainer, clock)


def plain_talr(outputs, labels, num_items_in_batch=None):
    """TALR as one writes it over full logits."""
    logits = outputs.logits[:, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    nll = nll.view(len(labels), -1)
    tau = nll.detach().mean(1).quantile(0.5)
    weight = (-nll.detach() / tau).exp().clamp(min=0.01)
    return (weight * nll).sum() / num_items_in_batch


def with_sft_trainer(model, tokenizer, loss: str, rows: list[dict]) -> dict:
    import tempfile

    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import default_data_collator
    from trl import SFTConfig, SFTTrainer

    import fused_losses as fl

    model.train()
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]))
    lawf = loss.startswith("LAwF")
    with tempfile.TemporaryDirectory() as cache:
        if lawf and "patched" in loss:
            kept = cache if loss.endswith("cached") else None
            fl.patch(model, fl.LAwFLoss(), reference="base", reference_cache=kept)
        elif loss.endswith("patched"):
            fl.patch(model)
        clock = Clock()
        trainer = (plain_lawf_trainer(SFTTrainer) if loss == "LAwF" else SFTTrainer)(
            model,
            args=SFTConfig(**arguments(), dataset_kwargs={"skip_prepare_dataset": True}, max_length=LENGTH),
            train_dataset=Dataset.from_list(
                [
                    {name: value for name, value in row.items() if lawf or name != "confidence"}
                    | {"attention_mask": [1] * LENGTH}
                    for row in rows
                ]
            ),
            processing_class=tokenizer,
            data_collator=default_data_collator,
            callbacks=[clock],
        )
        return measured(trainer, clock)


def plain_lawf_trainer(base):
    class PlainLAwF(base):
        """LAwF as one writes it over two sets of full logits."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            confidence, labels = inputs.pop("confidence")[:, 1:], inputs.pop("labels")[:, 1:]
            with torch.no_grad(), model.disable_adapter():
                p_ref = model(**inputs).logits[:, :-1].float().softmax(-1)
            log_p = model(**inputs).logits[:, :-1].float().log_softmax(-1)
            c = confidence[..., None].to(log_p.dtype)
            q = (1 - c) * p_ref
            q.scatter_add_(2, labels[..., None], c)
            return (torch.xlogy(q, q) - q * log_p).sum() / num_items_in_batch

    return PlainLAwF


if __name__ == "__main__":
    main()
