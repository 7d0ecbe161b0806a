"""Whether the kernels are right on this GPU: `make gpu-check`.

The checks are tests/gpu; this runs them and keeps the results.

    python benchmarks/gpu_check.py [--dry] [--jobs 4] [--only NAME ...] [--out FOLDER]

Each group of checks is a process of its own, so that neither a failure nor a crash ends the run. Several run at a time,
as most of the time goes into compiling. Writes benchmarks/results/gpu-check-<device>.json after each group: for every
check its name, seconds, whether it passed, and of its outputs the one nearest its bound, with error and bound.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from gpu_common import DRY, RESULTS, ROOT, build_kernels, facts, require_gpu, result_path, save

KERNELS, LOSSES, DIRECTIONS, INT8 = (
    f"tests/gpu/test_gpu_{name}.py" for name in ("kernels", "losses", "directions", "int8")
)
# Groups by what they compile, so that no two compile the same. Name: (files, -k).
GROUPS = {
    "rows of logits": (KERNELS, "statistics or logit_bits or directions or tail_profile"),
    "bits, products of entries": (KERNELS, "bits_to_columns or entry_logits or products"),
    "attention": (KERNELS, "attention"),
    "scan, float16": (KERNELS, "test_scan and not bfloat16"),
    "scan, bfloat16": (KERNELS, "test_scan and bfloat16"),
    "losses, float32": (LOSSES, "against_the_oracle and float32"),
    "losses, float16": (LOSSES, "against_the_oracle and float16 and not bfloat16"),
    "losses, bfloat16": (LOSSES, "against_the_oracle and bfloat16"),
    "objectives": (LOSSES, "objectives"),
    "near the reference, certificate": (LOSSES, "near_the_reference or certificate"),
    "same results, large sizes": (LOSSES, "same_results or more_logits"),
    "left out, float32 and float16": (DIRECTIONS, "left_out and not bfloat16"),
    "left out, bfloat16": (DIRECTIONS, "left_out and bfloat16"),
    "directions, float32": (DIRECTIONS, "not left_out and float32"),
    "directions, float16": (DIRECTIONS, "not left_out and float16 and not bfloat16"),
    "directions, bfloat16": (DIRECTIONS, "not left_out and bfloat16"),
    "8 bits, kernels": (INT8, "quantize or row_that or scan_of or kept_sums"),
    "8 bits, float16": (INT8, "(losses or lora or values) and float16 and not bfloat16"),
    "8 bits, bfloat16": (INT8, "(losses or lora or values) and bfloat16"),
    "8 bits, full products, same results": (INT8, "full_products or same_results or token_of"),
    "surroundings": (LOSSES, "aligned or another_device or compiled or asked_for or bad_logits"),
}
# A few small cases of every kernel; the sanitizer makes them a hundred times as slow.
SANITIZED = (
    f"{KERNELS} {DIRECTIONS} {INT8}",
    "(N40 or N37-D17 or 7-33) and not float32 and not bfloat16 and (not left_out or plain)",
)
SANITIZERS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
if DRY:  # all in two processes, which take longer to start than to run
    GROUPS = {"kernels": (KERNELS, "test"), "losses": (f"{LOSSES} {DIRECTIONS} {INT8}", "test")}
    SANITIZED = (KERNELS, "7-33")


def run_group(where: tuple[str, str], log: Path, prefix: list[str], seconds: float) -> tuple[list[dict], str]:
    """The checks' results, and why there are not more of them, if so."""
    files, which = where
    # Warnings of a GPU's libraries are no failures here.
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "--tb=short", "-W", "default", "-p", "no:cacheprovider"]
    environment = {
        **os.environ,
        "FUSED_LOSSES_GPU_LOG": str(log),
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    if prefix:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else what lies beyond a tensor is another one
    trouble, output = "", ""
    try:
        done = subprocess.run(
            [*command, *files.split(), "-k", which], cwd=ROOT, env=environment, timeout=seconds, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        output = done.stdout
        lines = log.read_text().splitlines() if log.is_file() else []
        failed = any(json.loads(line)["outcome"] == "failed" for line in lines)
        if done.returncode not in (0, 1) or not lines or (done.returncode == 1 and not failed):
            trouble = f"exit status {done.returncode}: " + " | ".join(output.strip().splitlines()[-3:])
    except subprocess.TimeoutExpired as error:
        trouble = f"stopped after {seconds:.0f} s"
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
    log.with_suffix(".txt").write_text(output)
    lines = log.read_text().splitlines() if log.is_file() else []
    return [json.loads(line) for line in lines], trouble


def sanitize(tool: str, log: Path, seconds: float) -> dict:
    """The summary line of a tool of compute-sanitizer over small cases of all kernels."""
    found = shutil.which("compute-sanitizer")
    if found is None:
        return {"outcome": "skipped", "reason": "no compute-sanitizer on PATH"}
    prefix = [found, "--tool", tool, "--error-exitcode", "99", *SANITIZERS[tool]]
    checks, trouble = run_group(SANITIZED, log, prefix, seconds)
    summary = summary_of(log.with_suffix(".txt").read_text())
    failed = [check["test"] for check in checks if check["outcome"] == "failed"]
    clean = summary is not None and re.search(r"SUMMARY: 0 (errors|hazards)", summary) is not None
    ran = sum(check["outcome"] == "passed" for check in checks)
    return {
        "outcome": "passed" if clean and not failed and ran else "failed", "summary": summary, "checks": ran,
        "failed": failed, "reason": trouble,
    }  # fmt: skip


def summary_of(output: str) -> str | None:
    lines = [line.lstrip("= ") for line in output.splitlines() if re.match(r"=+ .*SUMMARY:", line)]
    return lines[-1] if lines else None


def line_of(name: str, group: dict) -> str:
    counts = {o: sum(c["outcome"] == o for c in group["checks"]) for o in ("passed", "failed", "skipped")}
    figures = [c for c in group["checks"] if c.get("bound")]
    worst = max(figures, key=lambda c: c["ratio"], default=None)
    nearest = "" if worst is None else f"{worst['output']} {worst['error']:.2g} of {worst['bound']:.2g}"
    text = (
        f"{name:34} {counts['passed']:6} {counts['failed']:6} {counts['skipped']:7} {group['seconds']:6.0f}  {nearest}"
    )
    return text + (f"  ! {group['trouble']}" if group["trouble"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the CPU, in Triton's interpreter, tiny shapes")
    parser.add_argument("--jobs", type=int, default=4, help="groups at a time")
    parser.add_argument("--only", nargs="*", default=[], help="groups or tools whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=420, help="the most that a group may take")
    parser.add_argument("--sanitizer-seconds", type=float, default=150, help="the most that a sanitizer may take")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    require_gpu()
    build_kernels()
    wanted = [n for n in [*GROUPS, *SANITIZERS] if not options.only or any(o in n for o in options.only)]
    if not wanted:
        parser.error(f"--only: there are {', '.join([*GROUPS, *SANITIZERS])}")

    content: dict = {"facts": facts(), "groups": {}, "sanitizers": {}}
    path = result_path("gpu-check", content["facts"]["device"], options.out)
    logs = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    started = time.monotonic()
    print(
        f"{content['facts']['device']}, {', '.join(f'{k} {v}' for k, v in content['facts'].items() if k != 'device')}"
    )
    print(f"\n{'checks':34} {'passed':>6} {'failed':>6} {'skipped':>7} {'s':>6}  nearest its bound", flush=True)

    def group(name: str) -> tuple[str, dict]:
        begin = time.monotonic()
        checks, trouble = run_group(GROUPS[name], logs / f"{name}.jsonl".replace(" ", "-"), [], options.seconds)
        return name, {"seconds": time.monotonic() - begin, "trouble": trouble, "checks": checks}

    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        for future in as_completed([pool.submit(group, name) for name in GROUPS if name in wanted]):
            name, result = future.result()
            content["groups"][name] = result
            print(line_of(name, result), flush=True)
            save(path, content)
    for tool in SANITIZERS:
        if tool in wanted:
            result = sanitize(tool, logs / f"{tool}.jsonl", options.sanitizer_seconds)
            content["sanitizers"][tool] = result
            print(f"{tool:34} {result['outcome']}: {result.get('summary') or result['reason']}", flush=True)
            save(path, content)

    failures = [
        (c["test"], c["reason"]) for g in content["groups"].values() for c in g["checks"] if c["outcome"] == "failed"
    ]
    reasons = {
        c["reason"].removeprefix("Skipped: ")
        for g in content["groups"].values()
        for c in g["checks"]
        if c["outcome"] == "skipped"
    }
    for reason in sorted(reasons):
        print(f"skipped: {reason}")
    for test, reason in failures[:20]:
        print(f"FAILED {test}\n    {reason.splitlines()[0] if reason else ''}")
    if len(failures) > 20:
        print(f"and {len(failures) - 20} more")
    broken = [n for n, g in content["groups"].items() if g["trouble"]]
    broken += [n for n, s in content["sanitizers"].items() if s["outcome"] == "failed"]
    print(f"{time.monotonic() - started:.0f} s; {path}; output of each group: {logs}")
    sys.exit(1 if failures or broken else 0)


if __name__ == "__main__":
    main()
