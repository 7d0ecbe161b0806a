"""What docs/benchmarks.md says of the runs on a GPU: python benchmarks/gpu_pages.py

From benchmarks/results/gpu-*-<device>.json alone: tables between the marks, of every device that gpu-bench has run on;
the checks, calls by themselves (gpu-peers) and traces of the same device beside them.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from marks import filled

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = "docs/benchmarks.md"
BEGIN, END = "<!-- gpu: written by benchmarks/gpu_pages.py -->", "<!-- end of gpu -->"
GEMM = "x Wᵀ, one product"


def page(folder: Path = RESULTS) -> str:
    parts = [device(folder, path) for path in sorted(folder.glob("gpu-bench-*.json"))]
    return "\n\n".join(parts) if parts else "No run on a GPU is kept."


def device(folder: Path, path: Path) -> str:
    found, name = json.loads(path.read_text()), path.stem.removeprefix("gpu-bench-")

    def beside(kind: str) -> dict[str, Any] | None:
        other = folder / f"gpu-{kind}-{name}.json"
        return json.loads(other.read_text()) if other.is_file() else None

    facts, ceilings = found["facts"], found["ceilings"]
    text = [
        f"**{facts['device']}**, driver {facts['driver']}, torch {facts['torch']}, Triton {facts['triton']}, CUDA "
        f"{facts['cuda']}, commit {facts['commit']}, {facts['date'][:10]}. Copies, read and written: "
        f"{ceilings['memory_bytes_per_s'] / 1e12:.1f} TB/s. Raw: `benchmarks/results/{path.name}` and those beside it."
    ]
    if (check := beside("check")) is not None:
        text.append(checks(check))
    for shape in dict.fromkeys(tuple(row["shape"]) for row in found["losses"]):
        text.append(losses(found, shape, beside("peers")))
    if (trace := beside("trace")) is not None:
        text.append(traces(trace))
    text.append(kernels(found))
    return "\n\n".join(text)


def checks(found: dict[str, Any]) -> str:
    every = [check for group in found["groups"].values() for check in group["checks"]]
    counts = Counter(check["outcome"] for check in every)
    failed = Counter(check["test"].split("::")[1].split("[")[0] for check in every if check["outcome"] == "failed")
    text = f"Checks: {counts['passed']:,} passed, {counts['failed']} failed, {counts['skipped']} skipped"
    if found["facts"].get("commit"):
        text += f" (commit {found['facts']['commit']})"
    if failed:
        text += "; of " + ", ".join(f"`{name}` {count}" for name, count in failed.most_common())
    return text + "."


def losses(found: dict[str, Any], shape: tuple[int, ...], peers: dict[str, Any] | None) -> str:
    lines = [
        f"N, D, V = {', '.join(f'{n:,}' for n in shape)}, {found['dtype'].removeprefix('torch.')}, medians of up to "
        f'{found["rounds"]} interleaved rounds; "products": times the forward\'s one product in the same round.',
        "",
        "| loss | contestant | ms | products | MiB beside inputs and gradients | error of dx, % | of dW, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["losses"]:
        if tuple(row["shape"]) != shape or row["name"] == GEMM or "ms" not in row:
            continue
        head = "" if row["objective"] == "forward" else ", frozen head" if row["frozen"] else ""
        flat = ", flat" if row["distribution"] == "flat" else ""
        lines.append(
            f"| {row['objective']}{head}{flat} | {row['name']} | {row['ms']:.1f} | {row['gemms']:.2f} | "
            f"{row['extra_mib']:,.0f} | {percent(row.get('d_hidden_error'))} | {percent(row.get('d_weight_error'))} |"
        )
    if peers is not None and tuple(peers["shape"]) == shape:
        which = ", ".join(f"{row['objective']}, {row['name']} {row['ms']:.1f} ms" for row in peers["ms"])
        versions = ", ".join(f"{k} {peers['facts'][k]}" for k in ("liger-kernel", "cut-cross-entropy"))
        lines += ["", f"In a call of their own ({peers['statistic']}; {versions}), trained head: {which}."]
    return "\n".join(lines)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def traces(found: dict[str, Any]) -> str:
    from gpu_trace import short

    lines = [
        "Where the time goes (`python benchmarks/gpu_trace.py`): the call's time, and from the profiler how long "
        "kernels ran, how many there are, and how often the host waits for the GPU.",
        "",
        "| loss | gradients, backend | ms of the call | kernels ran, ms | kernels | waits | longest, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["calls"]:
        longest = ", ".join(f"`{short(k['name'])}` {k['ms']:.1f}" for k in row["by_kernel"][:3])
        lines.append(
            f"| {row['objective']}{', frozen head' if row['frozen'] else ''} | {row['gradient']}, {row['backend']} | "
            f"{row['wall_ms']:.1f} | {row['busy_ms']:.1f} | {row['kernels']} | {row['waits']} | {longest} |"
        )
    return "\n".join(lines)


def kernels(found: dict[str, Any]) -> str:
    lines = ["| kernel | backend | ms | floor, ms | times its floor |", "|---|---|---|---|---|"]
    for row in found["kernels"]:
        floor = row["floor_ms"]
        if floor and floor >= 0.001:  # below that it is the launch that is timed
            lines.append(
                f"| {row['name']} | {row['backend']} | {row['ms']:.3f} | {floor:.3f} | {row['ms'] / floor:.1f} |"
            )
    return "Single kernels, with the arguments that a call gives them, a cold L2 cache:\n\n" + "\n".join(lines)


def main() -> None:
    path = ROOT / PAGE
    path.write_text(filled(path.read_text(), page(), PAGE, BEGIN, END))


if __name__ == "__main__":
    main()
