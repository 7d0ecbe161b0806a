"""torchtitan's own trainer with this package's losses, on a CPU: the losses it logs beside those of its own loss.

    python tests/integrations/real_torchtitan.py --environment FOLDER

makes a virtual environment in FOLDER with torchtitan, a tokenizer and texts, and trains its debug model for a few
steps on one process and, sharded by FSDP2, on two: with its ChunkedLossWrapper and with FusedLoss. It ends with status
1 where two that must agree do not, 77 where torchtitan cannot be installed. torchtitan has no CPU as a device: what it
asks of torch.cuda is answered by stand-ins (`train`), and its attention is PyTorch's.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import random
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PINS = ["torch==2.13.0 torchtitan==0.3.0 triton==3.7.1 numpy"]
STEPS = 4
FLOAT32 = ["--training.mixed_precision_param", "float32"]
RANKS = {1: [], 2: ["--parallelism.spmd_backend", "partial_dtensor"]}  # torch 2.13 has not what its default needs
CASES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {  # FusedLoss.Config of the two that must agree
    "cross-entropy": (None, {"loss": "sft"}),
    "a large τ": ({"loss": "sft"}, {"loss": "talr", "options": {"temperature": 1e9}}),
}
ALONE = {"TALR": {"loss": "talr"}, "DFT": {"loss": "dft"}}  # nothing of torchtitan's to compare with


# --- in the environment


def registry(module: types.ModuleType) -> None:
    """Puts `tiny` into the module: torchtitan's debug model, with the loss that FUSED names."""
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    def tiny() -> Any:
        config = llama3_debugmodel()
        for layer in config.model_spec.model.layers:
            layer.attention.inner_attention = ScaledDotProductAttention.Config()
        config.hf_assets_path, config.dataloader.dataset_path = "assets", "data"
        config.training.local_batch_size, config.training.seq_len, config.training.steps = 2, 64, STEPS
        config.debug.seed = 1
        if os.environ.get("FUSED"):
            from fused_losses.integrations.torchtitan import FusedLoss

            config.loss = FusedLoss.Config(**json.loads(os.environ["FUSED"]))
        return config

    module.tiny = tiny


def train() -> None:
    """torchtitan.train.main, where a CPU answers for an accelerator."""
    import torch
    import torch._utils
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule

    torch._utils._get_available_device_type = lambda: "cpu"
    memory = types.SimpleNamespace(total_memory=2**34)
    answers = {
        "set_device": None, "get_device_name": "CPU", "get_device_properties": memory, "empty_cache": None,
        "reset_peak_memory_stats": None, "memory_stats": collections.defaultdict(int),
    }  # fmt: skip
    for name, answer in answers.items():
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, lambda *_, answer=answer: answer)
    barrier, divide = dist.barrier, FSDPModule.set_gradient_divide_factor
    dist.barrier = lambda *given, device_ids=None, **more: barrier(*given, **more)

    def summed(self: Any, factor: float) -> None:  # gloo has no other reduction
        self.set_force_sum_reduction_for_comms(True)
        divide(self, factor)

    FSDPModule.set_gradient_divide_factor = summed
    import torchtitan.distributed.utils

    torchtitan.distributed.utils.set_pg_timeouts = lambda *_, **__: None
    for name in ("tiny", "tiny.config_registry"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["tiny"].__path__ = []
    registry(sys.modules["tiny.config_registry"])
    from torchtitan.train import main

    main()


# --- outside


def make_inputs(work: Path) -> None:
    """A tokenizer of words, and documents of 5 to 60 of them."""
    (work / "assets").mkdir(parents=True, exist_ok=True)
    (work / "data").mkdir(exist_ok=True)
    words = [f"w{i}" for i in range(2000)]
    named = ["<eos>", "<bos>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*named, *words])}
    tokenizer = {
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }  # fmt: skip
    (work / "assets" / "tokenizer.json").write_text(json.dumps(tokenizer))
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True, "add_eos_token": True}
    (work / "assets" / "tokenizer_config.json").write_text(json.dumps(tokens))
    draw = random.Random(0)
    texts = (" ".join(draw.choice(words) for _ in range(draw.randint(5, 60))) for _ in range(200))
    (work / "data" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def trained(python: Path, work: Path, ranks: int, loss: dict[str, Any] | None) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, as logged."""
    command = [str(python), "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "29517"]
    command += [str(Path(__file__).resolve()), "--train", "--module", "tiny", "--config", "tiny", *FLOAT32]
    variables = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(work / "cache"), "FUSED": json.dumps(loss) if loss else "",
    }  # fmt: skip
    result = subprocess.run(
        command + RANKS[ranks], capture_output=True, text=True, env=variables, cwd=work, timeout=3000
    )
    plain = re.sub(r"\x1b\[[\d;]*m", "", result.stdout + result.stderr)
    found = re.findall(r"step:\s*(\d+)\s+loss:\s*([\d.]+)\s+grad_norm:\s*([\d.]+)", plain)
    steps = {int(step): (float(value), float(norm)) for step, value, norm in found}
    if result.returncode or len(steps) != STEPS:
        raise RuntimeError(f"{loss}, {ranks} ranks: exit status {result.returncode}\n{plain[-3000:]}")
    return [steps[i] for i in sorted(steps)]


def main() -> int:
    if "--train" in sys.argv:
        sys.argv.remove("--train")
        train()
        return 0
    sys.path.insert(0, str(Path(__file__).parent))
    import real

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, metavar="FOLDER", required=True)
    environment = parser.parse_args().environment.resolve()
    real.install(environment, PINS)
    work = environment / "work"
    make_inputs(work)
    wrong = []

    def show(name: str, ranks: int, steps: list[tuple[float, float]]) -> None:
        print(f"{name:24} {ranks} rank(s)  " + "  ".join(f"{a:.5f} {b:.4f}" for a, b in steps), flush=True)

    for ranks in RANKS:
        for name, pair in CASES.items():
            a, b = (trained(real.python(environment), work, ranks, loss) for loss in pair)
            show(name + ", theirs", ranks, a)
            show(name + ", ours", ranks, b)
            # Digits that are logged: 5 of the loss, 4 of the norm.
            if any(
                abs(x[0] - y[0]) > 2e-5 or not math.isclose(x[1], y[1], rel_tol=2e-4) for x, y in zip(a, b, strict=True)
            ):
                wrong.append(f"{name}, {ranks} ranks: not equal")
        for name, loss in ALONE.items():
            found = trained(real.python(environment), work, ranks, loss)
            show(name, ranks, found)
            if not all(0 < value < 9 and norm > 0 for value, norm in found):
                wrong.append(f"{name}, {ranks} ranks: {found}")
    print("\n".join(wrong) or "all as expected")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
