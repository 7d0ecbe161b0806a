"""How long forward and backward take beside the same without sparse gradients, and where the time goes, on a CPU."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from sparse_states import load_states, save
from torch import Tensor

import fused_losses as fl
from fused_losses.sparse import softmax
from fused_losses.sparse.spectrum import COUNT


def inputs(states: dict, d: int, dtype: torch.dtype, flat: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """2,048 tokens, all of documentation, the harder text; hidden, weight, labels, reference hidden."""
    hidden, reference, labels = (part[-2048:] for part in states["adapted"]["documentation"])
    weight = states["weight"]
    if d != hidden.shape[1]:
        basis = torch.linalg.qr(torch.randn(d, hidden.shape[1], generator=torch.Generator().manual_seed(0)))[0]
        hidden, weight, reference = hidden @ basis.T, weight @ basis.T, reference @ basis.T
    if flat:
        hidden = hidden * 0.01
    return hidden.to(dtype), weight.to(dtype), labels, reference.to(dtype)


def contestants(labels: Tensor, reference: Tensor) -> dict[str, dict[str, tuple[Callable, bool]]]:
    """{group: {name: (loss of hidden and weight, head frozen)}}"""
    rows = labels.view(8, -1)
    anchors = (torch.arange(len(labels)) % 20 == 0).float()
    options = torch.nn.LinearCrossEntropyOptions()

    def eager_talr(x, w):
        nll = F.cross_entropy((x @ w.T).float(), labels, reduction="none")
        tau = nll.detach().view(rows.shape).mean(1).quantile(0.5)
        return ((-nll.detach() / tau).exp().clamp(min=0.01) * nll).mean()

    def eager_lawf(x, w):
        with torch.no_grad():
            log_r = (reference @ w.T).float().log_softmax(1)
        log_p = (x @ w.T).float().log_softmax(1)
        kl = F.kl_div(log_p, log_r, log_target=True, reduction="none").sum(1)
        return (anchors * -log_p.gather(1, labels[:, None])[:, 0] + (1 - anchors) * kl).mean()

    def ours(loss, **kwargs):
        result = {}
        for name, options in KINDS.items():
            module = loss(**options)
            shaped = (lambda x: x.view(8, -1, x.shape[1])) if loss is fl.TALRLoss else (lambda x: x)
            y = rows if loss is fl.TALRLoss else labels
            result[f"fused_losses, {name}"] = lambda x, w, module=module, shaped=shaped, y=y: module(
                shaped(x), w, y, **kwargs
            )
        return result

    groups = {
        "cross-entropy": {
            "eager, full logits": lambda x, w: F.cross_entropy((x @ w.T).float(), labels),
            "F.linear_cross_entropy, chunked": lambda x, w: F.linear_cross_entropy(x, w, labels, options=options),
            **ours(fl.CrossEntropyLoss),
        },
        "TALR": {"eager, full logits": eager_talr, **ours(fl.TALRLoss)},
        "LAwF, frozen shared head": {
            "eager, full logits": eager_lawf,
            **ours(fl.LAwFLoss, confidence=anchors, reference=fl.Reference(reference)),
        },
    }
    result = {
        group: {name: (loss, group.startswith("LAwF")) for name, loss in members.items()}
        for group, members in groups.items()
    }
    frozen = {n: (f, True) for n, f in groups["cross-entropy"].items() if not n.startswith("F.")}
    return result | {"cross-entropy, frozen head": frozen}


# glibc gives large memory back to the system at once, and each fresh page costs a fault. With these it does not.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def speed_with_kept_memory(runs: int) -> None:
    """Cross-entropy of real text in a process that keeps its memory, so that no contestant waits for pages."""
    here = Path(__file__).parent
    command = [sys.executable, "-c", f"import sparse_speed; sparse_speed.cross_entropy_alone({runs})"]
    subprocess.run(command, env=os.environ | KEEP_MEMORY, cwd=here, check=True)


def cross_entropy_alone(runs: int) -> None:
    states = load_states()
    rows: list[dict] = []
    for dtype in (torch.float32, torch.bfloat16):
        for d in (576, 2048):
            hidden, weight, labels, reference = inputs(states, d, dtype, flat=False)
            where = {"distribution": "real text", "D": d, "dtype": str(dtype).removeprefix("torch.")}
            every = contestants(labels, reference)
            for group in FIRST:
                members = {n: m for n, m in every[group].items() if n.startswith(("eager", "fused_losses, sparse"))}
                for name, figures in measure(hidden, weight, members, runs).items():
                    rows.append(where | {"loss": group, "name": name} | figures)
                    print(speed_line(rows[-1]), flush=True)
            save(
                "sparse-speed-kept-memory-cpu", {"N": 2048, "V": len(weight), "environment": KEEP_MEMORY, "rows": rows}
            )


KINDS = {
    "sparse": {"gradient": "sparse"}, "sparse, int8": {"gradient": "sparse", "scan": "int8"},
    "exact": {"gradient": "exact"},
}  # fmt: skip
FIRST = ("cross-entropy", "cross-entropy, frozen head")  # groups measured before the others, with all rounds


def speed(runs: int) -> None:
    states = load_states()
    rows: list[dict] = []
    split: list[dict] = []
    print("| distribution | loss | D | dtype | | s | in forward GEMMs | time / ours |")
    print("|---|---|---|---|---|---|---|---|")
    for first in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            for d in (576, 2048):
                for flat in (False, True) if first else (False,):
                    hidden, weight, labels, reference = inputs(states, d, dtype, flat)
                    where = {
                        "distribution": "flat" if flat else "real text",
                        "D": d,
                        "dtype": str(dtype).removeprefix("torch."),
                    }
                    for group, members in contestants(labels, reference).items():
                        if (group in FIRST) != first:
                            continue
                        if flat:
                            members = {n: m for n, m in members.items() if n.startswith("fused_losses")}
                        for name, figures in measure(
                            hidden, weight, members, runs if first else max(1, runs // 2 + 1)
                        ).items():
                            rows.append(where | {"loss": group, "name": name} | figures)
                            print(speed_line(rows[-1]), flush=True)
                    if first and not flat:
                        for scan in ("full", "int8"):
                            split.append(where | {"scan": scan} | time_split(hidden, weight, labels, scan))
                    save("sparse-speed-cpu", {"N": 2048, "V": len(weight), "rows": rows, "split": split})


def speed_line(row: dict) -> str:
    return (
        f"| {row['distribution']} | {row['loss']} | {row['D']} | {row['dtype']} | {row['name']} | "
        f"{row['seconds']:.2f} | {row['gemms']:.2f} | {row['speed_of_ours']:.2f} |"
    )


def measure(hidden: Tensor, weight: Tensor, members: dict, runs: int) -> dict[str, dict]:
    """Each round runs the forward product alone, then every contestant once; the round before is for warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in members}
    gemm = []
    for round_number in range(runs + 1):
        start = time.perf_counter()
        hidden @ weight.T
        taken = {"": time.perf_counter() - start}
        for name, (loss, frozen) in members.items():
            if round_number == 0 and runs > 1 and not name.startswith("fused_losses"):
                continue
            x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
            start = time.perf_counter()
            value = loss(x, w)
            value.backward()
            taken[name] = time.perf_counter() - start
            del x, w, value
        if round_number:  # the first warms up
            gemm.append(taken.pop(""))
            for name, t in taken.items():
                seconds[name].append(t)
    ours = seconds["fused_losses, sparse"]
    return {
        name: {
            "seconds": statistics.median(times),
            "gemms": statistics.median(t / g for t, g in zip(times, gemm, strict=True)),
            "speed_of_ours": statistics.median(t / o for t, o in zip(times, ours, strict=True)),
            "rounds": times,
        }
        for name, times in seconds.items()
    }


PARTS = {
    **dict.fromkeys(("logits", "int8_logits", "half_logits", "int8_head"), "logits (GEMM)"),
    **dict.fromkeys(("compact", "compact_half", "label_logits", "pack"), "row statistics, compaction"),
    **dict.fromkeys(("tail_profile", "half_tail_profile", "weighted_sum"), "tail profile"),
    "rows_product": "dx = S'W + m'(qᵀW)",
    "columns_product": "dW = S'ᵀx + q(m'ᵀx)",
}  # fmt: skip


def time_split(hidden: Tensor, weight: Tensor, labels: Tensor, scan: str) -> dict:
    """Where one call of cross-entropy spends its time, with compiled kernels."""
    from torch.profiler import profile

    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = fl.CrossEntropyLoss(gradient="sparse", scan=scan)
    loss(x, w, labels).backward()
    x.grad = w.grad = None
    start = time.perf_counter()
    hidden @ weight.T
    gemm = time.perf_counter() - start
    with profile() as record:
        start = time.perf_counter()
        loss(x, w, labels).backward()
        total = time.perf_counter() - start
    parts = dict.fromkeys(PARTS.values(), 0.0)
    for event in record.key_averages():
        name = event.key.removeprefix("fused_losses::")
        if event.key.startswith("fused_losses::") and name in PARTS:
            parts[PARTS[name]] += event.self_cpu_time_total / 1e6
    parts["everything else"] = total - sum(parts.values())
    return {"seconds": total, "gemm_seconds": gemm, "parts": parts}


def directions_cost(runs: int) -> None:
    """One call with the directions of the head and without, in turn; a trained head is another tensor in each call, as
    after a step of its optimizer."""
    states = load_states()
    rows = []
    print("| loss | D | dtype | without, s | with, s | with / without, median | of all rounds |")
    print("|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for d in (576, 2048):
            hidden, weight, labels, reference = inputs(states, d, dtype, flat=False)
            for group, members in contestants(labels, reference).items():
                loss, frozen = members["fused_losses, sparse"]
                times: dict[int, list[float]] = {0: [], COUNT: []}
                for _ in range(runs + 1):
                    for count, seconds in times.items():
                        x, w = hidden.clone().requires_grad_(), weight if frozen else weight.clone().requires_grad_()
                        found = softmax.directions_of if count else lambda *_: None
                        with mock.patch.object(softmax, "directions_of", found):
                            start = time.perf_counter()
                            loss(x, w).backward()
                            seconds.append(time.perf_counter() - start)
                without, with_them = (seconds[1:] for seconds in times.values())  # the first warms up
                ratios = [b / a for a, b in zip(without, with_them, strict=True)]
                row = {"loss": group, "D": d, "dtype": str(dtype).removeprefix("torch.")}
                rows.append(row | {"without": without, "with": with_them, "ratios": ratios})
                print(
                    f"| {group} | {d} | {row['dtype']} | {statistics.median(without):.3f} | "
                    f"{statistics.median(with_them):.3f} | {statistics.median(ratios):.3f} | "
                    f"{min(ratios):.2f} to {max(ratios):.2f} |",
                    flush=True,
                )
            save("sparse-directions-cpu", {"N": len(labels), "V": len(weight), "rows": rows})
