"""What test_distributed.py runs on several ranks: the cases that the imported files register."""

from __future__ import annotations

import datetime
import json
import traceback
import warnings
from pathlib import Path
from typing import Any

import distributed_ddp  # noqa: F401
import distributed_fsdp  # noqa: F401
import distributed_parallel  # noqa: F401
import torch
import torch.distributed as dist
from distributed_ranks import CASES, Ranks
from processes import leave

from fused_losses.sparse import softmax


def work(rank: int, world: int, directory: str) -> None:
    """All cases of a world size on one rank; results are written to `directory`.

    Nothing runs after a failure: ranks are out of step then.
    """
    torch.set_num_threads(1)
    softmax.FINEST_HALF = 1.0  # float16 entries are another matter
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers the old way
    results: dict[str, Any] = {}
    path = Path(directory)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path / 'store'}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=600),
    )
    ranks = Ranks(rank, world)
    for name, (function, _) in CASES[world].items():
        torch.manual_seed(0)
        (path / f"{rank}.json").write_text(json.dumps({**results, name: {"error": "did not return"}}))
        try:
            results[name] = {"difference": function(ranks)}
        except BaseException:  # pytest.raises has one of its own
            results[name] = {"error": traceback.format_exc()}
            break
        finally:
            (path / f"{rank}.json").write_text(json.dumps(results))
    if "error" not in results[name]:
        leave()
