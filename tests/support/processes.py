"""What processes started by tests need to know."""

import os
import sys
from pathlib import Path
from typing import NoReturn

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]


def pythonpath() -> str:
    """PYTHONPATH of a process that imports from tests/support, and fused_losses from this tree."""
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(SUPPORT), str(ROOT), *([inherited] if inherited else [])])


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
