"""Sparse-plus-rank-one gradients: exact where nothing is left out, and never further off than certified."""

from dataclasses import replace

import pytest
import torch
from cases import HEADS, REFERENCES, coarse, errors, make, name, relative, run
from sparse_checks import BACKENDS, check_flat_chunks, check_label_borders, check_room, needs_kernels

import fused_losses as fl
from fused_losses import reference as oracle
from fused_losses.kernels import schemas
from fused_losses.problem import Entries
from fused_losses.sparse import softmax

# The least; sizes that neither a chunk of 16 tokens nor a vector of 4 ids divides, D even as micro-kernels want it.
SHAPES = [(1, 1, 2), (33, 18, 123), (130, 66, 507)]


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
def test_with_nothing_left_out_it_is_exact(backend, shape, head, reference, frozen):
    """A threshold of nearly 0: values, and gradients through the sparse products, equal the oracle."""
    case = make(*shape, **head, reference=reference, frozen=frozen)
    with coarse(1e-30, capacity=507, chunk_bytes=1):
        for output, error in errors(case, torch.float32, backend, gradient="sparse").items():
            assert error <= 1e-5, output


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
def test_with_no_room_for_error_every_token_is_exact(backend, head, reference, frozen):
    case = make(40, 18, 300, **head, reference=reference, frozen=frozen, ignored=0)
    with coarse(0.5, chunk_bytes=1):
        results = errors(case, torch.float32, backend, gradient="sparse", tolerance=1e-9)
        for output, error in results.items():
            assert error <= 1e-5, output


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
def test_a_token_of_as_many_entries_as_there_is_room_for_is_sparse(backend, reference):
    check_room(backend, reference)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unlikely_labels_at_the_borders_of_words(backend):
    check_label_borders(backend)


def test_float64_has_sparse_gradients_too():
    case = make(40, 18, 300, reference="own", bias=True)
    with coarse(1e-30):
        assert (
            max(errors(case, torch.float64, "cpu" if schemas.load() is None else "torch", gradient="sparse").values())
            < 1e-10
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("summed", [False, True], ids=["per-token", "summed"])
def test_flat_chunks_between_peaked_ones(backend, reference, frozen, summed):
    check_flat_chunks(backend, (64, 40, 600), 64, reference, frozen, summed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_logit_reaches_the_gradient_of_its_token_only(backend):
    case = make(20, 6, 300, ignored=0)
    hidden, head, _ = case.inputs(torch.float32)
    with torch.no_grad():
        hidden[7] = torch.inf
    out = fl.token_losses(hidden, head, case.labels, gradient="sparse", backend=backend)
    out.nll.sum().backward()
    bad = ~out.nll.isfinite()
    assert bad.nonzero().flatten().tolist() == [7]
    assert not hidden.grad[7].isfinite().all() and hidden.grad[~bad].isfinite().all()
    assert not head.weight.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_with_strides(backend):
    case = make(60, 12, 300, reference="own", ignored=0)
    truth = run(case, torch.float64, "reference")
    every_second = torch.stack([case.labels, torch.zeros_like(case.labels)], 1).flatten()[::2]
    hidden, head, ref = case.inputs(torch.float32)
    hidden = hidden.detach().T.contiguous().T.requires_grad_()
    weight = head.weight.detach().T.contiguous().T.requires_grad_()
    reference = fl.Reference(ref.hidden.T.contiguous().T, ref.head.weight.T.contiguous().T)
    with coarse(1e-30):
        out = fl.token_losses(hidden, weight, every_second, reference=reference, gradient="sparse", backend=backend)
    ((out.nll * case.nll_upstream.float()) + out.kl * case.kl_upstream.float()).sum().backward()
    assert not every_second.is_contiguous()
    assert relative(hidden.grad, truth["d_hidden"]) < 1e-5 and relative(weight.grad, truth["d_weight"]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ignored(backend):
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = fl.CrossEntropyLoss(gradient="sparse", backend=backend)(hidden, weight, torch.full((3,), -100))
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients_of_zero(backend):
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    out = fl.token_losses(hidden, weight, torch.arange(3), gradient="sparse", backend=backend)
    (0 * out.nll).sum().backward()
    assert (hidden.grad == 0).all() and (weight.grad == 0).all() and out.gradient_report.bound == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_are_the_same_from_run_to_run_and_for_any_number_of_threads(backend, dtype):
    case = make(130, 66, 507, reference="own", bias=True, spread=6.0).rounded(dtype)
    results = []
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            with coarse(1e-3):
                results.append(run(case, dtype, backend, gradient="sparse", tolerance=0.5))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    if backend == "cpu" and dtype != torch.float16:  # torch's own products differ with the number of threads
        assert all(torch.equal(results[0][k], results[2][k]) for k in ("nll", "kl", "d_hidden", "d_weight"))


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_nearer_the_truth_than_plain_pytorch(backend, reference, frozen, dtype):
    """With entries as fine as the default's on a real vocabulary. ε as for exact mode."""
    case = make(64, 96, 1000, reference=reference, frozen=frozen, spread=4.0)
    with coarse(1e-6):
        ours, plain = errors(case, dtype, backend, gradient="sparse"), errors(case, dtype, "reference")
    for output in ours:
        assert ours[output] <= plain[output] * 1.02, (output, ours[output], plain[output])


@needs_kernels
def test_compiled_bf16_logits_are_not_rounded():
    """PyTorch's bf16 product on a CPU rounds them, which is most of the error of plain bf16."""
    case = make(64, 96, 1000, spread=4.0)
    for gradient in ("exact", "sparse"):
        with coarse(1e-6):
            ours, plain = (
                errors(case, torch.bfloat16, b, **o) for b, o in (("cpu", {"gradient": gradient}), ("reference", {}))
            )
        assert ours["nll"] < plain["nll"] / 1000  # measured: 1e-7 and 1e-3
        assert ours["d_hidden"] < plain["d_hidden"]


def test_backward_twice_and_after_the_graph_was_kept():
    for loss in (fl.CrossEntropyLoss(gradient="sparse"), fl.TALRLoss(gradient="sparse")):
        case = make(48, 8, 300)
        hidden, head, _ = case.inputs(torch.float32)
        value = loss(hidden[None], head, case.labels[None])
        first = torch.autograd.grad(value, (hidden, head.weight), retain_graph=True)
        kept = [g.clone() for g in first]
        for g in first:
            g.zero_()
        assert all(
            torch.equal(a, b) for a, b in zip(torch.autograd.grad(value, (hidden, head.weight)), kept, strict=True)
        )


def test_changing_the_weight_between_forward_and_backward_is_noticed():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = fl.CrossEntropyLoss(gradient="sparse")(hidden, weight, torch.arange(3))
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("tolerance", [0, 1, -0.1, float("nan"), "0.1", None, True])
def test_bad_tolerance(tolerance):
    with pytest.raises(ValueError, match="tolerance: expected a number above 0 and below 1"):
        fl.CrossEntropyLoss(tolerance=tolerance)
    with pytest.raises(ValueError, match="gradient='exact'"):
        fl.token_losses(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1]), tolerance=tolerance)


def test_sparse_gradients_of_the_reference_backend_are_refused():
    with pytest.raises(ValueError, match="backend='reference'"):
        fl.CrossEntropyLoss(gradient="sparse", backend="reference")


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=name)
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_default_dtype_is_of_no_consequence(backend, gradient, default):
    """Kernels write float32 whatever torch.set_default_dtype says."""
    case = make(40, 18, 300, reference="shared", ignored=0, bias=True)
    plain = run(case, torch.float32, backend, gradient=gradient)
    torch.set_default_dtype(default)
    schemas.has_logits.cache_clear()
    try:
        assert schemas.has_logits(torch.float32) == (schemas.load() is None)
        other = run(case, torch.float32, backend, gradient=gradient)
    finally:
        torch.set_default_dtype(torch.float32)
        schemas.has_logits.cache_clear()
    assert all(torch.equal(plain[k], other[k]) for k in plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cap", [5.0, 30.0])
def test_saturated_soft_cap(backend, cap):
    """1 − (z/softcap)² rounds to less than 0 there; as nothing moves such logits, the gradient is 0."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(500, 16, generator=g)
    for scale in (1e2, 1e4, 1e8):
        hidden = (scale * torch.randn(4, 16, generator=g)).requires_grad_()
        loss = fl.CrossEntropyLoss(gradient="sparse", backend=backend)
        loss(hidden, fl.LMHead(weight, softcap=cap), torch.arange(4)).backward()
        assert hidden.grad.isfinite().all() and loss.gradient_report.bound <= 0.15
        assert scale < 1e8 or not hidden.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_weights_of_a_loss_with_heavy_tokens(backend):
    case = make(64, 16, 600, ignored=0, spread=6.0)
    case.hidden[:8] *= 0.001

    class Weighted(fl.Objective):
        def token_loss(self, out, w):
            return w * out.nll

    grads = []
    for dtype in (torch.float32, torch.float64):
        hidden, head, _ = case.inputs(torch.float32)
        loss = Weighted(gradient="sparse", tolerance=0.013, backend=backend)
        with coarse(2e-3, capacity=300, tolerance=0.013):
            loss(hidden, head, case.labels, w=torch.linspace(0, 1, 64).to(dtype)).backward()
        assert 0 < loss.gradient_report.exact_tokens < 32
        grads.append((hidden.grad, head.weight.grad))
    for single, double in zip(*grads, strict=True):
        assert torch.equal(double, single)


@needs_kernels
@pytest.mark.parametrize("distance", [0.003, 0.1, 1.5])
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_values_in_bf16_near_and_far_from_the_reference(gradient, distance):
    """x − x_ref has digits that bf16 has not; the logits must not lose them."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 64, generator=g).bfloat16()
    ref = (x.float() + distance * torch.randn(60, 64, generator=g)).bfloat16()
    weight = (0.6 * torch.randn(900, 64, generator=g)).bfloat16()
    labels = (x.float() @ weight.float().T).argmax(1)
    hidden = x.clone().requires_grad_()
    out = fl.token_losses(hidden, weight, labels, reference=fl.Reference(ref), gradient=gradient, backend="cpu")
    z, z_ref = x.double() @ weight.double().T, ref.double() @ weight.double().T
    assert (out.nll - oracle.nll(z, labels)).abs().max() < 4.5e-6  # measured 1.5e-6
    assert relative(out.kl, oracle.kl(z_ref, z)) < (
        1.5e-4 if distance < 0.1 else 5e-6
    )  # measured 5e-5 at a KL of 1e-4, 1.7e-6


def test_threads_do_not_change_results():
    """Also of more than 32,768 ids, where PyTorch adds in parallel."""
    case = make(20, 8, 40_000, spread=5.0, ignored=0)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(case, torch.float32, gradient="sparse"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in results), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", [16, 17, 300])
def test_tokens_that_are_certain(backend, vocabulary):
    """p[label] is 1 in float32: nothing but the label is kept, and nothing needs exact gradients.

    Logits below −1e30 too.
    """
    weight = torch.zeros(vocabulary, 2)
    weight[:, 0], weight[5, 0] = -torch.arange(vocabulary), 200.0
    hidden = torch.ones(6, 2).requires_grad_()
    labels = torch.full((6,), 5)
    out = fl.token_losses(hidden, weight, labels, gradient="sparse", backend=backend)
    out.nll.sum().backward()
    assert (out.nll == 0).all() and (hidden.grad == 0).all()
    assert out.gradient_report.entries == 6 and out.gradient_report.exact_tokens <= 1
    far = torch.full((vocabulary, 1), -3.0).scatter_(0, torch.tensor([[7]]), -2.0)
    out = fl.token_losses(torch.full((1, 1), 1e30), far, torch.tensor([7]), backend=backend)
    assert out.nll == 0 and out.prediction == 7


@pytest.mark.parametrize("vocabulary", [1, 65536, 65537, 262144])
def test_columns_of_two_bytes(vocabulary):
    """They come back as they were, of empty rows and of columns next to a multiple of 65,536 too."""
    g = torch.Generator().manual_seed(0)
    edges = [c for c in (0, 65535, 65536, 131071, 131072, vocabulary - 1) if c < vocabulary]
    rows = [
        torch.cat([torch.randint(vocabulary, (n,), generator=g), torch.tensor(edges[: n % 7], dtype=torch.int64)])
        .unique().int()
        for n in (0, 40, 1, 0, 13, 6, 0)
    ]  # fmt: skip
    columns = torch.cat(rows)
    offsets = torch.tensor([0, *[len(row) for row in rows]]).cumsum(0)
    low, blocks = softmax.narrow(columns, offsets, vocabulary)
    assert low.element_size() == 2 and (blocks is None) == (vocabulary <= 65536)
    assert torch.equal(softmax.wide(low, blocks), columns)


@pytest.mark.parametrize("summed", [False, True], ids=["per-token", "summed"])
def test_gradients_of_a_vocabulary_that_two_bytes_do_not_hold(summed):
    """Labels and likely ids on both sides of 65,536."""
    case = make(40, 16, 70000, ignored=0, spread=6.0)
    case.labels[:20] = torch.arange(69000, 69020)
    case.weight[69000:69020] += 0.5 * case.hidden[:20]
    ones = torch.ones(40, dtype=torch.float64)
    truth = run(replace(case, nll_upstream=ones), torch.float64, "reference")
    hidden, head, _ = case.inputs(torch.float32)
    if summed:
        loss = fl.CrossEntropyLoss(gradient="sparse")
        (40 * loss(hidden, head, case.labels)).backward()
        report = loss.gradient_report
    else:
        out = fl.token_losses(hidden, head, case.labels, gradient="sparse")
        out.nll.sum().backward()
        report = out.gradient_report
    assert report.mode == "sparse" and report.exact_tokens < 10 and report.entries > 1000
    assert relative(hidden.grad.double(), truth["d_hidden"]) < 0.05
    assert relative(head.weight.grad.double(), truth["d_weight"]) < 0.05


def test_a_chunk_that_is_done_leaves_no_entries_in_memory():
    """Nor parts of length 0, which would hold the whole."""
    builder = object.__new__(softmax.Builder)
    builder.chunks, builder.done = [], []
    zeros = torch.zeros(2)
    builder.add(Entries(torch.tensor([2]), torch.arange(2).int(), zeros, zeros, tails=None), done=True)
    (entries,) = builder.chunks
    kept = (entries.columns, entries.nll_values, entries.kl_values)
    assert [part.untyped_storage().nbytes() for part in kept] == [0, 0, 0]
    assert entries.counts.tolist() == [0] and builder.done[0].tolist() == [True]
