"""Products that a loss can hardly be faster than: of full, int8 and fp8 numbers by PyTorch, and by this package's own
scans with nothing or everything beside the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from gpu_common import DRY
from gpu_peers import Missing
from torch import Tensor

from fused_losses.backends import gpu_int8, gpu_scan
from fused_losses.kernels.measure import Inputs, median
from fused_losses.problem import Head, Problem
from fused_losses.sparse.spectrum import directions_of

GEMM = "x Wᵀ, one product"
INT_MM, SCALED_MM = "x Wᵀ, int8, torch._int_mm", "x Wᵀ, fp8, torch._scaled_mm"
LINE = f"{'':36} {'ms':>8} {'products':>8} {'TFLOP/s':>8}"
Step = Callable[[], object]


def steps(given: Inputs) -> tuple[dict[str, Step], dict[str, dict[str, Any]]]:
    """What is to be timed, each run once; and a row for each, with a reason where there is nothing to time."""
    out = torch.empty(len(given.hidden), len(given.weight), dtype=given.weight.dtype, device=given.weight.device)
    found: dict[str, Step] = {GEMM: lambda: product(given.hidden, given.weight, out)}
    rows: dict[str, dict[str, Any]] = {GEMM: {}}
    for name, make in contestants(given).items():
        rows[name] = {}
        try:
            step = make()
            step()  # compiles
            found[name] = step
        except Exception as error:
            rows[name]["reason"] = reason_of(error)
    return found, rows


def timed(rows: dict[str, dict[str, Any]], times: dict[str, list[float]], shape: tuple[int, int, int]) -> list[dict]:
    """The rows with their times, printed."""
    n, d, v = shape
    for name, row in rows.items():
        row |= {"name": name, "shape": list(shape)}
        text = row.get("reason")
        if name in times:
            row |= {"ms": median(times[name]), "gemms": beside(times[name], times[GEMM]), "rounds": times[name]}
            row["flop_per_s"] = 2 * n * d * v / row["ms"] * 1e3
            text = f"{row['ms']:8.2f} {row['gemms']:8.2f} {row['flop_per_s'] / 1e12:8.0f}"
        print(f"{name:36} {text}", flush=True)
    return list(rows.values())


def rate_of_8_bits(rows: Iterable[dict], shape: tuple[int, int, int]) -> float | None:
    """FLOP/s of the faster product of int8 or fp8, of rows of this shape."""
    of_shape = (row for row in rows if tuple(row["shape"]) == shape and row["name"] in (INT_MM, SCALED_MM))
    return max((row["flop_per_s"] for row in of_shape if "flop_per_s" in row), default=None)


def reason_of(error: Exception) -> str:
    """Why a row has no figures. An error after which nothing would mean anything is raised again."""
    if isinstance(error, Missing):
        return str(error)
    if "CUDA error" in str(error):
        raise error
    return f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def beside(times: list[float], products: list[float]) -> float:
    """Median ratio, round by round."""
    return median([t / g for t, g in zip(times, products, strict=False)])


def product(x: Tensor, w: Tensor, out: Tensor) -> None:
    if out.dtype == x.dtype:
        torch.mm(x, w.T, out=out)
    elif x.is_cuda:
        torch.mm(x, w.T, out_dtype=out.dtype, out=out)
    else:
        out.copy_(x.float() @ w.T.float())


def contestants(given: Inputs) -> dict[str, Callable[[], Step]]:
    """{name: what makes its operands and returns the step}; that may raise `Missing`."""
    problem = Problem(given.hidden, given.labels, Head(given.weight, None, 1.0, None), None, None, given.weight.dtype)
    return {
        INT_MM: lambda: _int_mm(given),
        SCALED_MM: lambda: _scaled_mm(given),
        "scan alone": lambda: _scan(problem, False, False),
        "scan alone, 8 bits": lambda: _scan(problem, False, True),
        "scan, bits and directions": lambda: _scan(problem, True, False),
        "scan, bits and directions, 8 bits": lambda: _scan(problem, True, True),
        "x and W in 8 bits": lambda: lambda: gpu_int8.quantize(problem, True, gpu_int8.channel_of(problem)),
    }


def _int_mm(given: Inputs) -> Step:
    (n, d), v = given.hidden.shape, len(given.weight)
    if not DRY and (n <= 16 or d % 8 or v % 8):
        raise Missing(f"torch._int_mm takes more than 16 tokens and D and V that 8 divides, got {n}, {d} and {v}")
    x, w = (_integers(matrix) for matrix in (given.hidden, given.weight))
    out = torch.empty(n, v, dtype=torch.int32, device=x.device)
    return lambda: torch._int_mm(x, w.T, out=out)


def _scaled_mm(given: Inputs) -> Step:
    if not DRY and torch.cuda.get_device_capability() < (8, 9):
        raise Missing("no products of fp8 on this GPU")
    if any(size % 16 for size in (given.hidden.shape[1], len(given.weight))) and not DRY:
        raise Missing("torch._scaled_mm takes D and V that 16 divides")
    x, w = (matrix.to(torch.float8_e4m3fn) for matrix in (given.hidden, given.weight))
    one = torch.ones((), device=x.device)
    return lambda: torch._scaled_mm(x, w.T, one, one, out_dtype=torch.bfloat16)


def _integers(matrix: Tensor) -> Tensor:
    return matrix.float().mul_(127 / matrix.abs().amax().float()).round_().to(torch.int8)


def _scan(problem: Problem, whole: bool, eight_bit: bool) -> Step:
    """One sweep over all tokens; `whole`: with bits, and with directions of the head."""
    count, vocabulary, device = len(problem.labels), problem.head.vocabulary, problem.hidden.device
    found = directions_of(problem.head.weight) if whole else None
    tile = gpu_scan.choose_tile(problem, found is not None, eight_bit)
    if tile is None:
        raise Missing("takes chunks of logits")
    eight = None
    if eight_bit:
        eight = gpu_int8.quantize(problem, found is not None, gpu_int8.channel_of(problem))
    operands = gpu_scan.Operands(problem, tile, None if found is None else found.rows, eight)
    known = torch.zeros(3, count, device=device)
    bits = None
    if whole:  # a bound that few logits reach
        known[0] = 1e30
        words = -(-vocabulary // tile.block_v) * tile.block_v // 32
        rows = -(-count // tile.block_n) * tile.block_n
        bits = torch.empty(rows, words, dtype=torch.int32, device=device)
    return lambda: operands.run(slice(0, count), known, bits, vocabulary)
