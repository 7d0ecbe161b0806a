"""What the commands for a GPU share: what is known of the machine, results that survive a kill, and the dry mode.

Dry: the same code on CPU tensors in Triton's interpreter, tiny shapes, times of no meaning; so that every line has run
before there is a GPU. By `--dry` or FUSED_LOSSES_GPU_DRY=1.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DRY = os.environ.get("FUSED_LOSSES_GPU_DRY") == "1" or "--dry" in sys.argv
if DRY:
    os.environ["FUSED_LOSSES_GPU_DRY"] = os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

# Results of a dry run mean nothing, and are kept apart.
RESULTS = Path(tempfile.gettempdir()) / "fused-losses-dry" if DRY else ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

DEVICE = "cpu" if DRY else "cuda"


def require_gpu() -> None:
    if not DRY and not torch.cuda.is_available():
        built = "no GPU visible" if torch.version.cuda else "torch is a CPU build"
        sys.exit(f"{built}; --dry runs the same code on the CPU, on tiny shapes")


def build_kernels() -> None:
    """The CUDA kernels, once for all processes of the run; says why not."""
    from fused_losses.kernels import schemas

    reason = None if DRY else schemas.build_and_load_cuda()
    if reason is not None:
        print(f"CUDA kernels: {reason}", flush=True)


def facts() -> dict[str, str | None]:
    """Device, versions, commit and date of a run."""
    import triton

    import fused_losses
    from fused_losses.kernels import schemas

    gpu = not DRY
    return {
        "device": torch.cuda.get_device_name() if gpu else "dry run: " + platform.machine(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
        "python": platform.python_version(), "fused_losses": fused_losses.__version__,
        "cuda kernels": schemas.load_cuda() or "built",
        # A copy of the tree without its history is told by the environment.
        "commit": os.environ.get("FUSED_LOSSES_COMMIT")
        or _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip().splitlines() or [""])[0] if done.returncode == 0 else None


def result_path(name: str, device: str, folder: Path) -> Path:
    """<name>-<device>.json, the device's name in lower case with hyphens."""
    return folder / f"{name}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def save(path: Path, content: dict) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
