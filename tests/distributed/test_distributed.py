"""Patched models on several ranks (gloo, CPU) do what one process does with the whole batch.

The cases are those of tests/support/distributed_cases.py.
"""

import importlib.util
import json
import multiprocessing
import time

import distributed_cases
import pytest
from distributed_ranks import CASES, ROUNDING
from processes import ACCELERATE, LIMIT, SUPPORT, TORCHRUN, launched, pythonpath


@pytest.fixture
def environment(monkeypatch):
    """For processes that import what this file does."""
    monkeypatch.setenv("PYTHONPATH", pythonpath())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("world", CASES)
def test_as_one_process(world, tmp_path, environment):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed_cases"])  # transformers takes seconds to import
    processes = [
        context.Process(target=distributed_cases.work, args=(rank, world, str(tmp_path))) for rank in range(world)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    for process in processes:
        process.kill()
    failed = []
    for rank in range(world):
        path = tmp_path / f"{rank}.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        for name, (_, bound) in CASES[world].items():
            result = results.get(name, {"error": "not run: another case failed before, or this rank died"})
            if "error" in result:
                failed.append(f"rank {rank} of {world}, {name}: {result['error']}")
                break
            if result["difference"] is not None and not result["difference"] <= bound:
                failed.append(f"rank {rank} of {world}, {name}: difference {result['difference']:.2e} > {bound:.0e}")
    assert not failed, "\n".join(failed)


def launch(command, script, tmp_path):
    """The script's differences; it is started by `command`."""
    path = tmp_path / "differences.json"
    launched([*command, str(SUPPORT / script), str(path)])
    return json.loads(path.read_text())


@pytest.mark.parametrize("command", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_trainer(command, tmp_path, environment):
    differences = launch(command, "distributed_trainer.py", tmp_path)
    assert len(differences) == 7
    assert max(differences.values()) <= 7e-6, differences  # measured: 2.4e-6


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero(tmp_path, environment):
    differences = launch(TORCHRUN, "distributed_zero.py", tmp_path)
    assert max(differences.values()) <= ROUNDING, differences
