"""What processes started by tests need to know."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
LIMIT = 1800  # seconds; a hang ends earlier, by gloo's own limit of 600
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
              "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--main_process_port", "0"]  # fmt: skip


def pythonpath() -> str:
    """PYTHONPATH of a process that imports from tests/support, and fused_losses from this tree."""
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(SUPPORT), str(ROOT), *([inherited] if inherited else [])])


def launched(command: list[str]) -> None:
    """By a launcher of several processes, until all have ended well."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]


def leave() -> NoReturn:
    """Ends a rank whose results are written, without the interpreter's own way out.

    There the threads of a gloo group that something still refers to (accelerate's device meshes do) are destroyed while
    they run, which now and then aborts the process: github.com/pytorch/pytorch/issues/190489.
    """
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
