"""LoRA on the head: values and all gradients against plain float64 operations, in every mode."""

from __future__ import annotations

import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch
from cases import HEADS, coarse, name, relative
from low_rank_cases import D, N, R, V, errors, ids_of, inputs, ours, truth
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_losses as fl
from fused_losses import backends
from fused_losses import reference as oracle
from fused_losses.backends import chunks, row_passes
from fused_losses.sparse import spectrum

# Adapter off, also where that is said with a head; a copy of the adapter; another on W; the model's own B; another
# model.
REFERENCES = [None, "off", "off, own LMHead", "copy", "another rank", "same b", "other model"]
# The forms in turn, so that each meets every head and every reference.
GRID = [
    (("a", "rows")[i % 2], *case)
    for i, case in enumerate(itertools.product([True, False], [HEADS[0], HEADS[4]], REFERENCES))
]
KERNELS = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason=str(backends.unavailable("cpu")))
ADAPTERS = pytest.mark.parametrize(
    "adapter", [torch.bfloat16, torch.float32], ids=["bfloat16-adapter", "float32-adapter"]
)
BACKENDS = [
    pytest.param("torch", torch.float64, 3e-15, id="float64"),
    pytest.param("auto", torch.float32, 1e-6, id="float32"),
]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    monkeypatch.setitem(row_passes.BLOCK_NUMBERS, "cpu", 3 * V)


@pytest.mark.pairwise
@pytest.mark.parametrize("form, frozen, head, reference", GRID, ids=name)
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
@pytest.mark.parametrize("backend, dtype, tolerance", BACKENDS)
def test_equals_plain_float64(form, frozen, head, reference, gradient, backend, dtype, tolerance, small_chunks):
    """Sparse: with nothing left out. Measured: 1.1e-15 and 3.4e-7."""
    given = inputs(form, reference, frozen, **head)
    with coarse(1e-30, capacity=V, chunk_bytes=1):
        for output, error in errors(given, dtype, backend, gradient=gradient).items():
            assert error <= tolerance, output


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
@pytest.mark.parametrize("train", ["a and hidden", "a", "hidden", "b"])
def test_some_of_it_frozen(reference, gradient, train, small_chunks):
    """Where neither W nor B is trained, forward keeps the rows of hidden's gradient."""
    given = inputs("a", reference)
    for key, leaf in given.leaves.items():
        leaf.requires_grad_(key in train.split(" and "))
    with coarse(1e-30, capacity=V, chunk_bytes=1):
        for output, error in errors(given, torch.float64, gradient=gradient).items():
            assert error <= 3e-15, output


@pytest.mark.parametrize("reference", ["off", "copy"])
@pytest.mark.parametrize("frozen", [True, False], ids=name)
def test_gradcheck(reference, frozen):
    given = inputs("a", reference, True, bias=True, scale=0.7, softcap=3.0, shape=(6, 4, 11), rank=2)
    leaves = list(given.leaves.values())

    def outputs(*tensors):
        changed = replace(given, leaves=dict(zip(given.leaves, tensors, strict=True)))
        hidden, head, labels, reference = changed.arguments()
        if not frozen:  # a trainable W cannot be shared: finite differences would move the reference too
            reference = fl.Reference(reference.hidden, fl.LMHead(given.fixed["ref_weight"]))
        out = fl.token_losses(hidden, head, labels, reference=reference)
        return out.nll, out.kl

    for key in ("weight", "bias"):
        given.leaves[key].requires_grad_(not frozen)
    assert torch.autograd.gradcheck(outputs, leaves, eps=1e-6, atol=1e-7, rtol=1e-5)


def entries(n):
    """Of a teacher."""
    logprobs = torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64).log()
    return {"teacher_ids": torch.tensor([1, 7, 30]).expand(n, 3), "teacher_logprobs": logprobs.expand(n, 3)}


OBJECTIVES = {
    "CrossEntropy": (fl.CrossEntropyLoss, lambda z, r, y, c: oracle.cross_entropy(z, y)),
    "TALR": (fl.TALRLoss, lambda z, r, y, c: oracle.talr(z, y, oracle.talr_temperature(oracle.nll(z, y), y * 0))),
    "LAwF": (fl.LAwFLoss, lambda z, r, y, c: oracle.lawf(z, r, y, c)),
    "DFT": (fl.DFTLoss, lambda z, r, y, c: oracle.dft(z, y)),
    "ASFT": (fl.ASFTLoss, lambda z, r, y, c: oracle.asft(z, r, y)),
    "EAFT": (fl.EAFTLoss, lambda z, r, y, c: oracle.eaft(z, y)),
    "JSD": (
        lambda **o: fl.JSDLoss(0.3, 2.0, 0.5, **o),
        lambda z, r, y, c: oracle.jsd(z, r, y, 0.3, 2.0, 0.5),
    ),
    "TopK": (
        lambda **o: fl.TopKDistillationLoss("jsd", rest="bucket", **o),
        lambda z, r, y, c: oracle.topk_distillation(z, y, *entries(len(y)).values(), "jsd", rest="bucket"),
    ),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("reference", ["off", "copy"])
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_objectives(objective, reference, gradient, small_chunks):
    """Backward twice, the second time with another factor."""
    make_loss, formula = OBJECTIVES[objective]
    given = inputs("a", reference).cast(torch.float64)
    keep = given.labels != -100
    confidence = (given.labels % 3 == 0).double() * 0.7
    z, r = given.logits()
    truth = given.results(formula(z, r, given.labels[keep], confidence[keep]).sum() / keep.sum())
    mine = inputs("a", reference).cast(torch.float64)
    hidden, head, labels, ref = mine.arguments()
    more = {"confidence": confidence[None]} if objective == "LAwF" else {}
    if objective == "TopK":  # the same for all tokens, as those without a label are left out above
        more = {name: values[None] for name, values in entries(len(given.labels)).items()}
    if objective in ("LAwF", "ASFT", "JSD"):
        more["reference"] = fl.Reference(ref.hidden[None], _batched(ref.head))
    with coarse(1e-30, capacity=V, chunk_bytes=1):
        value = make_loss(gradient=gradient)(hidden[None], head, labels[None], **more)
        value.backward(retain_graph=True)
        once = {k: v.grad.clone() for k, v in mine.leaves.items() if v.requires_grad}
        (-3 * value).backward()
    for key, leaf in mine.leaves.items():
        if leaf.requires_grad:
            assert relative(once[key], truth[f"d_{key}"]) < 1e-10, key
            assert relative(leaf.grad, -2 * truth[f"d_{key}"]) < 1e-10, key


def _batched(head):
    if head is None:
        return None
    part = head.low_rank
    return replace(head, low_rank=fl.LowRank(part.b, part.a, None if part.rows is None else part.rows[None]))


class Weighted(fl.Objective):
    def token_loss(self, out, a, b):
        loss = a * (out.nll - 0.3 * out.lse + out.logits_at.sum(-1))
        return loss if out.kl is None else loss + b * out.kl

    def forward(self, hidden, head, labels, *, reference, ids, a, b):
        tokens = self.prepare(hidden, head, labels, reference, ids)
        return self.reduce(tokens, 1, a=tokens.select(a, "a"), b=tokens.select(b, "b"))


@pytest.mark.parametrize("reference", [None, "off", "copy"])
@pytest.mark.parametrize("frozen", [True, False], ids=name)
@pytest.mark.parametrize("summed", [True, False], ids=["summed", "per-token"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=KERNELS)])
def test_sparse_gradients_with_exact_tokens_among_them(reference, frozen, summed, backend):
    """A chunk of flat tokens, which forward gives exact gradients, a few flat ones among others, and sharp ones."""

    def given():
        made = inputs("a", reference, frozen, shape=(48, D, V), spread=30.0)
        with torch.no_grad():
            made.leaves["hidden"][:20] *= 0.01
            made.leaves["hidden"][30::7] *= 0.01
            made.fixed["ref_hidden"].copy_(made.leaves["hidden"] * 1.01)
            made.fixed["ref_rows"] *= 0.1
        return made.cast(torch.float32)

    expected, mine = truth(given()), given()
    with coarse(1e-9, capacity=60, chunk_bytes=16 * 4 * V):
        hidden, head, labels, ref = mine.arguments()
        if summed:
            loss = Weighted(gradient="sparse", backend=backend)
            a, b = (weights.float() for weights in mine.upstream)
            got = mine.results(loss(hidden, head, labels, reference=ref, ids=ids_of(mine), a=a, b=b))
            report = loss.gradient_report
        else:
            out = fl.token_losses(
                hidden, head, labels, reference=ref, ids=ids_of(mine), gradient="sparse", backend=backend
            )
            value = ((out.nll - 0.3 * out.lse + out.logits_at.sum(-1)) * mine.upstream[0]).sum()
            if ref is not None:
                value = value + (out.kl * mine.upstream[1]).sum()
            got, report = mine.results(value), out.gradient_report
    assert 0 < report.exact_tokens < report.tokens
    for key, gradient in got.items():
        assert relative(gradient, expected[key]) < 4.5e-6, key  # measured 1.5e-6


@pytest.mark.pairwise
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
@pytest.mark.parametrize("reference", [None, "off", "copy", "other model"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=KERNELS)])
@ADAPTERS
def test_bfloat16_error_is_not_above_that_of_plain_pytorch(gradient, reference, backend, adapter):
    """float32 beside bfloat16 is what PEFT makes of an adapter of a bfloat16 model."""
    given = inputs("a", reference, bias=True, shape=(96, 64, 1000), rank=8, spread=4.0)
    with coarse(1e-6, capacity=1000):
        found = errors(given, torch.bfloat16, backend, adapter, gradient=gradient)
    plain = errors(given, torch.bfloat16, "reference", adapter)
    for output in found:
        assert found[output] <= 1.1 * plain[output], (output, found[output], plain[output])


@pytest.mark.pairwise
@pytest.mark.parametrize("reference", ["off", "copy", "same b"])
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=KERNELS)])
@ADAPTERS
def test_kl_gradient_near_the_reference_survives_bfloat16(reference, gradient, backend, adapter):
    """KL about 0.003: p − p_ref cancels, and the logits of both models must share their rounding."""
    given = inputs("rows", reference, shape=(64, 256, 4096), rank=8, spread=4.5, near=0.012)
    with torch.no_grad():
        b, rows = given.leaves["b"], given.leaves["rows"]
        size = 0.03 if reference == "off" else 1.0
        b *= size / b.std() / 3
        given.fixed["ref_b"] = b + 0.02 * torch.randn(b.shape, dtype=torch.float64)
        given.fixed["ref_rows"] = rows + 0.02 * torch.randn(rows.shape, dtype=torch.float64)
        given.fixed = {
            k: torch.cat([v, v[:, :1]], 1) if k in ("ref_b", "ref_rows") else v for k, v in given.fixed.items()
        }
    given.upstream = (torch.zeros(64), torch.ones(64))
    with coarse(1e-5):
        found = errors(given, torch.bfloat16, backend, adapter, gradient=gradient)
    plain = errors(given, torch.bfloat16, "reference", adapter)
    for output in ("d_hidden", "d_b", "d_rows"):
        assert found[output] <= 0.005 and plain[output] > 0.5, output  # measured 0.0021 and 0.70
    assert found["kl"] <= 0.0015 and plain["kl"] > 0.5  # measured 6.6e-4, 1.4e-4 with a bfloat16 adapter, and 0.64


@pytest.mark.parametrize("reference", ["off", "off, own LMHead", "copy", "same b"])
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_the_difference_of_the_logits_is_taken_before_they_are_rounded(reference, gradient):
    """float32 and a KL of 1e-9: five times the error where two logits are subtracted."""
    given = inputs("rows", reference, spread=4.5, near=1e-6)
    with torch.no_grad():
        b, rows = given.leaves["b"], given.leaves["rows"]
        if "off" in reference:
            b *= 1e-5
        given.fixed["ref_b"][:, :-1] = b + 1e-5 * torch.randn(b.shape, dtype=torch.float64)
        given.fixed["ref_rows"][:, :-1] = rows + 1e-5 * torch.randn(rows.shape, dtype=torch.float64)
    given.fixed["ref_hidden"] = given.leaves["hidden"].detach() + 1e-6 * torch.randn(N, D, dtype=torch.float64)
    given.upstream = (torch.zeros(N), torch.ones(N))
    with coarse(1e-30, capacity=V):
        found = errors(given, torch.float32, gradient=gradient)
    assert found["kl"] <= 0.03  # measured 0.013; 0.07 to 0.14 otherwise


def test_autocast_computes_in_its_dtype_and_keeps_float32_gradients():
    given = inputs("a", "copy").cast(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(given)
    for key, expected in truth(given).items():
        assert got[key].dtype == torch.float32
        assert 1e-6 < relative(got[key], expected) < 0.012, key  # measured 0.0049


def compiled(hidden, head, labels, **asked):
    call = torch.compile(fl.token_losses, fullgraph=True, backend="aot_eager", dynamic=True)
    return call(hidden, head, labels, **asked)


IN_A_GRAPH = [pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")]


@pytest.mark.parametrize(
    "form, traced", [("a", False), ("rows", False), pytest.param("a", True, marks=IN_A_GRAPH, id="a-graph")]
)
def test_what_ignored_tokens_hold_reaches_no_gradient(form, traced):
    torch._dynamo.reset()
    given = inputs(form, "copy").cast(torch.float64)
    expected = truth(given)
    ignored = given.labels == -100
    assert ignored.any()
    mine = inputs(form, "copy").cast(torch.float64)
    with torch.no_grad():
        for tensor in (mine.leaves["hidden"], mine.leaves.get("rows"), *mine.fixed.values()):
            if tensor is not None and len(tensor) == N:
                tensor[ignored] = torch.nan
    hidden, head, labels, reference = mine.arguments()
    out = (compiled if traced else fl.token_losses)(hidden, head, labels, reference=reference, ids=ids_of(mine))
    single = out.nll - 0.3 * out.lse + out.logits_at.sum(-1)
    value = (single * mine.upstream[0] + out.kl * mine.upstream[1])[~ignored].sum()
    for key, gradient in mine.results(value).items():
        assert relative(gradient, expected[key]) < 1e-10, key


@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_all_ignored_gives_zero_and_zero_gradients(gradient):
    given = inputs("a", "copy").cast(torch.float32)
    given.labels = torch.full_like(given.labels, -100)
    hidden, head, labels, reference = given.arguments()
    out = fl.token_losses(hidden, head, labels, reference=reference, gradient=gradient)
    found = given.results(out.nll.sum() + out.kl.sum())
    assert not out.nll.any() and sorted(found) == ["d_a", "d_b", "d_hidden"]
    assert not any(g.any() for g in found.values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "form, reference, gradient",
    [("a", "off", "exact"), ("rows", None, "exact"), ("rows", "copy", "exact"), ("a", "other model", "exact"),
     ("a", "copy", "sparse"), ("rows", "other model", "sparse")],
)  # fmt: skip
def test_one_graph(form, reference, gradient):
    torch._dynamo.reset()

    def call(hidden, weight, b, other, labels, ref_hidden, ref_b, ref_rows, ref_weight, ref_a):
        part = fl.LowRank(b, other) if form == "a" else fl.LowRank(b, rows=other)
        own = None
        if reference == "copy":
            own = fl.LMHead(weight, low_rank=fl.LowRank(ref_b[:, :-1], rows=ref_rows[:, :-1]))
        elif reference == "other model":
            own = fl.LMHead(ref_weight, low_rank=fl.LowRank(ref_b, ref_a))
        ref = None if reference is None else fl.Reference(ref_hidden, own)
        out = fl.token_losses(hidden, fl.LMHead(weight, low_rank=part), labels, reference=ref, gradient=gradient)
        return out.nll if ref is None else out.nll - 0.5 * out.kl

    def results(function):
        given = inputs(form, reference).cast(torch.float64)
        fixed = [given.fixed[key] for key in ("ref_hidden", "ref_b", "ref_rows", "ref_weight", "ref_a")]
        value = function(*given.leaves.values(), given.labels, *fixed)
        return given.results((value * given.upstream[0]).sum(), value=value.detach())

    expected, got = results(call), results(torch.compile(call, fullgraph=True, backend="aot_eager"))
    for key in expected:
        assert relative(got[key], expected[key]) < 1e-12, key


def test_second_derivatives_of_the_reference_backend():
    given = inputs("a", "copy", False, bias=True, softcap=3.0, shape=(4, 3, 7), rank=2)

    def outputs(*tensors):
        changed = replace(given, leaves=dict(zip(given.leaves, tensors, strict=True)))
        hidden, head, labels, reference = changed.arguments()
        reference = fl.Reference(reference.hidden, fl.LMHead(given.fixed["ref_weight"]))
        out = fl.token_losses(hidden, head, labels, reference=reference, backend="reference")
        return out.nll, out.kl

    assert torch.autograd.gradgradcheck(outputs, list(given.leaves.values()))


class Shapes(TorchDispatchMode):
    """The shapes of what operations return, views and the caller's tensors left out."""

    def __init__(self, known):
        super().__init__()
        self.known, self.shapes = {t.untyped_storage().data_ptr() for t in known}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.shapes.add(tuple(tensor.shape))
        return out


@pytest.mark.parametrize("summed", [True, False], ids=["summed", "per-token"])
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=KERNELS)])
def test_neither_a_gradient_nor_a_copy_of_a_frozen_weight_is_made(summed, gradient, backend):
    def shapes(frozen):
        given = inputs("a", "copy", frozen).cast(torch.float32)
        hidden, head, labels, reference = given.arguments()
        blocks = mock.patch.object(spectrum, "BLOCK", 16 * D)
        with coarse(1e-30, capacity=V), blocks, Shapes(given.leaves.values()) as seen:
            if summed:
                loss = fl.ASFTLoss(gradient=gradient, backend=backend)
                loss(hidden, head, labels, reference=reference).backward()
            else:
                out = fl.token_losses(hidden, head, labels, reference=reference, gradient=gradient, backend=backend)
                (out.nll - out.kl).sum().backward()
        return seen.shapes

    large = {shape for width in (D, D + R, D + 2 * R) for shape in ((V, width), (width, V))}
    assert not large & shapes(frozen=True)
    assert (V, D) in shapes(frozen=False)


def test_u_is_computed_in_the_dtype_of_a():
    hidden, a = torch.randn(5, 4).bfloat16(), torch.randn(2, 4)
    part = fl.LowRank(torch.randn(7, 2), a)
    u = part.inputs(hidden)
    assert torch.equal(u, hidden.float() @ a.T)


WEIGHT, B, A = torch.randn(7, 4), torch.randn(7, 2), torch.randn(2, 4)


def head(*args, **options):
    return fl.LMHead(WEIGHT, low_rank=fl.LowRank(*args, **options))


def losses(rows, reference=None):
    return fl.token_losses(torch.randn(3, 4), head(B, rows=rows), torch.tensor([0, 6, -100]), reference=reference)


BAD = {
    "neither a nor rows": (lambda: head(B), ValueError, "low_rank: expected either a.*or rows.*got neither"),
    "a and rows": (lambda: head(B, A, torch.randn(3, 2)), ValueError, "low_rank: expected either.*got both"),
    "b: a module": (lambda: head(torch.nn.Linear(2, 7), A), TypeError,
        r"low_rank b.*tensor.*Linear; give its \.weight"),
    "b: r = 0": (lambda: head(B[:, :0], A[:0]), ValueError, r"low_rank b.*\[V, r\] with r ≥ 1.*\[7, 0\]"),
    "b: a vector": (lambda: head(B[:, 0], A), ValueError, r"low_rank b.*\[V, r\].*\[7\]"),
    "b: another vocabulary": (lambda: head(B[:6], A), ValueError, r"low_rank b.*\[7, r\].*\[6, 2\]"),
    "b: integers": (lambda: head(B.long(), A), TypeError, "low_rank b.*float64.*int64"),
    "b: on another device": (lambda: head(B.to("meta"), A.to("meta")), ValueError,
        "low_rank b is on meta, head weight on cpu"),
    "b: float64": (lambda: head(B.double(), A.double()), TypeError,
        "low_rank b is torch.float64, head weight torch.float32"),
    "a: transposed": (lambda: head(B, A.T), ValueError, r"low_rank a.*r = 2.*\[4, 2\].*transposed, give a\.T"),
    "a: another width": (lambda: head(B, A[:, :3]), ValueError, r"low_rank a.*\[r, 4\].*\[2, 3\]"),
    "a: on another device": (lambda: head(B, A.to("meta")), ValueError, "low_rank a is on meta, b on cpu"),
    "a: float64": (lambda: head(B, A.double()), TypeError, "low_rank a is torch.float64, b torch.float32"),
    "rows: another rank": (lambda: losses(torch.randn(3, 3)), ValueError, r"low_rank rows.*r = 2.*\[3, 3\]"),
    "rows: other tokens": (lambda: losses(torch.randn(2, 2)), ValueError,
        r"low_rank rows.*\[3\] as hidden.*\[2, 2\].*slice"),
    "rows of the reference: other tokens": (
        lambda: losses(torch.randn(3, 2), fl.Reference(torch.randn(3, 4), head(B, rows=torch.randn(2, 2)))),
        ValueError, r"reference low_rank rows.*\[3\] as hidden.*\[2, 2\]",
    ),
    "low_rank: a tensor": (lambda: fl.LMHead(WEIGHT, low_rank=B), TypeError,
        r"low_rank.*fused_losses\.LowRank.*Tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_argument_what_was_expected_and_what_came(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_repr():
    assert repr(head(B, A)).endswith("low_rank=LowRank(b=[7, 2] torch.float32, a=[2, 4] torch.float32))")
