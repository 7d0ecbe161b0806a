"""The commands for a GPU, run dry on the CPU: gpu_check.py, gpu_bench.py and `fused-losses tune`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZER = """#!/usr/bin/env bash
[ "$1 $3 $4" = "--tool --error-exitcode 99" ] || exit 3
shift 4
[ "$1" = --report-api-errors ] && shift 2
"$@" && echo "========= ERROR SUMMARY: 0 errors"
"""
TUNE = "import quick_interpreter as q; q.install(); from fused_losses.cli import main; main()"


QUICK = "import runpy, sys, quick_interpreter as q; q.install(); sys.argv = sys.argv[1:]; "


def run(*command, seconds=1800, **environment):
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FUSED_LOSSES_GPU_DRY")}
    paths = [*map(str, (ROOT, ROOT / "benchmarks", ROOT / "tests/support")), os.environ.get("PYTHONPATH")]
    environment = inherited | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)} | environment
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
    )


def result(folder):
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("groups", ["kernels", pytest.param("losses", marks=pytest.mark.exhaustive)])
def test_check(groups, tmp_path):
    """One sanitizer besides, its place taken by a script that runs what it is given. tests/interpreted has the cases of
    the losses in every run."""
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(SANITIZER)
    sanitizer.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    only = ("--only", groups, "memcheck")
    limits = ("--seconds", 1800, "--sanitizer-seconds", 1800)
    done = run("benchmarks/gpu_check.py", "--dry", "--jobs", 1, *only, *limits, "--out", tmp_path / "out", PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = result(tmp_path / "out")
    assert found["facts"]["device"].startswith("dry run") and found["facts"]["date"]
    checks = [check for group in found["groups"].values() for check in group["checks"]]
    assert sum(check["outcome"] == "passed" for check in checks) > 15
    assert all(check["error"] <= check["bound"] for check in checks if "bound" in check)
    assert all(check["reason"] for check in checks if check["outcome"] == "skipped")
    memcheck = found["sanitizers"].pop("memcheck")
    assert memcheck["outcome"] == "passed" and memcheck["checks"] > 0
    assert memcheck["summary"] == "ERROR SUMMARY: 0 errors" and not found["sanitizers"]


def test_check_keeps_failures_and_crashes(tmp_path, monkeypatch, from_benchmarks):
    """A failed check, a crash and a process that takes too long end neither the run nor what came before them."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    gpu_check = from_benchmarks("gpu_check")

    test = tmp_path / "test_of_its_own.py"
    test.write_text(
        "import os, time\n"
        "def test_fails(within): within(sum=(0.5, 1.0), product=(3.0, 2.0))\n"
        "def test_nan(within): within(sum=(float('nan'), 1.0))\n"
        "def test_passes(within): within(sum=(0.25, 1.0))\n"
        "def test_crash(): os._exit(7)\n"
        "def test_never(): time.sleep(600)\n"
    )
    (tmp_path / "conftest.py").write_text((ROOT / "tests/gpu/conftest.py").read_text())
    (tmp_path / "machine.py").write_text("SKIP = ''\n")
    checks, trouble = gpu_check.run_group((str(test), "not never"), tmp_path / "a.jsonl", [], 600)
    assert [c["outcome"] for c in checks] == ["failed", "failed", "passed"] and trouble.startswith("exit status 7")
    assert checks[0]["output"] == "product" and checks[0]["ratio"] == 1.5 and "product: 3 > 2" in checks[0]["reason"]
    assert checks[1]["ratio"] != checks[1]["ratio"]
    line = gpu_check.line_of("group", {"checks": checks, "seconds": 1.0, "trouble": trouble})
    assert "!" in line and "exit status 7" in line
    checks, trouble = gpu_check.run_group((str(test), "never"), tmp_path / "b.jsonl", [], 8)
    assert checks == [] and trouble == "stopped after 8 s"
    output = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
    assert gpu_check.summary_of(f"a\n{output}\nb") == output[10:]
    assert gpu_check.summary_of("nothing") is None


def test_bench(tmp_path):
    command = ("benchmarks/gpu_bench.py", "--dry", "--seconds", 1800, "--out", tmp_path)
    done = run("-c", f"{QUICK}runpy.run_path(sys.argv[0], run_name='__main__')", *command, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    found = result(tmp_path)
    rows = {(row["objective"], row["name"]): row for row in found["losses"]}
    assert rows["TALR", "fused_losses, sparse"]["report"]["bound"] <= 0.15
    eight = [row for row in found["losses"] if row["name"] == "fused_losses, sparse, int8"]
    assert [(row["objective"], row["frozen"]) for row in eight] == [("TALR", False), ("TALR", True)]
    assert all(row["report"]["scan"] == "int8" and 0 <= row["nll_error"] < 0.004 for row in eight)
    assert rows["forward", "fused_losses, exact, int8"]["nll_error"] < 0.004
    assert rows["TALR", "eager"]["nll_error"] > rows["TALR", "fused_losses, sparse"]["nll_error"]
    # float16, and a sparse gradient of a few tokens.
    assert all(
        row.get("d_hidden_error", 0) < 0.05 for (_, name), row in rows.items() if name.startswith("fused_losses")
    )
    assert "reason" in rows["TALR", "fused_losses, sparse (cuda)"]
    assert all("ms" in row or row["reason"] for row in found["losses"])
    names = {row["name"] for row in found["kernels"]}
    assert names >= {
        "attention", "attention, LAwF", "columns_of_bits", "count_bits", "directions", "entry_logits", "logit_bits",
        "scan alone", "scan with a reference, directions", "segment_product",
        "tail_profile", "weighted_sum", "scan alone, directions", "scan alone, directions, 8 bits", "left_out",
        "quantize_rows", "kept_sums",
    }  # fmt: skip
    assert {s["objective"] for s in found["splits"]} == {"TALR", "LAwF"} and "attention" in found["splits"][0]["ms"]
    assert {"quantize_rows", "kept_sums", "scan alone, directions, 8 bits"} <= found["splits"][1]["ms"].keys()
    floors = {row["name"]: row for row in found["floors"]}
    assert len(floors) == 8 and all(row["ms"] > 0 for row in floors.values()), floors
    assert found["ceilings"]["memory_bytes_per_s"] > 0 and found["targets"] and "failed" not in " ".join(found["notes"])


def test_tune(tmp_path, monkeypatch):
    """A row is printed for each kind, and is what a call takes once it is in the table."""
    from fused_losses.kernels.triton import tiles

    kinds = ["plain", "shared", "capped-directions-8bit"]
    small = ("--hidden", 16, "--vocabulary", 140, "--tokens", 9, "--dtype", "float16")
    small += tuple(word for kind in kinds for word in ("--kind", kind))
    output = tmp_path / "tiles.json"
    done = run("-c", TUNE, "tune", *small, "--output", output, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr

    lines = [line.removeprefix("# ") for line in done.stdout.splitlines() if "Scan(" in line]
    found = [eval(line.rstrip(","), {"Scan": tiles.Scan}) for line in lines]
    assert [tile.kind for tile in found] == kinds
    assert (
        "measured on Triton's interpreter, N 9 D 16 V 140 float16" in found[0].source and "of logits" in found[0].source
    )
    assert "mean nothing" in done.stdout
    record = json.loads(output.read_text())
    assert all(tile["ms"] > 0 for kind in record for tile in kind["tiles"])
    for row, kind in zip(found, record, strict=True):
        fastest = {name: kind["tiles"][0][name] for name in tiles.Scan._fields if name != "source"}
        assert tiles.Scan(**fastest, source=row.source) == row
    monkeypatch.setattr(tiles, "SCANS", tuple(found[:2]))
    monkeypatch.setattr(tiles, "EIGHT_BIT_SCANS", tuple(found[2:]))
    assert [tiles.scan_tile(0, kind) for kind in kinds] == found


def test_tune_tells_why_it_cannot():
    import torch

    if torch.cuda.is_available():
        pytest.skip("it can")
    done = run("-c", TUNE, "tune")
    assert done.returncode != 0 and "nothing to tune here: " in done.stderr
    done = run("-c", TUNE, "tune", "--kind", "spherical", TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "plain, capped, shared, own" in done.stderr and "plain-directions-8bit" in done.stderr


def test_tune_candidates():
    """The table's own row first, nothing twice, and all fit."""
    from fused_losses.kernels import tune
    from fused_losses.kernels.triton import tiles

    for architecture, shared_memory in ((80, 163 << 10), (90, 227 << 10), (100, 227 << 10)):
        for kind in (*tiles.KINDS, *tiles.EIGHT_BIT_KINDS):
            size = 1 if kind in tiles.EIGHT_BIT_KINDS else 2
            found = tune.candidates(architecture, kind, size, shared_memory)
            assert found[0] == tiles.scan_tile(architecture, kind)
            assert 20 < len(found) < 80 and len({tile[:-1] for tile in found}) == len(found)
            assert all((t.block_n + t.block_v) * t.block_d * size * t.stages <= shared_memory for t in found)


def test_tune_of_8_bits_has_the_operands_and_directions_of_its_kind():
    import torch

    from fused_losses.kernels import tune

    for kind, expected in {
        "plain-8bit": (True, False, 1), "capped-directions-8bit": (True, True, 1), "own-directions": (False, True, 2)
    }.items():  # fmt: skip
        workload = tune.Workload(kind, 8, 16, 140, torch.float16, "cpu")
        assert (workload.eight_bit, workload.directed, workload.itemsize) == expected
        problem = workload.problem()
        assert problem.has_reference == kind.startswith("own")
        assert (problem.head.softcap is not None) == kind.startswith("capped")
        assert (workload.directions() is not None) == workload.directed


def test_tune_leaves_out_what_is_wrong_or_fails(monkeypatch):
    """Also says when chunks of logits are faster."""
    from fused_losses.kernels import tune
    from fused_losses.kernels.triton.tiles import Scan

    tile = Scan(90, "plain", 128, 128, 64, 2, 8, 3, True, "")
    workload = tune.Workload("plain", 8, 16, 140, None)
    timings = [tune.Timing(tile, 2.0, ""), tune.Timing(tile, None, "spills 40 bytes a thread")]
    outcome = tune.Outcome(workload, "a GPU", 3.0, timings, 0)
    assert outcome.line().startswith('Scan(90, "plain", 128, 128, 64, 2, 8, 3, True, "measured on a GPU')
    outcome.logits = 1.0
    assert outcome.logits_win and outcome.line().startswith("# chunks of logits are faster")
    outcome.timings = timings[1:]
    assert outcome.best is None and "no tile is usable" in outcome.line()
    assert tune._short(RuntimeError("one\ntwo")) == "RuntimeError: one"


@pytest.mark.parametrize("command", ["gpu_check.py", "gpu_bench.py"])
def test_without_a_gpu_the_commands_say_so(command, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run(f"benchmarks/{command}", "--out", tmp_path)
    assert done.returncode != 0 and "--dry" in done.stderr and not list(tmp_path.iterdir())


def test_inputs_are_like_a_language_models():
    """150 to 300 entries a token, mean nll about 2, KL of a few thousandths; a flat one has none of that."""
    import torch

    from fused_losses.kernels import measure
    from fused_losses.sparse.certificate import THRESHOLD

    found = measure.language_like(128, 64, 49152, torch.bfloat16, "cpu").figures(THRESHOLD)
    assert 130 < found["entries"] < 330 and 1.4 < found["nll"] < 2.6 and 0.001 < found["kl"] < 0.006
    assert measure.flat(16, 64, 49152, torch.bfloat16, "cpu").figures(THRESHOLD)["nll"] > 9
