"""Other people's trainers, by their own commands, with this package's losses: the losses they log beside their own.

    python tests/integrations/real.py --trainer llamafactory --environment FOLDER

makes a virtual environment in FOLDER with that trainer (some minutes and gigabytes, once), a tiny model and data, and
trains a few steps each with the trainer's own loss and with ours in its place. It ends with a table, and with status 1
where two that must agree do not, 77 where the trainer cannot be installed. Nothing is fetched but packages of pip's
index; no GPU is needed. `--install "..."` replaces what is installed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SKIPPED = 77
STEPS, ACCUMULATE = 3, 2
EAFT = 3.0 / math.log(20)  # LLaMA-Factory divides the entropy by 3.0, we by ln 20


@dataclass
class Case:
    """A training with ours, and one of the trainer's own with which its log must agree."""

    name: str
    ours: dict[str, Any]
    theirs: dict[str, Any] | None = None
    factor: float = 1.0  # ours / theirs
    tolerance: float = 2e-5  # of float32, in another order
    logs: tuple[str, ...] = ("nll", "mean_weight")
    both: dict[str, Any] = field(default_factory=dict)  # of the trainer's own, in both trainings; {work}: the folder
    mean_weight: float | None = None  # that must be logged
    words: tuple[str, ...] = ()  # after the configuration of ours
    evaluated: bool = False  # the evaluation after training must be the last one in it
    resumed: dict[str, Any] | None = None  # of the trainer's own: another training from {checkpoint}, as the first one


@dataclass
class Refusal:
    """A training with ours that must end with a sentence, before the first step."""

    said: str
    ours: dict[str, Any]
    theirs: dict[str, Any] = field(default_factory=dict)  # of the trainer's own; None takes one away


GROUPS = {"reduction": "group_mean"}
ANCHORS = ("nll", "mean_weight", "kl", "anchor_probability")

WITH_REFERENCE = [
    Case("LAwF", dict(fused_loss="lawf", fused_loss_reference="base"), logs=ANCHORS),
    Case("LAwF, start", dict(fused_loss="lawf", fused_loss_reference="start"), logs=ANCHORS),
    # Its gradients, weighed by probabilities, are small; axolotl draws an adapter before it sets the seed.
    Case("ASFT", dict(fused_loss="asft", fused_loss_reference="base"), logs=("nll", "mean_weight", "kl"), both={
        "learning_rate": 1.0,
    }),
    Case("TALR", dict(fused_loss="talr", fused_loss_options={"temperature": 5.0})),
]  # fmt: skip


def anchored(**both: Any) -> Case:
    """Rows of 10 tokens with two anchors each, so 2 of 9 labels."""
    reference = dict(fused_loss="lawf", fused_loss_reference="base")
    return Case("LAwF, anchors", reference, logs=ANCHORS, both=both, mean_weight=2 / 9)


RESUMED = {"save_steps": 1}
CHECKPOINT = {"resume_from_checkpoint": "{checkpoint}"}  # that of the first step
IN_WORK = "{work}/LAwF-resumed-ours/checkpoint-1"


def resumed(**whole: Any) -> list[Case]:
    """`whole`: of the trainer's own, to train all weights, whose original is the start."""
    base, start = (case.ours for case in WITH_REFERENCE[:2])
    return [
        Case("LAwF, resumed", base, logs=ANCHORS, both=RESUMED, resumed=CHECKPOINT),
        Case("LAwF, start, resumed", start, logs=ANCHORS, both={**RESUMED, **whole}, resumed=CHECKPOINT),
    ]


# --- the trainers


def yaml(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(json.dumps(config, indent=1))  # JSON is YAML
    return path


def llamafactory(work: Path, output: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    (work / "dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "alpaca.json"}}))
    config = yaml(output.with_suffix(".yaml"), {
        "model_name_or_path": str(work / "model"), "trust_remote_code": False, "stage": "sft", "do_train": True,
        "finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj,v_proj", "lora_dropout": 0.0,
        "dataset": "tiny", "dataset_dir": str(work), "template": "default", "cutoff_len": 64,
        "preprocessing_num_workers": 1, "dataloader_num_workers": 0, "output_dir": str(output), "logging_steps": 1,
        "save_steps": STEPS, "max_steps": STEPS, "report_to": "none", "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATE, "learning_rate": 0.05, "lr_scheduler_type": "constant",
        "use_cpu": True, "seed": 1, "optim": "sgd", **ours, **theirs,
    })  # fmt: skip
    module = "fused_losses.integrations.llamafactory" if ours else "llamafactory.cli"
    return ["-m", module, *([] if ours else ["train"]), str(config)]


def swift(work: Path, output: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    arguments = {
        "model": work / "model", "model_type": "llama", "template": "llama3", "dataset": work / "messages.jsonl",
        "tuner_type": "lora", "lora_rank": 4, "target_modules": "q_proj v_proj", "lora_dropout": 0, "max_steps": STEPS,
        "max_length": 64, "split_dataset_ratio": 0, "output_dir": output, "add_version": "false", "logging_steps": 1,
        "save_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": ACCUMULATE,
        "learning_rate": 0.05, "lr_scheduler_type": "constant", "optim": "sgd", "use_cpu": "true", "seed": 1,
        "data_seed": 1, "torch_dtype": "float32", "dataloader_num_workers": 0, "dataset_num_proc": 1,
        "report_to": "none", "gradient_checkpointing": "false", **theirs,
    }  # fmt: skip
    if ours:
        plugin = output.with_suffix(".py")
        command = ["-m", "fused_losses", "swift-plugin", str(plugin), "--force", "--loss", ours["fused_loss"]]
        command += [f"--option={k}={v}" for k, v in ours.get("fused_loss_options", {}).items()]
        if "fused_loss_reference" in ours:
            command += ["--reference", ours["fused_loss_reference"]]
        run(work.parent, command)
        arguments |= {"external_plugins": plugin, "callbacks": "fused_losses", **theirs}
    verb = arguments.pop("command", "sft")
    given = {k: v for k, v in arguments.items() if v is not None}
    words = [word for k, v in given.items() for word in (f"--{k}", *str(v).split(" "))]
    return ["-m", "swift.cli.main", verb, *words]


def axolotl(work: Path, output: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    config = {
        "base_model": str(work / "model"), "tokenizer_config": str(work / "model"), "adapter": "lora", "lora_r": 4,
        "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "v_proj"], "sequence_len": 64,
        "datasets": [{"path": str(work / "alpaca.json"), "ds_type": "json", "type": "alpaca"}], "val_set_size": 0,
        "dataset_prepared_path": str(output / "prepared"), "output_dir": str(output), "max_steps": STEPS,
        "micro_batch_size": 2, "gradient_accumulation_steps": ACCUMULATE, "learning_rate": 0.05, "optimizer": "sgd",
        "lr_scheduler": "constant", "logging_steps": 1, "save_steps": STEPS, "seed": 1, "bf16": False, "fp16": False,
        "tf32": False, "use_cpu": True, "dataset_processes": 1, "dataloader_num_workers": 0, "attn_implementation":
        "eager", "sample_packing": False, "special_tokens": {"pad_token": "<pad>", "eos_token": "<eos>"},
        "lora_qkv_kernel": False, "lora_mlp_kernel": False, "lora_o_kernel": False,
        **({"plugins": [PLUGIN]} if ours else {}), **ours, **theirs,
    }  # fmt: skip
    if config["adapter"] is None:
        config = {key: value for key, value in config.items() if not key.startswith("lora_") and key != "adapter"}
    return ["-m", "axolotl.cli.train", str(yaml(output.with_suffix(".yaml"), config))]


@dataclass
class Trainer:
    """One to try: what pip installs, in turn, the command of a training, and what is compared."""

    install: list[str]
    command: Callable[..., list[str]]
    cases: list[Case]
    refused: list[Refusal]
    environment: dict[str, str] = field(default_factory=dict)


SFT = dict(fused_loss="sft")
PLUGIN = "fused_losses.integrations.axolotl.FusedLossesPlugin"
# axolotl's LoRA begins elsewhere in each run, so what is compared trains all weights. Its own cross-entropy is the mean
# of the accumulated batches' means, and its EAFT does not divide the entropy.
WHOLE = {"adapter": None}
PACKED = {"sample_packing": True, "attn_implementation": "sdpa", "micro_batch_size": 1}
# Its own pins, without what neither text nor a CPU needs: xformers, flash-linear-attention, liger-kernel, kernels,
# lm_eval, gradio, modal, trackio, mistral-common, the file systems of clouds, ...
AXOLOTL = [
    "torch==2.13.0 transformers==5.16.1 trl==1.9.0 peft==0.20.0 accelerate==1.13.0 datasets==4.8.4 tokenizers==0.23.1 "
    "huggingface_hub==1.17.0 pydantic==2.12.5 PyYAML==6.0.3 packaging==26.0 typing-extensions==4.15.0 numpy<3 addict "
    "fire requests einops colorama typer==0.25.1 python-dotenv==1.0.1 art scipy sentencepiece zstandard==0.22.0 "
    "posthog==6.7.11 pillow numba tensorboard evaluate==0.4.1 wandb",
    "--no-deps axolotl==0.19.0 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 bitsandbytes==0.50.2 fastcore "
    "torchao==0.17.0 optimum==1.16.2 triton==3.7.1",
]
TRAINERS = {
    "llamafactory": Trainer(
        ["torch==2.13.0 llamafactory==0.9.5 jieba nltk rouge-chinese"], llamafactory,  # those three: to predict
        [
            Case("cross-entropy", SFT, {}),
            Case("command line", SFT, {}, words=("learning_rate=5e-2", "fused_loss_options.label_smoothing=0.0")),
            Case("DFT", dict(fused_loss="dft"), {"use_dft_loss": True}),
            Case("EAFT", dict(fused_loss="eaft"), {"use_eaft_loss": True}, factor=EAFT, tolerance=2e-4),
            *WITH_REFERENCE,
            *resumed(finetuning_type="full"),
            anchored(tokenized_path="{work}/tokenized"),
            Case("LAwF, evaluation", WITH_REFERENCE[0].ours, logs=ANCHORS, evaluated=True,
                 both={"val_size": 0.25, "eval_strategy": "steps", "eval_steps": STEPS, "do_eval": True}),
            Case("LAwF, generation", WITH_REFERENCE[0].ours, logs=ANCHORS,
                 both={"predict_with_generate": True, "do_predict": True, "eval_dataset": "tiny", "max_new_tokens": 4,
                       "max_samples": 6}),
        ],
        [
            Refusal("use_dft_loss: LLaMA-Factory would", SFT, {"use_dft_loss": True}),
            Refusal("PatchCallback: reference='start' has the weights of the checkpoint", WITH_REFERENCE[1].ours,
                    {"adapter_name_or_path": IN_WORK, "resume_from_checkpoint": IN_WORK}),
        ],
    ),
    "swift": Trainer(
        ["torch==2.13.0 ms-swift==4.6.0"], swift,
        [
            Case("cross-entropy", SFT, {}),
            Case("DFT", dict(fused_loss="dft"), {"enable_dft_loss": "true"}),
            Case("loss_scale", dict(fused_loss="weighted"), {},
                 both={"dataset": "{work}/scaled.jsonl", "is_binary_loss_scale": "false"}),
            *WITH_REFERENCE,
            *resumed(tuner_type="full"),
            Case("LAwF, group means", dict(fused_loss="lawf", fused_loss_reference="base", fused_loss_options=GROUPS)),
        ],
        [
            Refusal("enable_dft_loss: ms-swift would", SFT, {"enable_dft_loss": "true"}),
            Refusal("--callbacks: expected fused_losses among them, got none", SFT, {"callbacks": None}),
            Refusal("--task_type seq_cls: its trainer", SFT, {"task_type": "seq_cls", "num_labels": 2}),
            Refusal("--rlhf_type dpo: its trainer", SFT, {"command": "rlhf", "rlhf_type": "dpo"}),
            Refusal("--tuner_type full has none", WITH_REFERENCE[0].ours, {"tuner_type": "full"}),
            Refusal("--loss_scale all: every token is learned", WITH_REFERENCE[0].ours, {"loss_scale": "all"}),
            Refusal("--loss_scale react: weighs tokens", WITH_REFERENCE[3].ours, {"loss_scale": "react"}),
            Refusal("reference: start would be the checkpoint", WITH_REFERENCE[1].ours,
                    {"resume_from_checkpoint": IN_WORK}),
        ],
    ),
    "axolotl": Trainer(
        AXOLOTL, axolotl,
        [
            Case("cross-entropy", SFT, {}, both={**WHOLE, "gradient_accumulation_steps": 1}),
            Case("EAFT", dict(fused_loss="eaft"), {"use_eaft": True}, 1 / math.log(20), 2e-4, both=WHOLE),
            Case("packed", SFT, {}, both={**WHOLE, "gradient_accumulation_steps": 1, **PACKED}),
            Case("LAwF, packed", WITH_REFERENCE[0].ours, logs=ANCHORS, both=PACKED),
            *WITH_REFERENCE,
            *resumed(**WHOLE),
            Case("LAwF, group means", dict(fused_loss="lawf", fused_loss_reference="base", fused_loss_options=GROUPS)),
            anchored(datasets=[{"path": "{work}/tokenized.jsonl", "ds_type": "json", "type": None}]),
        ],
        [
            Refusal("use_eaft: axolotl would", SFT, {"use_eaft": True}),
            Refusal("fused_los: there is no such key; did you mean fused_loss?", dict(fused_los="talr")),
            Refusal("temperature: expected", dict(fused_loss="talr", fused_loss_options={"temperature": "two"})),
            Refusal("fused_loss: is not in the configuration", {}, {"plugins": [PLUGIN]}),
            Refusal("adapter: is not in the configuration", WITH_REFERENCE[0].ours, WHOLE),
            Refusal("PerplexityCallback: reference='start' has the weights of the checkpoint", WITH_REFERENCE[1].ours,
                    {"lora_model_dir": IN_WORK, "resume_from_checkpoint": IN_WORK}),
        ],
        {"AXOLOTL_DO_NOT_TRACK": "1"},
    ),
}  # fmt: skip


# --- environment, model, data


def python(environment: Path) -> Path:
    return environment / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"


def install(environment: Path, steps: list[str]) -> None:
    """Once; SystemExit(77) with pip's last lines where it cannot be done."""
    done = environment / "installed.txt"
    if done.is_file() and done.read_text() == "\n".join(steps):
        return
    environment.mkdir(parents=True, exist_ok=True)
    if not python(environment).exists():
        venv.create(environment / "env", with_pip=True)
    for step in steps:
        print(f"pip install {step}", flush=True)
        command = [str(python(environment)), "-m", "pip", "install", "-q", *step.split()]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            print("skipped: it cannot be installed here:\n" + result.stderr[-1500:])
            raise SystemExit(SKIPPED)
    for name in ("torchvision", "torchaudio"):
        leave_out_unusable(environment, name)
    done.write_text("\n".join(steps))


def leave_out_unusable(environment: Path, name: str) -> None:
    """PyPI's torchvision and torchaudio are for torch with CUDA, and cannot be imported beside another. Text needs
    neither, but LLaMA-Factory imports torchaudio at once, so an empty module takes its place."""
    installed = not run(environment, ["-c", f"import importlib.metadata as m; m.version('{name}')"]).returncode
    if not installed or not run(environment, ["-c", f"import {name}"]).returncode:
        return
    print(f"left out, as it does not fit this torch: {name}", flush=True)
    run(environment, ["-m", "pip", "uninstall", "-q", "-y", name])
    folder = run(environment, ["-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).stdout.strip()
    if name == "torchaudio":
        (Path(folder) / f"{name}.py").write_text("")


def make_inputs(work: Path) -> None:
    """Run in the environment: a Llama of two layers with a tokenizer of words, and answers to learn."""
    import random

    import torch
    from datasets import Dataset, DatasetDict
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<pad>", "<unk>", "<bos>", "<eos>"]
    words = {word: i for i, word in enumerate([*names, *(f"w{i}" for i in range(100))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), names, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **tokens)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    tokenizer.save_pretrained(work / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(work / "model")
    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(f"w{draw.randrange(100)}" for _ in range(draw.randint(least, most)))

    rows = [{"instruction": text(3, 8), "input": "", "output": text(4, 14)} for _ in range(24)]
    (work / "alpaca.json").write_text(json.dumps(rows))
    chats = [
        {"messages": [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]}
        for row in rows
    ]
    write_lines(work / "messages.jsonl", chats)
    for chat in chats:
        chat["messages"][1]["loss_scale"] = draw.choice([0.25, 0.5, 2.0])
    write_lines(work / "scaled.jsonl", chats)
    tokenized = []
    for _ in range(24):
        ids = [draw.randrange(4, 104) for _ in range(10)]
        tokenized.append({"input_ids": ids, "attention_mask": [1] * 10, "labels": ids, "anchors": [7, 9]})
    write_lines(work / "tokenized.jsonl", tokenized)
    shutil.rmtree(work / "tokenized", ignore_errors=True)
    DatasetDict({"train": Dataset.from_list(tokenized)}).save_to_disk(work / "tokenized")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- trainings


def run(environment: Path, command: list[str], more: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    offline = {
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
    variables = {**os.environ, **offline, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(more or {})}
    variables["PATH"] = f"{python(environment).parent}{os.pathsep}{variables['PATH']}"
    variables["HF_HOME"] = str(environment / "cache")
    words = [str(python(environment)), *command]
    return subprocess.run(words, capture_output=True, text=True, env=variables, cwd=environment, timeout=3000)


def logs(output: Path) -> list[dict[str, float]]:
    """What a Trainer logged of each step."""
    found = sorted(output.rglob("trainer_state.json"))
    if not found:
        return []
    return [entry for entry in json.loads(found[-1].read_text())["log_history"] if "loss" in entry]


def evaluations(output: Path) -> tuple[float, float]:
    """The losses of the last evaluation in training, and of that after it."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    after = json.loads((output / "eval_results.json").read_text())["eval_loss"]
    return [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1], after


def folder(environment: Path, name: str) -> Path:
    return environment / "work" / name.replace(" ", "-").replace(",", "")


def trained(
    environment: Path, trainer: Trainer, name: str, ours: dict, theirs: dict, words: tuple[str, ...] = ()
) -> list[dict[str, float]]:
    work, output = environment / "work", folder(environment, name)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    theirs = json.loads(json.dumps(theirs).replace("{work}", str(work)))
    result = run(environment, [*trainer.command(work, output, ours, theirs), *words], trainer.environment)
    (output / "log.txt").write_text(result.stdout + result.stderr)
    found = logs(output)
    if result.returncode or len(found) != STEPS:
        raise RuntimeError(f"{name}: exit status {result.returncode}, {len(found)} steps logged; {output / 'log.txt'}")
    return found


def compare(environment: Path, trainer: Trainer, case: Case) -> str | None:
    """Prints a row or two; what is wrong, or None."""
    ours = trained(environment, trainer, f"{case.name} ours", case.ours, case.both, case.words)
    print(f"{case.name:14} ours    " + "  ".join(f"{entry['loss']:.6f}" for entry in ours), flush=True)
    missing = [name for name in case.logs if name not in ours[-1]]
    if missing:
        return f"{case.name}: {', '.join(missing)} not in the log, which has {', '.join(ours[-1])}"
    if not all(math.isfinite(entry["loss"]) and entry.get("grad_norm", 1) > 0 for entry in ours):
        return f"{case.name}: no finite loss, or no gradient"
    if any("ppl" in entry and not math.isclose(entry["ppl"], math.exp(entry["nll"]), rel_tol=1e-4) for entry in ours):
        return f"{case.name}: a ppl that is not exp(nll), got {ours}"
    if case.mean_weight is not None and not math.isclose(ours[0]["mean_weight"], case.mean_weight, rel_tol=1e-5):
        return f"{case.name}: mean_weight {ours[0]['mean_weight']}, expected {case.mean_weight}"
    if "kl" in case.logs and not (abs(ours[0]["kl"]) < 1e-8 < ours[-1]["kl"]):
        return f"{case.name}: a KL of 0 before the first step and more after was expected, got {ours}"
    if case.evaluated:
        during, after = evaluations(folder(environment, f"{case.name} ours"))
        if not math.isclose(during, after, rel_tol=1e-6):
            return f"{case.name}: evaluation after training says {after}, the last one in it {during}"
    if case.resumed is not None:
        checkpoint = next(folder(environment, f"{case.name} ours").rglob("checkpoint-1"))
        given = json.loads(json.dumps({**case.both, **case.resumed}).replace("{checkpoint}", str(checkpoint)))
        again = trained(environment, trainer, f"{case.name} again", case.ours, given, case.words)
        print(f"{case.name:14} again   " + "  ".join(f"{entry['loss']:.6f}" for entry in again), flush=True)
        for a, b in zip(again, ours, strict=True):
            for key in ("loss", *case.logs):
                if not math.isclose(a[key], b[key], rel_tol=case.tolerance, abs_tol=1e-8):
                    return f"{case.name}: {key} {a[key]} is not {b[key]}, that of the training that was not interrupted"
    if case.theirs is None:
        return None
    theirs = trained(environment, trainer, f"{case.name} theirs", {}, {**case.both, **case.theirs})
    print(f"{case.name:14} theirs  " + "  ".join(f"{entry['loss']:.6f}" for entry in theirs), flush=True)
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm"):
            if key in b and not math.isclose(a[key], b[key] * case.factor, rel_tol=case.tolerance):
                return f"{case.name}: {key} {a[key]} is not {b[key]} × {case.factor:.6f}"
    return None


def refused(environment: Path, trainer: Trainer, refusal: Refusal) -> str | None:
    """Prints a row; what is wrong, or None."""
    print(f"refused        {refusal.said}", flush=True)
    try:
        trained(environment, trainer, "refused", refusal.ours, refusal.theirs)
    except RuntimeError:
        log = environment / "work" / "refused" / "log.txt"
        return None if refusal.said in log.read_text() else f"{refusal.said}: not the reason in {log}"
    return f"{refusal.said}: trained"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=list(TRAINERS))
    parser.add_argument("--environment", type=Path, metavar="FOLDER")
    parser.add_argument("--install", action="append", metavar="ARGUMENTS", help="of pip, instead of the pins")
    parser.add_argument("--only", nargs="*", metavar="CASE", help="names of the table's rows, or part of a refusal")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        return make_inputs(given.make)
    if given.trainer is None or given.environment is None:
        parser.error("--trainer and --environment are needed")
    trainer, environment = TRAINERS[given.trainer], given.environment.resolve()
    install(environment, given.install or trainer.install)
    (environment / "work").mkdir(exist_ok=True)
    made = run(environment, [str(Path(__file__).resolve()), "--make", str(environment / "work")])
    if made.returncode:
        raise SystemExit(made.stderr)
    wrong = []
    for case in trainer.cases:
        if given.only is None or case.name in given.only:
            try:
                wrong.append(compare(environment, trainer, case))
            except RuntimeError as error:
                wrong.append(str(error))
    for refusal in trainer.refused:
        if given.only is None or any(name in refusal.said for name in given.only):
            wrong.append(refused(environment, trainer, refusal))
    found = [sentence for sentence in wrong if sentence]
    print("\n".join(found) or "all as expected")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
