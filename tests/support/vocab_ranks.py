"""What test_vocab_parallel.py runs on the ranks of a process group, each with its rows of the vocabulary."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import Case, make, near_the_reference, nearly_certain, with_more
from processes import leave, pythonpath
from torch import Tensor

import fused_losses as fl
from fused_losses.backends import chunks, row_passes
from fused_losses.tokens import Observer

D, V = 16, 123
# Rows of each rank; where one has none or few, and where chunks of 96 MiB would differ.
SIZES = {2: [(100, 23), (123, 0)], 4: [(40, 1, 0, 82), (31, 31, 31, 30)]}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OUTPUTS = ("nll", "kl", "entropy", "prediction", "reference_nll", "reference_entropy", "lse")
MORE = ("logits_at", "divergence", "rank", "log_p2")

TOKEN_CASES: dict[str, dict] = {
    "plain": dict(),
    "bias": dict(bias=True),
    "scale": dict(scale=-0.3),
    "softcap": dict(softcap=4.0),
    "frozen": dict(frozen=True),
    "shared": dict(reference="shared"),
    "shared-bias-scale": dict(reference="shared", bias=True, scale=0.7),
    "shared-frozen": dict(reference="shared", frozen=True),
    "shared-softcap": dict(reference="shared", softcap=4.0, bias=True),
    "own": dict(reference="own"),
    "own-everything": dict(reference="own", bias=True, scale=-1.7, softcap=4.0),
    "own-frozen-softcap": dict(reference="own", frozen=True, softcap=4.0),
    "ruled-out": dict(reference="shared", bias=True),
    "more": dict(bias=True),
    "more-frozen-softcap": dict(softcap=4.0, frozen=True),
    "more-shared": dict(reference="shared", scale=0.7),
    "more-own-softcap": dict(reference="own", softcap=4.0, bias=True),
    "more-own-frozen-reverse": dict(reference="own", frozen=True),
}  # fmt: skip
CLASSES = torch.arange(V).double() % 3
OBJECTIVES = {
    "CrossEntropy": (fl.CrossEntropyLoss, None),
    "smoothing": (lambda **o: fl.CrossEntropyLoss(0.2, 0.01, **o), None),
    "class-weights": (lambda **o: fl.CrossEntropyLoss(0.2, class_weights=CLASSES, **o), None),
    "smoothing-softcap": (lambda **o: fl.CrossEntropyLoss(0.2, **o), None),
    "class-weights-softcap": (
        lambda **o: fl.CrossEntropyLoss(0.2, class_weights=CLASSES, reduction="weighted_mean", **o),
        None,
    ),
    "TALR": (fl.TALRLoss, None),
    "LAwF-shared": (fl.LAwFLoss, "shared"),
    "LAwF-own": (fl.LAwFLoss, "own"),
    "LAwF-group-mean": (lambda **o: fl.LAwFLoss(reduction="group_mean", **o), "shared"),
    "ASFT": (fl.ASFTLoss, "own"),
    "EKSFT": (fl.EKSFTLoss, "own"),
    "MaskTheTarget": (lambda **o: fl.MaskTheTargetLoss(0.5, **o), "own"),
    "STM-kept": (lambda **o: fl.STMLoss(40.0, "kept_mean", **o), "shared"),
    "LAwF-target": (lambda **o: fl.LAwFLoss(reduction="group_mean", target_probability=0.1, **o), "shared"),
    "JSD": (lambda **o: fl.JSDLoss(0.3, 2.0, 0.5, **o), "own"),
    "TopK": (lambda **o: fl.TopKDistillationLoss(temperature=2.0, nll_weight=0.5, **o), None),
    "TopK-jsd-bucket": (lambda **o: fl.TopKDistillationLoss("jsd", rest="bucket", **o), None),
    "EAFT": (fl.EAFTLoss, None),
    "EAFT-top-2": (lambda **o: fl.EAFTLoss(top_k=2, **o), None),
    "EAFT-top-all": (lambda **o: fl.EAFTLoss(top_k=1000, **o), None),
}


def token_case(name: str, sizes: tuple[int, ...]) -> Case:
    """With a label on each side of each border between ranks."""
    case = make(33, D, V, **TOKEN_CASES[name])
    ends = torch.tensor(sizes).cumsum(0)
    borders = torch.cat([ends - 1, ends[:-1]]).clamp(0, V - 1)
    case.labels[5 : 5 + len(borders)] = borders
    # The label far behind another token, on another rank as well as on its own.
    case.hidden[20:24] = case.weight[[0, V // 3, V // 2, V - 1]] * 3
    if name.startswith("more"):
        case = with_more(case, beta=1.0 if name.endswith("reverse") else 0.3)
    if name == "ruled-out":  # as padding is, here also all rows of a rank
        case.bias[40:] = -torch.inf
        case.labels[case.labels >= 40] %= 40
    return case


def rows(sizes: tuple[int, ...], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def spread_inputs(case: Case, dtype: torch.dtype, sizes: tuple[int, ...]):
    """What `Case.inputs` gives, for this rank."""
    hidden, head, reference = case.inputs(dtype)
    group, mine = dist.group.WORLD, rows(sizes, dist.get_rank())

    def part(whole: Tensor | None) -> Tensor | None:
        return None if whole is None else whole.detach()[mine].clone().requires_grad_(whole.requires_grad)

    local = fl.LMHead(part(head.weight), part(head.bias), case.scale, case.softcap, process_group=group)
    if reference is not None and reference.head is not None:
        reference = fl.Reference(reference.hidden, fl.LMHead(part(reference.head.weight), process_group=group))
    return hidden, local, reference


def token_losses(case: Case, inputs, **options) -> dict[str, Tensor]:
    """Outputs and gradients, of two passes backward."""
    hidden, head, reference = inputs
    out = fl.token_losses(hidden, head, case.labels, reference=reference, **case.asked, **options)
    names = (*OUTPUTS, *(MORE if case.asked else ()))
    found = {name: getattr(out, name).detach() for name in names if getattr(out, name) is not None}
    assert out.gradient_report.mode == "exact"
    return found | gradients(weighted(case, out), hidden, head)


def weighted(case: Case, out: fl.TokenLosses) -> Tensor:
    """The sum of its differentiable outputs with the case's upstream weights."""
    loss = (out.nll * case.nll_upstream.to(out.nll)).sum()
    if out.kl is not None:
        loss = loss + (out.kl * case.kl_upstream.to(out.kl)).sum()
    for name, upstream in case.upstream.items():
        loss = loss + (getattr(out, name) * upstream.to(out.nll)).sum()
    return loss


def gradients(loss: Tensor, hidden: Tensor, head: fl.LMHead) -> dict[str, Tensor]:
    leaves = {"d_hidden": hidden, "d_weight": head.weight, "d_bias": head.bias}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    again = torch.autograd.grad(loss, list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "second backward"
    return dict(zip(leaves, first, strict=True))


def objective(name: str, case: Case, inputs, **options) -> dict[str, Tensor]:
    make_objective, reference_kind = OBJECTIVES[name]
    hidden, head, reference = inputs
    given = {} if reference_kind is None else {"reference": reference}
    if name.startswith("LAwF"):
        confidence = torch.linspace(-1, 1, len(case.labels)).clamp(min=0)
        given["confidence"] = confidence.masked_fill(case.labels == -100, 0).reshape(3, -1)
        given["reference"] = replace(reference, hidden=reference.hidden.reshape(3, -1, D))
    elif reference is not None:
        given["reference"] = replace(reference, hidden=reference.hidden.reshape(3, -1, D))
    if name.startswith("TopK"):
        ids = (torch.arange(len(case.labels))[:, None] + torch.tensor([0, 31, 60, 92])) % V  # on all ranks
        given["teacher_ids"] = ids.reshape(3, -1, 4)
        given["teacher_logprobs"] = torch.tensor([0.4, 0.2, 0.1, 0.05]).log().expand(ids.shape).reshape(3, -1, 4)
    loss = make_objective(**options)(hidden.reshape(3, -1, D), head, case.labels.reshape(3, -1), **given)
    return {"loss": loss.detach()} | gradients(2.5 * loss, hidden, head)


def objective_case(name: str, sizes: tuple[int, ...]) -> Case:
    reference = OBJECTIVES[name][1]
    if name.endswith("softcap"):
        return token_case("softcap", sizes)
    return token_case({None: "bias", "own": "own", "shared": "shared-bias-scale"}[reference], sizes)


def half_case(name: str) -> Case:
    case = make(64, D, V, **TOKEN_CASES[name])
    return with_more(case, beta=1.0 if name.endswith("reverse") else 0.3) if name.startswith("more") else case


def all_ignored() -> Case:
    case = make(6, D, V, bias=True, reference="shared")
    return replace(case, labels=torch.full_like(case.labels, -100))


def ties() -> Case:
    """Small whole numbers, so that sums are exact in any order; equal rows of the head on one rank and on several."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randint(-2, 3, (40, D), generator=g).double()
    weight = torch.randint(-2, 3, (V, D), generator=g).double()
    weight[[1, 50, 99, 100, 122]] = weight[7] = torch.full((D,), 2.0).double()
    hidden[:20] = hidden[:20].abs()
    labels = torch.randint(V, (40,), generator=g)
    return Case(hidden, weight, labels, nll_upstream=torch.randn(40, generator=g, dtype=torch.float64))


def collective_calls(case: Case, sizes: tuple[int, ...], function) -> list[tuple[str, int]]:
    """Each collective of forward and backward, with the numbers that a rank sends."""
    calls: list[tuple[str, int]] = []
    gather, reduce = dist.all_gather, dist.all_reduce

    def all_gather(tensors, tensor, **options):
        calls.append(("all_gather", tensor.numel()))
        return gather(tensors, tensor, **options)

    def all_reduce(tensor, **options):
        calls.append(("all_reduce", tensor.numel()))
        return reduce(tensor, **options)

    inputs = spread_inputs(case, torch.float32, sizes)
    with mock.patch.object(dist, "all_gather", all_gather), mock.patch.object(dist, "all_reduce", all_reduce):
        function(*inputs, case.labels).backward()
    return calls


COUNTED = {
    "summed": lambda x, head, y: lambda ref: fl.CrossEntropyLoss()(x, head, y),
    "summed-reference": lambda x, head, y: lambda ref: fl.ASFTLoss()(x, head, y, reference=ref),
    "per-token": lambda x, head, y: lambda ref: fl.token_losses(x, head, y).nll.sum(),
    "per-token-reference": lambda x, head, y: lambda ref: fl.token_losses(x, head, y, reference=ref).kl.sum(),
}


def counted(name: str):
    return lambda x, head, reference, y: COUNTED[name](x, head, y)(reference)


def messages(sizes: tuple[int, ...]) -> dict[str, str]:
    """Of what must raise, on every rank."""
    case = token_case("own", sizes)
    rank, group = dist.get_rank(), dist.group.WORLD
    hidden, head, reference = spread_inputs(case, torch.float32, sizes)
    whole = case.inputs(torch.float32)
    labels, clean = case.labels, head.weight.detach()
    others = dist.new_group([0])

    def call(head=head, labels=labels, hidden=hidden, **options):
        return fl.token_losses(hidden, head, labels, **options)

    def observed(loss, here, *given):
        with loss.observed(Observer(frozenset({"entropy"}))) if here else contextlib.nullcontext():
            return loss(*given)

    ids = torch.zeros(len(labels), 2, dtype=torch.int64)

    def moved(tensor):
        return tensor if rank else tensor.roll(1)

    attempts = {
        "labels": lambda: call(labels=moved(labels)),
        "tokens": lambda: call(labels=labels.masked_fill(torch.arange(33) < 3 * rank, -100)),
        "frozen": lambda: call(fl.LMHead(clean.clone().requires_grad_(rank == 0), process_group=group)),
        "reference missing": lambda: call(reference=None if rank else fl.Reference(hidden.detach())),
        "reference rows": lambda: call(
            reference=fl.Reference(hidden.detach(), fl.LMHead(torch.ones(20 + rank, D), process_group=group))
        ),
        "reference whole": lambda: call(reference=whole[2]),
        "only the reference spread": lambda: call(whole[1], reference=reference),
        "no rows": lambda: call(fl.LMHead(clean[:0], process_group=group)),
        "label too large": lambda: call(labels=torch.full_like(labels, V)),
        "class weights": lambda: fl.CrossEntropyLoss(class_weights=CLASSES[:-1])(hidden, head, labels),
        "class weights, soft-cap": lambda: fl.CrossEntropyLoss(0.1, class_weights=CLASSES[:-1])(
            hidden, replace(head, softcap=3.0), labels
        ),
        "backend": lambda: call(backend="reference"),
        "tolerance": lambda: call(gradient="sparse", tolerance=0.2 if rank else 0.1),
        "gradient": lambda: call(gradient="sparse" if rank else "exact"),
        "softcap": lambda: call(replace(head, softcap=3.0 + rank)),
        "logit scale of the reference": lambda: call(
            reference=replace(reference, head=replace(reference.head, logit_scale=1.0 + rank))
        ),
        "temperature": lambda: call(temperature=1.0 + rank),
        "beta": lambda: call(reference=reference, beta=0.2 + rank / 2),
        "no beta": lambda: call(reference=reference, beta=0.2 if rank else None),
        "entropy gradient": lambda: call(entropy_gradient=rank == 0),
        "wanted": lambda: call(wanted={"log_p2"} if rank else set()),
        "objective": lambda: (fl.DFTLoss() if rank else fl.CrossEntropyLoss())(hidden, head, labels),
        "option of the objective": lambda: fl.TALRLoss(temperature=1.0 + rank)(hidden, head, labels),
        "observer": lambda: observed(fl.CrossEntropyLoss(), rank == 0, hidden, head, labels),
        "no ids": lambda: call(ids=None if rank else ids),
        "ids": lambda: call(ids=ids + rank),
        "number of ids": lambda: call(ids=ids[:, rank:]),
        "member": lambda: fl.LMHead(clean, process_group=others) if rank else fl.LMHead(clean, process_group=3.0),
    }
    found = {}
    for name, attempt in attempts.items():
        with pytest.raises((ValueError, TypeError)) as error:
            attempt()
        found[name] = f"{type(error.value).__name__}: {error.value}"
    return found


def dtensors(world: int) -> dict:
    """Heads given as DTensors; one rank of four has no rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    v = 9 if world == 4 else 7
    case = make(12, D, v, bias=True, reference="shared")
    hidden, head, reference = case.inputs(torch.float64)

    def parameter(tensor, placement):
        return torch.nn.Parameter(distribute_tensor(tensor.detach(), mesh, [placement]))

    found = {}
    for placement in (Shard(0), Replicate()):
        weight, bias = parameter(head.weight, placement), parameter(head.bias, placement)
        x = hidden.detach().clone().requires_grad_()
        spread = fl.LMHead(weight, bias)
        with torch.no_grad():
            fl.token_losses(x, spread, case.labels)  # what is done here must not be kept for later
        out = fl.token_losses(x, spread, case.labels, reference=fl.Reference(reference.hidden, spread))
        ((out.nll * case.nll_upstream).sum() + (out.kl * case.kl_upstream).sum()).backward()
        assert isinstance(weight.grad, DTensor) and weight.grad.placements == (placement,)
        found[str(placement)] = {
            "nll": out.nll.detach(), "kl": out.kl.detach(), "d_hidden": x.grad, "d_weight": weight.grad.full_tensor(),
            "d_bias": bias.grad.full_tensor(),
        }  # fmt: skip
    found["tensor"] = fl.CrossEntropyLoss()(hidden, parameter(head.weight, Shard(0)), case.labels).detach()
    found["linear"] = torch.nn.Linear(D, v, dtype=torch.float64, device="meta")
    found["linear"].weight, found["linear"].bias = parameter(head.weight, Shard(0)), parameter(head.bias, Shard(0))
    found["linear"] = fl.CrossEntropyLoss()(hidden, found["linear"], case.labels).detach()
    square = torch.randn(8, 8)
    attempts = {
        "columns": lambda: fl.LMHead(parameter(square, Shard(1))),
        "two dimensions": lambda: fl.LMHead(
            distribute_tensor(square, init_device_mesh("cpu", (1, world)), [Replicate(), Shard(0)])
        ),
        "bias": lambda: fl.LMHead(parameter(square, Shard(0)), torch.ones(8)),
        "bias replicated": lambda: fl.LMHead(parameter(square, Shard(0)), parameter(torch.ones(8), Replicate())),
        "group too": lambda: fl.LMHead(parameter(square, Shard(0)), process_group=dist.group.WORLD),
        "hidden": lambda: fl.token_losses(parameter(hidden, Replicate()), weight, case.labels),
    }
    for name, attempt in attempts.items():
        with pytest.raises(TypeError) as error:
            attempt()
        found[name] = str(error.value)
    return found


def compiled(sizes: tuple[int, ...]) -> dict:
    """Under torch.compile: the same numbers; and what fullgraph=True says."""
    case = token_case("shared", sizes)
    results = []

    def step(hidden, head, labels, reference):
        return 2 * fl.LAwFLoss()(
            hidden.sin(), head, labels, confidence=(labels % 2).clamp(0, 1).float(), reference=reference
        )

    for function in (step, torch.compile(step, backend="aot_eager")):
        hidden, head, reference = spread_inputs(case, torch.float64, sizes)
        loss = function(hidden, head, case.labels, reference)
        loss.backward()
        results.append((loss.detach(), hidden.grad, head.weight.grad))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported) as error:
        torch.compile(step, backend="eager", fullgraph=True)(hidden, head, case.labels, reference)
    return {"eager": results[0], "compiled": results[1], "fullgraph": str(error.value)}


@contextlib.contextmanager
def small_chunks() -> Iterator[None]:
    """Three chunks of a case's tokens, and several blocks of rows in each."""
    with mock.patch.object(chunks, "CHUNK_BYTES", 1), mock.patch.dict(row_passes.BLOCK_NUMBERS, cpu=3 * V):
        yield


def work(rank: int, world: int, folder: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world, timeout=timedelta(seconds=600)
    )
    found: dict = {}
    for sizes in SIZES[world]:
        first = sizes == SIZES[world][0]
        with small_chunks():
            for name in TOKEN_CASES:
                for dtype in ("float64", "float32") if first else ("float64",):
                    case = token_case(name, sizes)
                    found["token", name, sizes, dtype] = token_losses(case, spread_inputs(case, DTYPES[dtype], sizes))
            for name in OBJECTIVES:
                case = objective_case(name, sizes)
                found["objective", name, sizes] = objective(name, case, spread_inputs(case, torch.float64, sizes))
            found["ties", sizes] = token_losses(ties(), spread_inputs(ties(), torch.float32, sizes))
        # Fewer chunks would do for the smaller shares.
        case = token_case("own", sizes)
        with mock.patch.object(chunks, "CHUNK_BYTES", 2 * 4 * max(sizes) * 17):
            found["chunks", sizes] = token_losses(case, spread_inputs(case, torch.float32, sizes))
        found["ignored", sizes] = token_losses(all_ignored(), spread_inputs(all_ignored(), torch.float32, sizes))
    sizes = SIZES[world][0]
    for name in TOKEN_CASES:
        for dtype in ("bfloat16", "float16"):
            case = half_case(name)
            found["half", name, dtype] = token_losses(case, spread_inputs(case, DTYPES[dtype], sizes))
    large = (4096 - 1000 * (world - 1),) + (1000,) * (world - 1)
    for reference in ("shared", "own"):
        case = near_the_reference(reference)
        for dtype in ("bfloat16", "float32"):
            found["near", reference, dtype] = token_losses(case, spread_inputs(case, DTYPES[dtype], large))
    found["offset"] = token_losses(
        large_offset(), spread_inputs(large_offset(), torch.float32, (3, 3) if world == 2 else (2, 1, 1, 2))
    )
    found["certain"] = token_losses(certain(), spread_inputs(certain(), torch.float32, (1, 1, 0, 0)[:world]))
    found["masked teacher"] = masked_teacher((100, 23, 0, 0)[:world])
    case = certain_of_both()
    for backend in ("cpu", "torch"):
        inputs = spread_inputs(case, torch.float32, (120, 80, 0, 0)[:world])
        found["certain of both", backend] = token_losses(case, inputs, backend=backend)
    if world == 2:
        for name in COUNTED:
            for frozen in (False, True):
                case = make(33, D, V, reference="shared", ignored=0, frozen=frozen)
                with small_chunks():
                    found["calls", name, frozen] = collective_calls(case, sizes, counted(name))
        found["messages"] = messages(sizes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler hides one of its own, which "error" would not let it
            found["compiled"] = compiled(sizes)
    else:
        found["dtensors"] = dtensors(world)
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


def certain() -> Case:
    """nll of 1e-3 to 1e-7, and all that is left of the probability on another rank."""
    nll = torch.tensor([1e-3, 1e-5, 1e-7], dtype=torch.float64)
    hidden = -torch.log(torch.expm1(nll))[:, None]
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    return Case(hidden, weight, torch.zeros(3, dtype=torch.int64), nll_upstream=1 / nll)


def certain_of_both() -> Case:
    """Of the KL alone; p − p_ref of the label is far below a rounding of the two models' normalisers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hidden, reference, weight, labels = nearly_certain(20, 0.01, 0.9)
    ones = torch.ones(len(labels), dtype=torch.float64)
    return Case(
        hidden.double(), weight.double(), labels, reference_hidden=reference.double(), nll_upstream=0 * ones,
        kl_upstream=ones,
    )  # fmt: skip


def masked_teacher(sizes: tuple[int, ...] | None, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A JSD to a reference with the smaller vocabulary: ids of one rank and of both are ruled out. `sizes` None: of one
    process."""
    case, bias = make(33, D, V, reference="own"), torch.zeros(V).to(dtype)
    bias[[3, *range(90, V)]] = -torch.inf
    hidden, head, reference = case.inputs(dtype) if sizes is None else spread_inputs(case, dtype, sizes)
    options = {} if sizes is None else {"process_group": dist.group.WORLD}
    mine = bias if sizes is None else bias[rows(sizes, dist.get_rank())].clone()
    reference = fl.Reference(reference.hidden, fl.LMHead(reference.head.weight, mine, **options))
    out = fl.token_losses(hidden, head, case.labels, reference=reference, beta=0.3)
    return {"divergence": out.divergence.detach()} | gradients(out.divergence.sum(), hidden, head)


def large_offset() -> Case:
    """Every logit is 16,384 and more, and exact in float32; the likeliest tokens lie on different ranks."""
    base = torch.tensor([5.0, 0.0, 1.0, 4.5, 2.0, 3.0], dtype=torch.float64)
    weight = torch.stack([torch.full_like(base, 16384.0), base], 1)
    one = torch.ones(1, dtype=torch.float64)
    return Case(torch.ones(1, 2).double(), weight, torch.tensor([3]), nll_upstream=one, reference_hidden=None)


class Ranks:
    """What the ranks saved, put together as one process has it."""

    def __init__(self, world: int, found: list[dict]) -> None:
        self.world, self.found = world, found

    def __getitem__(self, key) -> dict[str, Tensor]:
        parts = [found[key] for found in self.found]
        whole = {}
        for name in parts[0]:
            values = [part[name] for part in parts]
            if name in ("d_weight", "d_bias"):
                whole[name] = torch.cat(values)
            else:
                assert all(torch.equal(values[0], v) for v in values), f"{name} differs between ranks"
                whole[name] = values[0]
        return {name: value.double() for name, value in whole.items()}


def start(world: int, folder: str) -> Ranks:
    """By a server that has imported this file once, for all ranks of both worlds."""
    multiprocessing.set_forkserver_preload([__name__, "torch._dynamo"])
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=pythonpath()):
        torch.multiprocessing.start_processes(work, (world, folder), nprocs=world, start_method="forkserver")
    return Ranks(world, [torch.load(f"{folder}/{rank}.pt") for rank in range(world)])
