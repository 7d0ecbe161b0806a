"""Which tile of the scan is fastest on this GPU, and whether chunks of logits from cuBLAS are faster still:
`fused-losses tune`.

What is timed is the whole forward sweep of sparse gradients, the label logits and the probe included; for kinds of 8
bits also the operands' quantisation and the exact sums of what is kept; for the logits the products into float32, row
statistics and bits. Tiles that do not compile, spill registers, or give other losses are left out, with a note.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import backends
from ..backends import gpu, gpu_int8, gpu_scan
from ..problem import Head, Problem
from ..sparse.certificate import THRESHOLD
from . import measure
from .triton import tiles
from .triton.tiles import Scan

ROUNDS = 20
# The most that a tile's losses may differ from those of the logits, relative.
AGREEMENT = 1e-3
# Shared memory of a block, where the device does not say: that of sm_80.
SHARED_MEMORY = 163 << 10


@dataclass(frozen=True)
class Workload:
    """One kind of call, of a shape; inputs are those of `measure.language_like`."""

    kind: str
    tokens: int
    width: int
    vocabulary: int
    dtype: torch.dtype
    device: str = "cuda"

    @property
    def base(self) -> str:
        """The kind without 8 bits and directions."""
        return self.kind.removesuffix(tiles.EIGHT_BIT).removesuffix(tiles.DIRECTED)

    @property
    def directed(self) -> bool:
        return self.kind.removesuffix(tiles.EIGHT_BIT) != self.base

    @property
    def eight_bit(self) -> bool:
        return self.kind.endswith(tiles.EIGHT_BIT)

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the operands."""
        return 1 if self.eight_bit else self.dtype.itemsize

    def directions(self) -> Tensor | None:
        """Some, [V, 16], of which only the size matters here; None of a kind without."""
        if not self.directed:
            return None
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.vocabulary, 16, generator=generator).to(self.device)

    def problem(self) -> Problem:
        given = measure.language_like(self.tokens, self.width, self.vocabulary, self.dtype, self.device)
        reference = given.reference_hidden if self.base in ("shared", "own") else None
        own = Head(given.weight.clone(), None, 1.0, None) if self.base == "own" else None
        softcap = 30.0 if self.base == "capped" else None
        head = Head(given.weight, None, 1.0, softcap)
        return Problem(given.hidden, given.labels, head, reference, own, self.dtype)

    def eight(self, problem: Problem, tile: Scan) -> gpu_int8.Eight | None:
        """The operands of 8 bits, made anew as in each call; None of another kind."""
        if not self.eight_bit:
            return None
        return gpu_int8.quantize(problem, self.directed, gpu_int8.channel_of(problem))._replace(tile=tile)

    def __str__(self) -> str:
        return f"N {self.tokens} D {self.width} V {self.vocabulary} {str(self.dtype).removeprefix('torch.')}"


@dataclass
class Timing:
    tile: Scan
    milliseconds: float | None  # None: not usable
    note: str


@dataclass
class Outcome:
    """Of one kind; `timings` fastest first, the unusable ones last."""

    workload: Workload
    device: str
    logits: float  # milliseconds of the sweep over chunks of logits
    timings: list[Timing]
    untried: int  # for want of time

    @property
    def best(self) -> Scan | None:
        """The row for `tiles.SCANS` or `tiles.EIGHT_BIT_SCANS`, its source in it."""
        if not self.timings or self.timings[0].milliseconds is None:
            return None
        first = self.timings[0]
        times = f"{first.milliseconds:.2f} ms against {self.logits:.2f} ms of logits"
        source = f"measured on {self.device}, {self.workload}, {times}"
        return first.tile._replace(source=source)

    @property
    def logits_win(self) -> bool:
        best = self.best
        return best is None or self.logits < (self.timings[0].milliseconds or 0.0)

    def line(self) -> str:
        """A line of Python for the table in `tiles`."""
        if self.best is None:
            return f"# {self.workload.kind}: no tile is usable; logits take {self.logits:.2f} ms"
        *numbers, source = self.best
        text = ", ".join(f'"{n}"' if isinstance(n, str) else str(n) for n in numbers)
        line = f'Scan({text}, "{source}"),'
        return f"# chunks of logits are faster:\n# {line}" if self.logits_win else line


def unavailable(width: int, dtype: torch.dtype) -> str | None:
    """Why there is nothing to time; None where there is."""
    reason = backends.unavailable("triton")
    if reason is None and not backends.interpreted():
        if dtype not in (torch.bfloat16, torch.float16):
            reason = f"the scan takes bfloat16 and float16, got {dtype}; float32 always goes by chunks of logits"
        elif width % 8:
            reason = f"the scan takes hidden sizes that are multiples of 8, got {width}; others go by chunks of logits"
    return reason


def candidates(architecture: int, kind: str, itemsize: int, shared_memory: int = SHARED_MEMORY) -> list[Scan]:
    """Tiles that may fit, the table's own first, then the larger ones: those need less of the L2 cache. Of each block
    of tokens and ids, warps and slices, the one with 128 bytes of a row at a time and the most stages."""
    if backends.interpreted():
        some = gpu_scan.INTERPRETED_TILE
        return [some._replace(kind=kind), some._replace(kind=kind, block_v=32, slices=1)]
    own = tiles.scan_tile(architecture, kind)
    accumulators = 2 if kind.startswith(("shared", "own")) else 1
    registers = 256 if architecture == 100 else 128  # sums of a thread; on Blackwell they are in memory of their own
    found: dict[tuple[int, ...], list[Scan]] = {}
    for n, v, d, slices, warps, stages in itertools.product(
        (64, 128, 256), (64, 128, 256), (32, 64, 128, 256), (1, 2, 4), (4, 8, 16), (2, 3, 4, 5)
    ):
        sums = n * v * accumulators / (32 * warps)
        # With 16 warps a thread has half the registers.
        fits = 32 <= sums <= registers * 8 / max(8, warps) and (n + v) * d * itemsize * stages <= shared_memory
        # A slice is whole words of bits, and small enough beside the sums.
        if fits and v // slices >= 32 and sums / slices <= 64 and d * itemsize <= 256:
            tile = Scan(architecture, kind, n, v, d, slices, warps, stages, architecture >= 90, "")
            found.setdefault((n, v, warps, slices), []).append(tile)

    def rank(tile: Scan) -> tuple[float, ...]:
        return abs(tile.block_d * itemsize - 128), -tile.stages

    by_traffic = sorted(found, key=lambda block: (1 / block[0] + 1 / block[1], block))
    chosen = [min(found[block], key=rank) for block in by_traffic]
    return [own, *(tile for tile in chosen if tile[:-1] != own[:-1])]


def run(
    workload: Workload, seconds: float = 120.0, jobs: int | None = None, tell: Callable[[str], None] = lambda text: None
) -> Outcome:
    """Time the candidates of a kind for about so many seconds. `jobs` processes compile ahead; 0: none."""
    on_gpu = workload.device != "cpu"
    name, architecture, shared_memory = "Triton's interpreter", 0, SHARED_MEMORY
    if on_gpu:
        found = torch.cuda.get_device_properties(workload.device)
        name, architecture = found.name, tiles.architecture((found.major, found.minor))
        shared_memory = getattr(found, "shared_memory_per_block_optin", SHARED_MEMORY)
    every = candidates(architecture, workload.kind, workload.itemsize, shared_memory)
    if jobs is None:
        jobs = min(6, max(1, (os.cpu_count() or 1) - 1))
    problem, clock = workload.problem(), measure.Clock(workload.device)
    backend: gpu.Gpu = backends.load("triton")  # type: ignore[assignment]
    directions = workload.directions()
    truth, logits = _logits(backend, problem, directions, clock, ROUNDS if on_gpu else 1)
    tell(f"{workload.kind}, {workload}: logits {logits:.2f} ms, {len(every)} tiles to try")
    stop = time.monotonic() + seconds
    # All are compiled before any is timed, as the processes that do it try them on the same device.
    notes = _compiled(workload, every, jobs if on_gpu else 0, stop - 0.4 * seconds)
    timings: list[Timing] = []
    for tile, note in zip(every, notes, strict=False):
        timing = Timing(tile, None, note)
        if not note:
            timing = _time(backend, workload, problem, directions, tile, truth, clock, ROUNDS if on_gpu else 1)
        timings.append(timing)
        took = f"{timing.milliseconds:.2f} ms" if timing.milliseconds is not None else timing.note
        tell(f"  {shape_of(tile)}: {took}")
        if "CUDA error" in timing.note or time.monotonic() > stop:
            break  # after such an error this process can do no more
    timings.sort(key=lambda t: float("inf") if t.milliseconds is None else t.milliseconds)
    return Outcome(workload, name, logits, timings, len(every) - len(timings))


def shape_of(tile: Scan) -> str:
    by = "descriptors" if tile.descriptors else "pointers"
    shape = f"{tile.block_n} × {tile.block_v} × {tile.block_d}"
    return f"{shape}, {tile.slices} slices, {tile.warps} warps, {tile.stages} stages, {by}"


def _compiled(workload: Workload, every: list[Scan], jobs: int, stop: float) -> list[str]:
    """Why each tile cannot be used, or nothing; the first ones only, if the time is over before the last. Compiled in
    `jobs` other processes: Triton's cache has them then."""
    if not jobs:
        return [_compile(workload, tile) for tile in every]
    # A few tokens compile the same kernel: what counts is whether numbers divide by 16.
    few = replace(workload, tokens=min(workload.tokens, 2048))
    notes: list[str] = []
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        for future in [pool.submit(_compile, few, tile) for tile in every]:
            try:
                notes.append(future.result(timeout=max(1.0, stop - time.monotonic())))
            except OutOfTime:
                break
            except Exception as error:  # a process that died
                notes.append(_short(error))
    finally:
        pool.shutdown(cancel_futures=True)
    return notes


def _compile(workload: Workload, tile: Scan) -> str:
    """Run a tile once; why it cannot be used, or nothing."""
    try:
        problem = _problem_here(workload)
        operands = gpu_scan.Operands(problem, tile, workload.directions(), workload.eight(problem, tile))
        # As the sweep does: the probe without bits, then a chunk with them.
        known = gpu_scan.bounds(operands, operands.label_logits(backends.load("triton").kernels), THRESHOLD)  # type: ignore[attr-defined]
        tokens = slice(0, len(problem.labels))
        rows = -(-tokens.stop // tile.block_n) * tile.block_n
        words = -(-workload.vocabulary // tile.block_v) * tile.block_v // 32
        bits = torch.empty(rows, words, dtype=torch.int32, device=problem.hidden.device)
        operands.run(tokens, known, bits, workload.vocabulary)
        spills = getattr(operands.compiled, "n_spills", 0) or 0
        if bits.is_cuda:
            torch.cuda.synchronize()
        return f"spills {spills} bytes a thread" if spills else ""
    except Exception as error:  # whatever a compiler may raise
        return _short(error)


_problems: dict[Workload, Problem] = {}


def _problem_here(workload: Workload) -> Problem:
    """Made once in each process."""
    if workload not in _problems:
        _problems.clear()
        _problems[workload] = workload.problem()
    return _problems[workload]


def _logits(
    backend: gpu.Gpu, problem: Problem, directions: Tensor | None, clock: measure.Clock, rounds: int
) -> tuple[Tensor, float]:
    out = backend.empty_statistics(problem)

    def sweep() -> None:
        for _ in backend._bits_of_logits(problem, out, THRESHOLD, directions):
            pass

    taken = measure.median(clock.rounds({"": sweep}, rounds)[""])
    return out.nll.clone(), taken


def _time(
    backend: gpu.Gpu, workload: Workload, problem: Problem, directions: Tensor | None, tile: Scan, truth: Tensor,
    clock: measure.Clock, rounds: int,
) -> Timing:  # fmt: skip
    out = backend.empty_statistics(problem)

    def sweep() -> None:
        eight = workload.eight(problem, tile)
        for _ in backend._bits_of_scan(problem, out, THRESHOLD, tile, directions, eight):
            pass

    try:
        sweep()
        error = ((out.nll - truth).norm() / truth.norm()).item()
        if not error <= AGREEMENT:
            return Timing(tile, None, f"wrong: its losses are {error:.2g} from those of the logits")
        first = clock.once(sweep)
        few = 3 if first > 100 else rounds
        return Timing(tile, measure.median(clock.rounds({"": sweep}, few)[""]), "")
    except Exception as error:
        return Timing(tile, None, _short(error))


def _short(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:160]}"


def as_dict(outcome: Outcome) -> dict:
    """For JSON."""
    return {
        "kind": outcome.workload.kind, "workload": str(outcome.workload), "device": outcome.device,
        "logits_ms": outcome.logits, "untried": outcome.untried, "line": outcome.line(),
        "tiles": [{**t.tile._asdict(), "ms": t.milliseconds, "note": t.note} for t in outcome.timings],
    }  # fmt: skip
