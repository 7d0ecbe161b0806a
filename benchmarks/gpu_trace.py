"""Where a GPU's time goes in one forward + backward, kernels and gaps alike, by PyTorch's profiler.

    python benchmarks/gpu_trace.py [--dry] [--out FOLDER]
    python benchmarks/gpu_trace.py --read TRACE.json ...     # what those traces say, printed; needs no GPU

Inputs and shape are those of gpu_bench.py. Of each call: the time from the first kernel to the end of the last, how
much of it kernels ran, how many there were, how often the host waited for the GPU, and what each kernel took in all.
The profiler slows the host down, so that gaps are longer than without it; `host_ms` and `wall_ms` are of a call
without it.

Writes benchmarks/results/gpu-trace-<device>.json.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpu_common import DRY, RESULTS, build_kernels, facts, require_gpu, result_path, save  # first: sets the dry mode

import gpu_bench  # isort: skip
import torch
from torch.profiler import ProfilerActivity, profile

from fused_losses.kernels import measure

# (objective, head frozen, gradient)
CALLS = [
    ("cross-entropy", False, "exact"), ("TALR", False, "exact"), ("TALR", False, "sparse"), ("TALR", True, "sparse"),
    ("TALR", True, "sparse, int8"), ("LAwF", True, "exact"), ("LAwF", True, "sparse"),
]  # fmt: skip
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
MOST = 16  # kernels of a call that are kept


def summary(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of the events of a trace, times in ms."""
    events = list(events)
    kernels = sorted((e for e in events if e.get("cat") in ON_GPU), key=lambda event: event["ts"])
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        by_name[event["name"][:120]].append(event["dur"] / 1e3)
    # Of several streams what runs at the same time counts once.
    busy, end = 0.0, float("-inf")
    for event in kernels:
        stop = event["ts"] + event["dur"]
        busy += max(0.0, stop - max(end, event["ts"]))
        end = max(end, stop)
    most = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:MOST]
    return {
        "span_ms": (end - kernels[0]["ts"]) / 1e3 if kernels else 0.0,
        "busy_ms": busy / 1e3,
        "kernels": len(kernels),
        "waits": sum(e.get("cat") == "cuda_runtime" and e["name"] in WAITS for e in events),
        "by_kernel": [{"name": name, "calls": len(times), "ms": sum(times)} for name, times in most],
    }


def short(name: str) -> str:
    """Of a kernel, without what only its compiler needs."""
    name = re.sub(r"\(anonymous namespace\)::|^void |(fused_losses::cuda|at::native|at_cuda_detail)::", "", name)
    return re.split(r"[<(]", name)[0][:48]


def line_of(name: str, row: dict[str, Any]) -> str:
    first = ", ".join(f"{short(k['name'])} {k['ms']:.2f}" for k in row["by_kernel"][:5])
    return (
        f"{name}: {row['busy_ms']:.1f} of {row['span_ms']:.1f} ms kernels ran, {row['kernels']} of them, "
        f"{row['waits']} waits; {first}"
    )


def measured(given: measure.Inputs, backend: str) -> Iterable[dict[str, Any]]:
    activities = [ProfilerActivity.CPU] if DRY else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    for objective, frozen, gradient in CALLS:
        loss = gpu_bench._ours(objective, given, backend, gradient)
        step = gpu_bench._step(loss, *gpu_bench._leaves(given, False, frozen))
        for _ in range(1 if DRY else 2):
            step()
        _wait()
        start = time.perf_counter()
        step()
        host = time.perf_counter() - start
        _wait()
        wall = time.perf_counter() - start
        with profile(activities=activities) as found:
            step()
            _wait()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            found.export_chrome_trace(str(path))
            row = summary(json.loads(path.read_text())["traceEvents"])
        yield {
            "objective": objective, "frozen": frozen, "gradient": gradient, "backend": backend,
            "shape": list(gpu_bench.MAIN), "host_ms": 1e3 * host, "wall_ms": 1e3 * wall, **row,
        }  # fmt: skip
        del loss, step
        gpu_bench._tidy()


def _wait() -> None:
    if not DRY:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read", nargs="+", type=Path, metavar="TRACE", help="traces of PyTorch's profiler")
    parser.add_argument("--dry", action="store_true", help="on the CPU, in Triton's interpreter, tiny shapes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.read:
        for path in options.read:
            print(line_of(path.stem, summary(json.loads(path.read_text())["traceEvents"])))
        return
    require_gpu()
    build_kernels()
    content: dict[str, Any] = {"facts": facts(), "calls": []}
    path = result_path("gpu-trace", content["facts"]["device"], options.out)
    given = measure.DISTRIBUTIONS["language-like"](*gpu_bench.MAIN, gpu_bench.DTYPE, "cpu" if DRY else "cuda")
    from fused_losses import backends

    backend = "triton" if DRY or backends.unavailable("cuda") is not None else "cuda"
    for row in measured(given, backend):
        content["calls"].append(row)
        print(line_of(f"{row['objective']}{', frozen' if row['frozen'] else ''}, {row['gradient']}", row), flush=True)
        save(path, content)
    print(path)


if __name__ == "__main__":
    main()
