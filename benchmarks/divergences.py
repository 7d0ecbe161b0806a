"""What the outputs besides nll and kl cost: divergences beside TRL's kernels, lse and single logits beside a call
without.

    python benchmarks/divergences.py [--tokens 2048] [--rounds 3] [--dims 576 2048]

Forward and backward on a CPU, V = 49,152, a teacher with a head of its own. Times are medians of interleaved rounds in
one process; peak memory, above inputs and gradients, is that of a process of its own for each contestant; errors of the
gradient of the hidden states are against float64 on 64 of the tokens. Writes benchmarks/results/divergences-cpu.json
after every D and dtype, goes on from there when started again with the same settings, and prints the tables of
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_losses as fl
from fused_losses import reference as oracle
from fused_losses.kernels import measure

RESULTS = Path(__file__).parent / "results" / "divergences-cpu.json"
VOCABULARY, IDS = 49152, 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    ids: Tensor


def inputs(tokens: int, dim: int, dtype: torch.dtype, vocabulary: int = VOCABULARY) -> Inputs:
    """Logits of deviation 2.5, of which the label's stands out; a teacher not far away."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, dim, generator=g) * 2.5 / dim**0.5
    labels = torch.randint(vocabulary, (tokens,), generator=g)
    hidden = torch.randn(tokens, dim, generator=g) + 1.3 * weight[labels]
    teacher = hidden + 0.2 * torch.randn(tokens, dim, generator=g)
    teacher_weight = weight + 0.05 * torch.randn(vocabulary, dim, generator=g) / dim**0.5
    ids = torch.randint(vocabulary, (tokens, IDS), generator=g)
    return Inputs(
        hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, teacher.to(dtype),
        teacher_weight.to(dtype), ids,
    )  # fmt: skip


def language_like(tokens: int, dim: int, dtype: torch.dtype, vocabulary: int = VOCABULARY) -> Inputs:
    """Logits of which 150 to 300 a token matter to sparse gradients, as on text; no teacher."""
    given = measure.language_like(tokens, dim, vocabulary, dtype, "cpu")
    ids = torch.randint(vocabulary, (tokens, IDS), generator=torch.Generator().manual_seed(1))
    hidden, weight = given.hidden.requires_grad_(), given.weight.requires_grad_()
    return Inputs(hidden, weight, given.labels, given.reference_hidden, weight.detach(), ids)


def ours(beta: float, objective: bool) -> Callable[[Inputs], Tensor]:
    def run(x: Inputs) -> Tensor:
        reference = fl.Reference(x.teacher_hidden, x.teacher_weight)
        if objective:
            return fl.JSDLoss(beta=beta, gradient="exact")(x.hidden, x.weight, x.labels, reference=reference)
        out = fl.token_losses(x.hidden, x.weight, x.labels, reference=reference, beta=beta, gradient="exact")
        return out.divergence.mean()

    return run


def trl(beta: float) -> Callable[[Inputs], Tensor]:
    def run(x: Inputs) -> Tensor:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        divergence, _ = ChunkedDivergenceFunction.apply(
            x.hidden, x.weight, None, x.teacher_hidden, x.teacher_weight, None, beta
        )
        return divergence.mean()

    return run


def eager(beta: float) -> Callable[[Inputs], Tensor]:
    def run(x: Inputs) -> Tensor:
        z_ref = (x.teacher_hidden @ x.teacher_weight.T).float()
        return oracle.divergence(z_ref, (x.hidden @ x.weight.T).float(), beta).mean()

    return run


def single(gradient: str, lse: bool, ids: bool) -> Callable[[Inputs], Tensor]:
    def run(x: Inputs) -> Tensor:
        out = fl.token_losses(x.hidden, x.weight, x.labels, gradient=gradient, ids=x.ids if ids else None)
        loss = out.nll
        if lse:
            loss = loss + 1e-3 * out.lse
        if ids:
            loss = loss + 1e-3 * out.logits_at.mean(-1)
        return loss.mean()

    return run


NAMES = {0.0: "KL(p_ref‖p)", 0.5: "JSD, β = 0.5", 1.0: "KL(p‖p_ref)"}
Contestants = dict[str, Callable[[Inputs], Tensor]]
DIVERGENCES: Contestants = {
    **{f"{name}; objective": ours(beta, True) for beta, name in NAMES.items()},
    **{f"{name}; token_losses": ours(beta, False) for beta, name in NAMES.items()},
    **{f"{name}; TRL": trl(beta) for beta, name in NAMES.items()},
    **{f"{name}; full logits": eager(beta) for beta, name in NAMES.items()},
}
SINGLE: Contestants = {
    f"{gradient}; {what}": single(gradient, *wanted)
    for gradient in ("exact", "sparse")
    for what, wanted in {
        "nll": (False, False), "nll, lse": (True, False), f"nll, lse, logits_at of {IDS}": (True, True)
    }.items()
}  # fmt: skip
CONTESTANTS = DIVERGENCES | SINGLE


def made_for(name: str) -> Callable[..., Inputs]:
    return inputs if name in DIVERGENCES else language_like


def step(name: str, x: Inputs) -> float:
    x.hidden.grad = x.weight.grad = None
    start = time.perf_counter()
    CONTESTANTS[name](x).backward()
    return time.perf_counter() - start


def peak(name: str, tokens: int, dim: int, dtype: str) -> float:
    """MiB above inputs and gradients, of a process that does nothing else."""
    code = f"import divergences; divergences.measure_peak({name!r}, {tokens}, {dim}, {dtype!r})"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    return float(found.stdout.split()[-1])


def measure_peak(name: str, tokens: int, dim: int, dtype: str) -> None:
    def memory(field: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])

    make = made_for(name)
    step(name, make(8, dim, DTYPES[dtype], 2048))  # what is loaded on first use
    x = make(tokens, dim, DTYPES[dtype])
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(name, x)
    gradients = (x.hidden.nbytes + x.weight.nbytes) // 1024
    print(max(0, memory("VmHWM") - before - gradients) / 1024)


def error(name: str, x: Inputs) -> float | None:
    """Of the gradient of the hidden states, of a few tokens."""
    few = 64
    small = Inputs(
        x.hidden.detach()[:few].clone().requires_grad_(), x.weight.detach().requires_grad_(), x.labels[:few],
        x.teacher_hidden[:few], x.teacher_weight, x.ids[:few],
    )  # fmt: skip
    beta = next((beta for beta, what in NAMES.items() if name.startswith(what)), None)
    if beta is None:
        return None
    CONTESTANTS[name](small).backward()
    truth = small.hidden.detach().double().requires_grad_()
    z_ref = small.teacher_hidden.double() @ small.teacher_weight.double().T
    oracle.divergence(z_ref, truth @ small.weight.detach().double().T, beta).mean().backward()
    return ((small.hidden.grad.double() - truth.grad).norm() / truth.grad.norm()).item()


def measured(tokens: int, dims: list[int], rounds: int, rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """`rows`, and those of one more case each time."""
    from tqdm import tqdm

    known = {(row["D"], row["dtype"], row["contestant"]) for row in rows}
    cases = [
        case
        for case in itertools.product((SINGLE, DIVERGENCES), dims, DTYPES)
        if (*case[1:], [*case[0]][-1]) not in known
    ]
    bar = tqdm(total=sum(len(contestants) for contestants, *_ in cases) * (rounds + 1))
    for contestants, dim, dtype in cases:
        x = made_for(next(iter(contestants)))(tokens, dim, DTYPES[dtype])
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(rounds + 1):
            for name in contestants:
                seconds = step(name, x)
                if number:
                    times[name].append(seconds)
                bar.update()
        product = statistics.median(_product(x) for _ in range(3))
        for name, found in times.items():
            rows.append(
                {
                    "contestant": name, "D": dim, "dtype": dtype, "rounds": rounds, "seconds": statistics.median(found),
                    "products": statistics.median(found) / product,
                    "peak_mib": peak(name, tokens, dim, dtype), "hidden_error": error(name, x),
                }
            )  # fmt: skip
        yield rows
    bar.close()


def _product(x: Inputs) -> float:
    """Of one forward product in float32."""
    hidden, weight = x.hidden.detach().float(), x.weight.detach().float()
    start = time.perf_counter()
    torch.mm(hidden, weight.T)
    return time.perf_counter() - start


WAYS = ("objective", "token_losses", "TRL", "full logits")


def tables(content: dict[str, Any]) -> str:
    """Divergences: seconds, peak MiB and error of dx of each contestant. Single values: what they add."""
    rows = {(row["D"], row["dtype"], row["contestant"]): row for row in content["rows"]}
    cases = sorted({(row["D"], row["dtype"]) for row in content["rows"]})
    ours = [f"fused_losses, {WAYS[0]}", f"`{WAYS[1]}`"]
    lines = [f"| D, dtype | | {' | '.join([*ours, *WAYS[2:]])} |", "|---|---|---|---|---|---|"]
    for case in cases:
        for name in NAMES.values():
            if (*case, f"{name}; {WAYS[0]}") not in rows:
                continue
            found = [rows[(*case, f"{name}; {way}")] for way in WAYS]
            cells = [f"{x['seconds']:.2f} s, {x['peak_mib']:.0f} MiB, {x['hidden_error']:.0e}" for x in found]
            lines.append(f"| {case[0]}, {case[1]} | {name} | {' | '.join(cells)} |")
    lines += ["", "| D, dtype | gradients | nll | with lse | with lse and logits_at |", "|---|---|---|---|---|"]
    for case in cases:
        for gradient in ("exact", "sparse"):
            names = [name for name in SINGLE if name.startswith(gradient)]
            alone, *more = (rows[(*case, name)]["seconds"] for name in names)
            cells = [f"{alone:.2f} s", *(f"{seconds / alone - 1:+.1%}" for seconds in more)]
            lines.append(f"| {case[0]}, {case[1]} | {gradient} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dims", type=int, nargs="+", default=[576, 2048])
    arguments = parser.parse_args()
    settings = {
        "tokens": arguments.tokens, "vocabulary": VOCABULARY,
        "threads": torch.get_num_threads(), "versions": {"torch": torch.__version__, "fused_losses": fl.__version__},
    }  # fmt: skip
    content = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if any(content.get(key) != value for key, value in settings.items()):
        content = {**settings, "rows": []}
    for rows in measured(arguments.tokens, arguments.dims, arguments.rounds, content["rows"]):
        beside = RESULTS.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps({**settings, "rows": rows}, indent=1))
        beside.replace(RESULTS)
    print(tables(content))


if __name__ == "__main__":
    main()
