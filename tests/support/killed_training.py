"""A tiny training that kills itself.

python tests/support/killed_training.py FOLDER DATA WHEN: "save" in the middle of the checkpoint of step 6, "saved"
after it, "report" while the report of step 5 is written, "adapter" while the adapter is, "never".
"""

import os
import signal
import sys
from pathlib import Path

import torch
from tiny_training import tiny_llama, tokenizer

from fused_losses import training
from fused_losses.training.folder import Folder

OPTIONS = dict(method="lawf", steps=12, lora=2, save_every=3, learning_rate=0.03, batch_size=1, progress=False)


def train(folder: Path, data: Path) -> dict:
    torch.set_num_threads(1)
    return training.train(tiny_llama, tokenizer(), data, folder, **OPTIONS)


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arrange(when: str) -> None:
    mark, write = Folder.mark, Folder._write
    steps = []

    def marked(self: Folder, step: int) -> None:
        mark(self, step)
        if when == "saved" and step == 6:
            kill()

    def written(self: Folder, path: Path, make) -> None:
        if path.name == "report.json":
            steps.append(path)
        half = (when == "report" and path.name == "report.json" and len(steps) == 6) or when == path.name
        write(self, path, (lambda temporary: (make(temporary), kill())) if half else make)

    Folder.mark, Folder._write = marked, written
    if when == "save":
        save, count = torch.save, []

        def saved(value: object, file: object, *args: object, **options: object) -> None:
            name = str(file)
            if "checkpoint-6" in name:
                count.append(name)
                Path(name).write_bytes(b"half")
                kill()
            save(value, file, *args, **options)

        torch.save = saved


if __name__ == "__main__":
    arrange(sys.argv[3])
    train(Path(sys.argv[1]), Path(sys.argv[2]))
