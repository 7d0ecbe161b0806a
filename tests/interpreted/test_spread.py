"""A head that is spread over ranks, the products of its entries by Triton's kernels."""

from __future__ import annotations

import spread_ranks
import torch
import torch.multiprocessing
from cases import relative
from processes import pythonpath
from spread_ranks import gathered, small_case, token_losses


def test_sparse_gradients_as_without_triton(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", pythonpath())
    torch.multiprocessing.start_processes(
        spread_ranks.interpreted, (2, str(tmp_path)), nprocs=2, start_method="forkserver"
    )
    got = gathered(2, str(tmp_path))["small"]
    one = token_losses(small_case(), small_case().inputs(torch.float32), gradient="sparse", backend="torch")
    assert got["entries"] == one["entries"] and got["exact_tokens"] == 0
    for output in ("nll", "d_hidden", "d_weight"):
        assert relative(got[output], one[output]) <= 2e-6, output
