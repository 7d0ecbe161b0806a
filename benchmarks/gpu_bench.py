"""How fast and how exact the losses are on this GPU, beside others: `make gpu-bench`.

    python benchmarks/gpu_bench.py [--quick] [--dry] [--sections ceilings floors losses split kernels] [--out FOLDER]

First the ceilings: memory and cache bandwidth by copies, matrix products of the losses' shapes on random data. Then the
floors: one product of full, int8 and fp8 numbers by PyTorch, and by the scans with nothing or everything beside it.
Then forward + backward of the losses in interleaved rounds, with peak memory, the gradient report and errors against
float64; where the time of sparse gradients goes; and each kernel, with the arguments that a call gives it, against its
floor: the larger of FLOP / measured product rate and bytes / measured bandwidth.

Inputs are `measure.language_like`: logits like a fine-tuned language model's, whose entries per token and mean nll are
measured and kept; and `measure.flat`, random initialisation.

Writes benchmarks/results/gpu-bench-<device>.json after every part, so that a run that is stopped keeps what it has.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_common import (  # first: sets the dry mode
    DEVICE,
    DRY,
    RESULTS,
    build_kernels,
    facts,
    require_gpu,
    result_path,
    save,
)

import gpu_calls  # isort: skip
import gpu_floors  # isort: skip
import gpu_peers  # isort: skip
import torch
from gpu_floors import GEMM, beside, product, reason_of
from gpu_peers import EIGHT_BIT, OURS, Truth, relative
from torch import Tensor

from fused_losses import backends
from fused_losses.kernels import measure
from fused_losses.kernels.measure import Clock, median
from fused_losses.sparse.certificate import THRESHOLD

DTYPE = torch.float16 if DRY else torch.bfloat16
Shape = tuple[int, int, int]
MAIN: Shape = (8, 16, 70) if DRY else (8192, 4096, 128256)
OTHERS: list[Shape] = [] if DRY else [(8192, 576, 49152), (8192, 2048, 151936), (2048, 4096, 128256)]
SECTIONS = ("ceilings", "floors", "losses", "split", "kernels")
# (objective, head frozen)
EVERYTHING = [
    ("TALR", False), ("TALR", True), ("cross-entropy", False), ("cross-entropy", True), ("LAwF", True), ("LAwF", False),
    ("KL", True), ("forward", True),
]  # fmt: skip
if DRY:
    EVERYTHING = [("TALR", False), ("TALR", True), ("KL", True), ("forward", True)]
SOME = [("cross-entropy", False), ("TALR", False), ("LAwF", True)]
# Kernels that do more with a reference.
KERNELS_OF_LAWF = ("attention", "row_statistics", "directions", "logit_bits")
# Of (objective, frozen, contestant) at MAIN: what takes at most so many times the one product, or at most so many MiB.
TARGETS = [
    ("TALR", False, "sparse", "gemms", 1.5), ("TALR", True, "sparse", "gemms", 1.25),
    ("TALR", False, f"sparse{EIGHT_BIT}", "gemms", 1.0), ("TALR", True, f"sparse{EIGHT_BIT}", "gemms", 0.75),
    ("TALR", False, f"sparse{EIGHT_BIT}", "nll_error", 0.004),
    ("TALR", False, f"sparse{EIGHT_BIT}", "d_hidden_error", 0.008),
    ("LAwF", True, "sparse", "gemms", 2.5),
    # Exact: within 10 % of its products; 3 of cross-entropy, 2 with a frozen head.
    ("cross-entropy", False, "exact", "gemms", 3.3), ("cross-entropy", True, "exact", "gemms", 2.2),
    ("TALR", False, "sparse", "extra_mib", 64), ("LAwF", True, "sparse", "extra_mib", 64),
    ("cross-entropy", False, "exact", "extra_mib", 256), ("cross-entropy", True, "exact", "extra_mib", 256),
]  # fmt: skip
UNITS = {
    "gemms": "× the one product", "extra_mib": "MiB beside inputs and gradients", "nll_error": "nats a token",
    "d_hidden_error": "of dx",
}  # fmt: skip
SLOW = 300.0  # ms of a contestant from which on a few rounds will do


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.started = options, time.monotonic()
        self.rounds = 1 if DRY else 7 if options.quick else 20
        self.clock = Clock(DEVICE)
        self.content: dict[str, Any] = {
            "facts": facts(), "rounds": self.rounds, "dtype": str(DTYPE), "inputs": [], "floors": [], "losses": [],
            "splits": [], "kernels": [], "notes": [],
        }  # fmt: skip
        self.path = result_path("gpu-bench", self.content["facts"]["device"], options.out)

    def save(self) -> None:
        self.content["seconds"] = time.monotonic() - self.started
        save(self.path, self.content)

    def late(self, what: str) -> bool:
        """Whether the time is over; notes what is left out."""
        over = time.monotonic() - self.started > self.options.seconds
        if over:
            self.note(f"no time left for {what}")
        return over

    def note(self, text: str) -> None:
        print(text, flush=True)
        self.content["notes"].append(text)

    # --- ceilings

    def ceilings(self) -> None:
        def typical(function: Callable[[], object]) -> float:
            return median(self.clock.rounds({"": function}, self.rounds, warm=3)[""])

        size = 1 << 16 if DRY else 4 << 30
        one, other = (torch.empty(size // 2, dtype=torch.int8, device=DEVICE).random_() for _ in range(2))
        memory = size / typical(lambda: one.copy_(other)) * 1e3
        del one, other
        cached, repeats = 1 << 12 if DRY else 8 << 20, 50
        one, other = (torch.empty(cached, dtype=torch.int8, device=DEVICE).random_() for _ in range(2))

        def copies() -> None:
            for _ in range(repeats):
                one.copy_(other)

        replay = copies
        if not DRY:  # launches take longer than such copies
            copies()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                copies()
            replay = graph.replay
        cache = 2 * cached * repeats / typical(replay) * 1e3
        self.content["ceilings"] = {"memory_bytes_per_s": memory, "cache_bytes_per_s": cache, "products": []}
        print(
            f"copies: memory {memory / 1e12:.2f} TB/s, L2 cache {cache / 1e12:.2f} TB/s, read and written", flush=True
        )
        for n, d, v in [MAIN, *([] if self.options.quick else OTHERS)]:
            x, w = torch.randn(n, d, device=DEVICE).to(DTYPE), torch.randn(v, d, device=DEVICE).to(DTYPE)
            flop = 2 * n * d * v
            rates = {}
            for out_dtype in (DTYPE, torch.float32):
                out = torch.empty(n, v, dtype=out_dtype, device=DEVICE)
                rates[str(out_dtype)] = flop / typical(lambda x=x, w=w, out=out: product(x, w, out)) * 1e3
                del out
            self.content["ceilings"]["products"].append({"shape": [n, d, v], "flop_per_s": rates})
            texts = ", ".join(f"{rate / 1e12:.0f} TFLOP/s into {name[6:]}" for name, rate in rates.items())
            print(f"product {n} × {d} × {v}: {texts}", flush=True)
            del x, w
        self.save()

    def rate(self, shape: Shape) -> float | None:
        """FLOP/s of the product of this shape, into the operands' dtype."""
        for row in self.content.get("ceilings", {}).get("products", []):
            if tuple(row["shape"]) == shape:
                return row["flop_per_s"][str(DTYPE)]
        return None

    def floors(self) -> None:
        for shape in [MAIN, *([] if self.options.quick else OTHERS[:1])]:
            if self.late(f"floors, {shape}"):
                return
            given = self.inputs("language-like", shape)
            print(f"\nfloors, {shape}\n{gpu_floors.LINE}", flush=True)
            steps, rows = gpu_floors.steps(given)
            self.content["floors"] += gpu_floors.timed(rows, self.interleaved(steps), shape)
            self.save()
            del given, steps
            _tidy()

    # --- losses

    def inputs(self, distribution: str, shape: Shape) -> measure.Inputs:
        given = measure.DISTRIBUTIONS[distribution](*shape, DTYPE, DEVICE)
        known = {"distribution": distribution, "shape": list(shape)}
        if not any(row.items() >= known.items() for row in self.content["inputs"]):
            found = given.figures(THRESHOLD)
            self.content["inputs"].append(known | found)
            print(
                f"\n{distribution}, {shape}: mean nll {found['nll']:.2f}, {found['entries']:.0f} entries a token above "
                f"{THRESHOLD}·√(1 − p[label]), kl {found['kl']:.4f}"
            )
        return given

    def losses(self) -> None:
        parts = [("language-like", MAIN, EVERYTHING)]
        if not self.options.quick:
            parts += [("language-like", shape, SOME) for shape in OTHERS]
        if not DRY:
            parts.append(("flat", MAIN, [("cross-entropy", False)]))
        for distribution, shape, objectives in parts:
            if self.late(f"losses, {distribution}, {shape}"):
                continue
            given = self.inputs(distribution, shape)
            truth = Truth.of(given, 6 if DRY else 48)
            for objective, frozen in objectives:
                if not self.late(f"{objective}, {distribution}, {shape}"):
                    self.group(distribution, shape, given, truth, objective, frozen)
                    self.save()
            del given, truth
            _tidy()

    def group(
        self, distribution: str, shape: Shape, given: measure.Inputs, truth: Truth, objective: str, frozen: bool
    ) -> None:
        """Every contestant once by itself, for memory and errors; then all in rounds, for time."""
        where = {"distribution": distribution, "shape": list(shape), "objective": objective, "frozen": frozen}
        head = "" if objective == "forward" else ", frozen head" if frozen else ", trainable head"
        print(f"\n{objective}{head}, {distribution}, {shape}\n{LINE}", flush=True)
        expected = None if objective == "forward" else truth.gradients(objective)
        torch.compiler.reset()  # else one function may be compiled so often only
        steps: dict[str, Callable[[], object]] = {}
        rows: dict[str, dict] = {}
        leaves = _leaves(given, objective == "forward", frozen)
        for name, loss in gpu_peers.contestants(objective, given).items():
            rows[name] = where | {"name": name}
            step = _step(loss, *leaves)
            try:
                rows[name] |= self.alone(step, *leaves, loss, truth, expected)
                steps[name] = step
            except Exception as error:  # a peer that breaks must not end the run
                rows[name]["reason"] = reason_of(error)
            _tidy()
        n, _, v = shape
        out = torch.empty(n, v, dtype=DTYPE, device=DEVICE)
        steps = {GEMM: lambda: product(given.hidden, given.weight, out), **steps}
        rows = {GEMM: where | {"name": GEMM}, **rows}
        times = self.interleaved(steps)
        for name, row in rows.items():
            if name in times:
                row["ms"] = median(times[name])
                row["gemms"] = beside(times[name], times[GEMM])
                row["rounds"] = times[name]
            self.content["losses"].append(row)
            print(line_of(row), flush=True)

    def alone(
        self, step: Callable[[], Tensor], x: Tensor, w: Tensor, loss: Callable, truth: Truth,
        expected: tuple[Tensor, Tensor] | None,
    ) -> dict:  # fmt: skip
        if not DRY:
            step()  # compiles
        x.grad = w.grad = None
        _tidy()
        row: dict[str, Any] = {}
        before = 0
        if not DRY:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        value = step()
        if not DRY:
            grads = sum(t.grad.nbytes for t in (x, w) if t.grad is not None)
            row["extra_mib"] = (torch.cuda.max_memory_allocated() - before - grads) / 2**20
        row["loss"] = float(value)
        if expected is not None:
            row["d_hidden_error"] = relative(x.grad[truth.tokens], expected[0])
            if w.grad is not None:
                row["d_weight_error"] = relative(w.grad[truth.ids], expected[1])
        if hasattr(loss, "nll"):
            error = (loss.nll(x, w).detach().double() - truth.nll).abs()
            row |= {"nll_error": error.mean().item(), "largest_nll_error": error.max().item()}
        report = getattr(getattr(loss, "module", None), "gradient_report", None)
        if report is not None:
            row["report"] = {
                "mode": report.mode, "bound": report.bound, "hidden_bound": report.hidden_bound,
                "weight_bound": report.weight_bound, "exact_tokens": report.exact_tokens, "entries": report.entries,
                "saved_bytes": report.saved_bytes, "scan": report.scan, "value_error": report.value_error,
                "scan_note": report.scan_note,
            }  # fmt: skip
        return row

    def interleaved(self, steps: dict[str, Callable]) -> dict[str, list[float]]:
        first = {name: self.clock.once(step) for name, step in steps.items()}
        if DRY:
            return {name: [ms] for name, ms in first.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(self.rounds):
            for name, step in steps.items():
                if first[name] < SLOW or number < 5:
                    times[name].append(self.clock.once(step))
        return times

    # --- where the time goes

    def splits(self) -> None:
        for backend in self.backends():
            module = backends.load(backend)
            for objective, frozen, eight_bit in (("TALR", False, ""), ("TALR", True, EIGHT_BIT), ("LAwF", True, "")):
                if self.late(f"split of {objective}{eight_bit}"):
                    return
                given = self.inputs("language-like", MAIN)
                loss = _ours(objective, given, backend, f"sparse{eight_bit}")
                step = _step(loss, *_leaves(given, False, frozen))
                step()
                runs = [gpu_calls.split(module, step, not DRY) for _ in range(self.rounds)]
                names = sorted(
                    {name for run in runs for name in run}, key=lambda name: -max(r.get(name, 0) for r in runs)
                )
                parts = {name: median([run.get(name, 0.0) for run in runs]) for name in names}
                self.content["splits"].append({
                    "backend": backend, "objective": objective, "frozen": frozen, "gradient": f"sparse{eight_bit}",
                    "shape": list(MAIN), "ms": parts,
                })  # fmt: skip
                texts = ", ".join(f"{name} {ms:.2f}" for name, ms in parts.items() if ms >= 0.005)
                print(f"\nms of sparse {objective}{eight_bit} ({backend}), {MAIN}: {texts}", flush=True)
                self.save()
                _tidy()

    def backends(self) -> list[str]:
        found = [
            name for name in ("triton", "cuda") if not (DRY and name == "cuda") and backends.unavailable(name) is None
        ]
        if "cuda" not in found:
            self.note(f"cuda: {'dry run' if DRY else backends.unavailable('cuda')}")
        return found

    # --- kernels

    def kernels(self) -> None:
        print(f"\n{'kernel':34} {'backend':8} {'ms':>8} {'floor':>8} {'ratio':>6}", flush=True)
        for backend in self.backends():
            given = self.inputs("language-like", MAIN)
            module = backends.load(backend)
            done: set[str] = set()
            # Calls that between them use every kernel.
            for objective, frozen, gradient in (
                ("TALR", False, "sparse"), ("TALR", True, f"sparse{EIGHT_BIT}"), ("LAwF", True, "sparse"),
                ("cross-entropy", False, "exact"), ("cross-entropy", True, "sparse"),
                ("LAwF", True, "exact"), ("EAFT", True, "sparse"), ("forward", True, "exact"),
            ):  # fmt: skip
                if self.late(f"kernels of {objective}"):
                    return
                loss = _ours(objective, given, backend, gradient)
                found = gpu_calls.first_calls(module, _step(loss, *_leaves(given, objective == "forward", frozen)))
                for name, (kernel, args) in found.items():
                    work = gpu_calls.work(name, args)
                    label = f"{name}, {objective}" if name in KERNELS_OF_LAWF and objective == "LAwF" else name
                    if work and label not in done:
                        done.add(label)
                        self.kernel(label, backend, kernel, args, work)
                del found
                _tidy()
                self.save()

    def kernel(self, name: str, backend: str, kernel: Callable, args: tuple, work: dict[str, float]) -> None:
        with torch.no_grad():  # as where the arguments were made: some are views
            times = self.clock.rounds({"": lambda: kernel(*args)}, self.rounds, cold=True)[""]
        ceilings = self.content.get("ceilings")
        floor = None
        if ceilings is not None:
            floor = 1e3 * max(
                work.get("flop", 0) / (self.rate(MAIN) or float("inf"))
                + work.get("flop8", 0) / (gpu_floors.rate_of_8_bits(self.content["floors"], MAIN) or float("inf")),
                work.get("bytes", 0) / ceilings["memory_bytes_per_s"],
                work.get("cached", 0) / ceilings["cache_bytes_per_s"],
            )
        row = {"name": name, "backend": backend, "ms": median(times), "floor_ms": floor, "work": work, "rounds": times}
        self.content["kernels"].append(row)
        ratio = f"{floor:8.3f} {row['ms'] / floor:6.2f}" if floor else ""
        print(f"{name:34} {backend:8} {row['ms']:8.3f} {ratio}", flush=True)

    # --- targets

    def targets(self) -> None:
        found = []
        print("\ntargets, at", MAIN, "(dry run: of no meaning)" if DRY else "")
        for objective, frozen, gradient, figure, most in TARGETS:
            row = next(
                (r for r in self.content["losses"] if r["distribution"] == "language-like" and tuple(r["shape"]) == MAIN
                 and (r["objective"], r["frozen"], r["name"]) == (objective, frozen, f"{OURS}{gradient}")), {},
            )  # fmt: skip
            value = row.get(figure)
            state = "not measured" if value is None else "met" if value <= most else "missed"
            unit = UNITS[figure]
            found.append({
                "objective": objective, "frozen": frozen, "gradient": gradient, "figure": figure, "most": most,
                "value": value, "state": state,
            })  # fmt: skip
            text = f"{objective}, {'frozen' if frozen else 'trainable'} head, {gradient}"
            print(f"  {text:42} {'-' if value is None else f'{value:.3g}':>8} of {most:<6} {unit}: {state}")
        self.content["targets"] = found
        self.save()


LINE = (
    f"{'':36} {'ms':>8} {'products':>8} {'extra MiB':>9} {'nll':>8} {'dx, %':>7} {'dW, %':>7} {'bound, %':>8} "
    f"{'entries':>7} {'exact':>6}"
)


def line_of(row: dict) -> str:
    if "reason" in row:
        return f"{row['name']:36} {row['reason']}"

    def text(value: float | None, form: str) -> str:
        return "-" if value is None else f"{value:{form}}"

    report = row.get("report") or {}
    tokens = row["shape"][0]
    entries = report.get("entries") or None
    errors = [None if row.get(k) is None else 100 * row[k] for k in ("d_hidden_error", "d_weight_error")]
    bound = report.get("bound")
    return (
        f"{row['name']:36} {text(row.get('ms'), '.2f'):>8} {text(row.get('gemms'), '.2f'):>8} "
        f"{text(row.get('extra_mib'), '.0f'):>9} {text(row.get('nll_error'), '.1g'):>8} "
        f"{text(errors[0], '.2f'):>7} {text(errors[1], '.2f'):>7} "
        f"{text(None if bound is None else 100 * bound, '.2f'):>8} "
        f"{text(None if entries is None else entries / tokens, '.0f'):>7} {text(report.get('exact_tokens'), 'd'):>6}"
    )


def _leaves(given: measure.Inputs, forward: bool, frozen: bool) -> tuple[Tensor, Tensor]:
    hidden, weight = given.hidden.detach(), given.weight.detach()
    return hidden.requires_grad_(not forward), weight.requires_grad_(not forward and not frozen)


def _step(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor) -> Callable[[], Tensor]:
    """Forward and backward into fresh gradients, or forward where nothing wants one; the loss."""

    def step() -> Tensor:
        x.grad = w.grad = None
        with torch.set_grad_enabled(x.requires_grad):
            value = loss(x, w)
        if x.requires_grad:
            value.backward()
        return value.detach()

    return step


def _ours(objective: str, given: measure.Inputs, backend: str, gradient: str = "sparse") -> Callable:
    import fused_losses as fl

    if objective == "EAFT":  # the entropy of the largest needs logits, so bits come from them
        module = fl.EAFTLoss(backend=backend, gradient=gradient)
        return lambda x, w: module(x, w, given.labels)
    if objective == "forward":
        return lambda x, w: fl.token_losses(x, w, given.labels, backend=backend).nll.mean()
    members = gpu_peers.contestants(objective, given, (gradient.removesuffix(EIGHT_BIT),))
    module = members[f"{OURS}{gradient}"].module  # type: ignore[attr-defined]
    module.backend = backend
    return members[f"{OURS}{gradient}"]


def _tidy() -> None:
    gc.collect()
    if not DRY:
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the main shape only, 7 rounds: under 2 minutes")
    parser.add_argument("--dry", action="store_true", help="on the CPU, in Triton's interpreter, tiny shapes")
    parser.add_argument("--sections", nargs="*", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--seconds", type=float, help="after so many, what is left is left out; default 440, quick 110")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.seconds = options.seconds or (110 if options.quick else 440)
    require_gpu()
    build_kernels()
    bench = Bench(options)
    print(", ".join(f"{k} {v}" for k, v in bench.content["facts"].items()))
    failed = False
    for name, section in zip(
        SECTIONS, (bench.ceilings, bench.floors, bench.losses, bench.splits, bench.kernels), strict=True
    ):
        if name not in options.sections or bench.late(name):
            continue
        try:
            section()
        except Exception as error:
            failed = True
            bench.note(f"{name} failed: {type(error).__name__}: {error}")
            import traceback

            traceback.print_exc()
            if "CUDA error" in str(error):
                break
        bench.save()
    bench.targets()
    print(f"{time.monotonic() - bench.started:.0f} s; {bench.path}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
