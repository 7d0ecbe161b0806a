"""What test_spread_sparse.py runs on the ranks of a process group: sparse gradients of a head that is spread over
them."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing
from cases import Case, coarse
from processes import leave, pythonpath
from torch import Tensor
from vocab_ranks import DTYPES, Ranks, certain_of_both, collective_calls, gradients, spread_inputs, weighted

import fused_losses as fl
from fused_losses import backends

N, D, V = 150, 24, 1501
# Rows of each rank: few, none, and as even as they can be.
SIZES = {2: [(1100, 401), (0, 1501)], 4: [(700, 2, 0, 799), (376, 375, 375, 375)]}
KINDS = (("float64", "auto"), ("float32", "auto"), ("float32", "torch"))  # "auto" is the compiled kernels, in float32


def kinds(sizes: tuple[int, ...]) -> tuple[tuple[str, str], ...]:
    """Those of a division of the rows: all of the first."""
    return KINDS if sizes in (SIZES[2][0], SIZES[4][0]) else KINDS[:2]


OUTPUTS = ("nll", "kl", "entropy", "prediction", "reference_nll", "reference_entropy", "lse", "logits_at")

# Tokens with more entries get exact gradients, a chunk of mostly such ones in forward.
ROOM = dict(threshold=1.05e-4, capacity=250, chunk_bytes=1)
CASES: dict[str, dict[str, Any]] = {
    "plain": dict(),
    "bias-scale": dict(bias=True, scale=-0.7),
    "softcap": dict(softcap=12.0),
    "frozen": dict(frozen=True),
    "single-logits": dict(bias=True, ids=5),
    "flat": dict(spread=0.03),
    "half-flat": dict(flat=60, bias=True),
    "shared": dict(reference="shared", bias=True),
    "shared-frozen": dict(reference="shared", frozen=True, near=0.02),
    "shared-softcap": dict(reference="shared", softcap=12.0),
    "own": dict(reference="own", scale=1.3),
    "own-single-logits": dict(reference="own", ids=5, frozen=True),
    "few": dict(count=20),
    "one": dict(count=1, frozen=True),
    "lonely": dict(lonely=True),
    "coarse": dict(bias=True, coarse=dict(threshold=0.03)),
    "coarse-shared": dict(reference="shared", coarse=dict(threshold=0.03, chunk_bytes=1)),
    "coarse-frozen": dict(softcap=12.0, frozen=True, coarse=dict(threshold=0.03)),
    "room": dict(flat=60, bias=True, coarse=ROOM),
    "room-frozen": dict(flat=60, reference="own", ids=5, frozen=True, coarse=ROOM),
}  # fmt: skip
# Of these all ranks together keep what one process keeps: no token has too many entries on one of them.
SAME_ENTRIES = [name for name, options in CASES.items() if options.get("coarse") is not ROOM]
OBJECTIVES = {
    "CrossEntropy": (fl.CrossEntropyLoss, None),
    "smoothing": (lambda **o: fl.CrossEntropyLoss(0.1, 0.01, **o), None),
    "TALR": (fl.TALRLoss, None),
    "LAwF-shared": (fl.LAwFLoss, "shared"),
    "LAwF-own": (fl.LAwFLoss, "own"),
    "ASFT": (fl.ASFTLoss, "own"),
}


def make(
    *, count: int = N, spread: float = 4.0, reference: str | None = None, near: float = 0.05, bias: bool = False,
    ids: int = 0, flat: int = 0, lonely: bool = False, coarse: Any = None, **options: Any,
) -> Case:  # fmt: skip
    """Logits of standard deviation `spread`, the label's planted at half of the tokens, elsewhere another's."""
    g = torch.Generator().manual_seed(count)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    weight, hidden = normal(V, D) / math.sqrt(D), normal(count, D)
    if lonely:  # what matters of every token is on the rank that has the first rows
        weight[300:] *= 0.05
    labels = torch.randint(300 if lonely else V, (count,), generator=g)
    labels[-1] = 0 if lonely else V - 1
    hidden *= spread / (hidden @ weight.t()).std()
    if spread > 1:
        ahead = torch.where(torch.arange(count) % 4 < 2, labels, torch.randint(V, (count,), generator=g))
        rows = weight[ahead]
        hidden[::2] += (12 * rows / rows.square().sum(1, keepdim=True))[::2]
    hidden[:flat] *= 0.01
    case = Case(
        hidden, weight, labels.masked_fill((torch.arange(count) % 9 == 4) & (count > 20), -100),
        bias=normal(V) if bias else None, nll_upstream=normal(count),
        reference_hidden=None if reference is None else hidden * (1 + near * normal(count, D)),
        reference_weight=weight + 0.02 * normal(V, D) if reference == "own" else None,
        kl_upstream=None if reference is None else normal(count), **options,
    )  # fmt: skip
    if ids:
        asked = torch.randint(V, (count, ids), generator=g)
        asked[:, 0] = labels
        asked[1::3, 1:3] = -100
        case = replace(case, asked={"ids": asked}, upstream={"lse": normal(count), "logits_at": normal(count, ids)})
    return case


def set_up(name: str) -> contextlib.AbstractContextManager:
    """In which a case is run, on ranks and in one process."""
    limits = CASES.get(name, {}).get("coarse")
    return contextlib.nullcontext() if limits is None else coarse(**limits)


def token_losses(case: Case, inputs: tuple, **options: Any) -> dict[str, Any]:
    """Outputs, gradients of two passes backward, and the report."""
    hidden, head, reference = inputs
    out = fl.token_losses(hidden, head, case.labels, reference=reference, **case.asked, **options)
    found = {name: getattr(out, name).detach() for name in OUTPUTS if getattr(out, name) is not None}
    found |= gradients(weighted(case, out), hidden, head)
    return found | report(out.gradient_report)


def report(of: fl.GradientReport) -> dict[str, Any]:
    numbers = {
        name: -1 if getattr(of, name) is None else getattr(of, name)  # no number: equal on all ranks
        for name in ("entries", "exact_tokens", "bound", "hidden_bound", "weight_bound")
    }
    return {name: torch.tensor(float(number)) for name, number in numbers.items()}


def objective(name: str, case: Case, inputs: tuple, **options: Any) -> dict[str, Any]:
    make_objective, reference_kind = OBJECTIVES[name]
    hidden, head, reference = inputs
    shape, given = (3, -1), {}
    if reference_kind is not None:
        given["reference"] = replace(reference, hidden=reference.hidden.reshape(3, -1, D))
    if name.startswith("LAwF"):
        confidence = torch.linspace(-1, 1, len(case.labels)).clamp(min=0)
        given["confidence"] = confidence.masked_fill(case.labels == -100, 0).reshape(shape)
    loss = make_objective(**options)
    value = loss(hidden.reshape(3, -1, D), head, case.labels.reshape(shape), **given)
    found = {"loss": value.detach()} | gradients(2.5 * value, hidden, head)
    return found | report(loss.gradient_report)


def objective_case(name: str) -> Case:
    return make(reference=OBJECTIVES[name][1], bias=True, flat=60)


def moved_head(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """A head that is trained, in two calls, between which it moves; and one that moves far on one rank alone."""
    case, found = make(), []
    hidden, head, _ = spread_inputs(case, torch.float64, sizes)
    for step in (0.0, 1e-4, 3.0):
        with torch.no_grad():
            g = torch.Generator().manual_seed(dist.get_rank())
            noise = torch.randn(head.weight.shape, generator=g, dtype=torch.float64)
            head.weight.add_(noise, alpha=step if step < 1 or dist.get_rank() == 0 else 0.0)
        whole = torch.cat(
            [torch.empty(0, D, dtype=torch.float64), *_everyone(head.weight.detach(), sizes)]
        )  # fmt: skip
        found.append({"whole": whole} | token_losses(case, (hidden, head, None), gradient="sparse"))
    return found


def _everyone(rows: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    padded = rows.new_zeros(max(sizes), D)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


COUNTED = {
    "summed": lambda x, head, ref, y: fl.CrossEntropyLoss(gradient="sparse")(x, head, y),
    "summed-reference": lambda x, head, ref, y: fl.ASFTLoss(gradient="sparse")(x, head, y, reference=ref),
    "per-token": lambda x, head, ref, y: fl.token_losses(x, head, y, gradient="sparse").nll.sum(),
    "per-token-reference": lambda x, head, ref, y: fl.token_losses(
        x, head, y, reference=ref, gradient="sparse"
    ).kl.sum(),
}


def compute(world: int) -> dict:
    found: dict = {}
    for sizes in SIZES[world]:
        for name, options in CASES.items():
            case = make(**options)
            for dtype, backend in kinds(sizes):
                inputs = spread_inputs(case, DTYPES[dtype], sizes)
                with set_up(name):
                    found[name, sizes, dtype, backend] = token_losses(case, inputs, gradient="sparse", backend=backend)
        for name in OBJECTIVES:
            case = objective_case(name)
            inputs = spread_inputs(case, torch.float32, sizes)
            with set_up("room"):
                found["objective", name, sizes] = objective(name, case, inputs, gradient="sparse")
    sizes = SIZES[world][0]
    found["moved"] = moved_head(sizes)
    for name, options in (("plain", {}), ("shared", dict(reference="shared"))):
        found["half", name] = token_losses(
            make(**options), spread_inputs(make(**options), torch.bfloat16, sizes), gradient="sparse"
        )
    loss = fl.CrossEntropyLoss(gradient="sparse", scan="int8")
    loss(*spread_inputs(make(), torch.float32, sizes)[:2], make().labels)
    found["note"] = loss.gradient_report.scan_note
    ignored = replace(make(), labels=torch.full((N,), -100))
    found["ignored"] = token_losses(ignored, spread_inputs(ignored, torch.float32, sizes), gradient="sparse")
    for name, call in COUNTED.items():
        for frozen in (False, True):
            case = make(reference="shared", frozen=frozen)
            collective_calls(case, sizes, call)  # the directions of the head are looked for once
            found["calls", name, frozen] = collective_calls(case, sizes, call)
    return found


def work(rank: int, world: int, folder: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world, timeout=timedelta(seconds=600)
    )
    torch.save(compute(world), f"{folder}/{rank}.pt")
    leave()


# Of 130 tokens, with directions of the head, or 8, without.
INTERPRETED: dict[str, dict[str, Any]] = {
    "plain": dict(bias=True, scale=-0.7),
    "softcap": dict(softcap=12.0, ids=3),
    "shared": dict(reference="shared", bias=True),
    "many": dict(count=130, reference="shared", frozen=True, near=0.02),
    "own-softcap": dict(reference="own", softcap=12.0, ids=3, frozen=True),
    "room": dict(flat=4, reference="own", coarse=dict(threshold=1e-4, capacity=60, chunk_bytes=1)),
}  # fmt: skip
INTERPRETED_SIZES = ((150, 50), (200, 0))


def calls() -> Iterator[tuple[str, tuple[int, int], str, str]]:
    """Name, division, gradient, and dtype of what is interpreted."""
    for name in INTERPRETED:
        for sizes in INTERPRETED_SIZES[: 1 + (name == "shared")]:
            yield name, sizes, "sparse", "float32"
            if name not in ("many", "room"):
                yield name, sizes, "exact", "float32"
    yield "shared", INTERPRETED_SIZES[0], "sparse", "float16"
    yield "softcap", INTERPRETED_SIZES[0], "exact", "float16"


def small_case(name: str) -> Case:
    """For an interpreter that takes milliseconds for each row of logits."""
    options = {"count": 8, **INTERPRETED[name]}
    case = make(**{key: value for key, value in options.items() if key != "coarse"})
    asked = {key: torch.where(ids < 0, ids, ids % 200) for key, ids in case.asked.items()}
    few = {key: None if (all := getattr(case, key)) is None else all[:200] for key in ("bias", "reference_weight")}
    labels = torch.where(case.labels < 0, case.labels, case.labels % 200)
    return replace(case, weight=case.weight[:200], labels=labels, asked=asked, **few)


def limited(name: str) -> contextlib.AbstractContextManager:
    limits = INTERPRETED[name].get("coarse")
    return contextlib.nullcontext() if limits is None else coarse(**limits)


INTERPRETED_OBJECTIVES: dict[str, tuple[Any, str | None]] = {
    "EAFT": (lambda **o: fl.EAFTLoss(top_k=60, **o), None),  # more than a rank has
    "EKSFT": (lambda **o: fl.EKSFTLoss(**o), "shared"),  # with a gradient of the entropy
    "JSD": (lambda **o: fl.JSDLoss(0.3, **o), "shared"),  # which has no kernels here
}


CUDA_CALLS = (("softcap", "exact"), ("shared", "sparse"))


def interpreted(rank: int, world: int, folder: str, shim: str | None) -> None:
    """By Triton's kernels, in its interpreter; the rows in two divisions. Some by CUDA's, from the folder of a shim."""
    import quick_interpreter

    quick_interpreter.install()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
    found: dict = {}
    for name, sizes, gradient, dtype in calls():
        inputs = spread_inputs(small_case(name), DTYPES[dtype], sizes)
        with limited(name):
            found[name, sizes, gradient, dtype] = token_losses(
                small_case(name), inputs, gradient=gradient, backend="triton"
            )
    for gradient in ("sparse", "exact"):
        ignored = small_case("shared")
        ignored = replace(ignored, labels=torch.full_like(ignored.labels, -100))
        inputs = spread_inputs(ignored, torch.float32, INTERPRETED_SIZES[0])
        found["ignored", gradient] = token_losses(ignored, inputs, gradient=gradient, backend="triton")
    inputs = spread_inputs(certain_of_both(), torch.float32, INTERPRETED_SIZES[0])
    found["certain of both"] = token_losses(certain_of_both(), inputs, gradient="exact", backend="triton")
    if shim is not None:
        from cuda_shim import shim as shim_module

        shim_module.load(Path(shim))
        choose = backends.choose
        cuda = mock.patch.object(
            backends, "choose", lambda name, device: name if name == "cuda" else choose(name, device)
        )
        for name, gradient in CUDA_CALLS:
            inputs = spread_inputs(small_case(name), torch.float32, INTERPRETED_SIZES[0])
            with cuda:
                found["cuda", name] = token_losses(small_case(name), inputs, gradient=gradient, backend="cuda")
    for name, (loss, reference) in INTERPRETED_OBJECTIVES.items():
        case = small_case(reference or "plain")
        hidden, head, given = spread_inputs(case, torch.float32, INTERPRETED_SIZES[0])
        more = {"reference": given} if reference else {}
        value = loss(backend="triton")(hidden, head, case.labels, **more)
        found[name] = {"loss": value.detach()} | gradients(2.5 * value, hidden, head)
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


def main() -> None:
    """Started by a launcher: `torchrun ... spread_ranks.py folder`."""
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = SIZES[world][0]
    case = make(bias=True)
    found = token_losses(case, spread_inputs(case, torch.float32, sizes), gradient="sparse")
    torch.save({"plain": found}, f"{sys.argv[1]}/{rank}.pt")
    leave()


def gathered(world: int, folder: str) -> Ranks:
    return Ranks(world, [torch.load(f"{folder}/{rank}.pt") for rank in range(world)])


def start(world: int, folder: str) -> Ranks:
    """By a server that has imported this file once, for all ranks of both worlds."""
    multiprocessing.set_forkserver_preload([__name__])
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=pythonpath()):
        torch.multiprocessing.start_processes(work, (world, folder), nprocs=world, start_method="forkserver")
    return gathered(world, folder)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
