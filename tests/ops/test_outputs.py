"""Outputs that are asked for, against full logits: lse, logits_at, divergence, rank, log_p2, the entropy's gradient."""

from dataclasses import replace

import pytest
import torch
from cases import HEADS, REFERENCES, coarse, errors, make, name, relative, run, run_with_report, with_more

import fused_losses as fl
from fused_losses import backends, preparation
from fused_losses import reference as oracle
from fused_losses.backends import chunks, row_passes
from fused_losses.problem import Head
from fused_losses.sparse.certificate import L1_SHARE
from fused_losses.validation import Options

BACKENDS = [
    "torch",
    pytest.param("cpu", marks=pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="no kernels")),
]
# One token of fewer ids than any tile; odd sizes that no chunk or vector divides; a tail of one in every tile.
SHAPES = [(1, 3, 5), (33, 17, 123), (129, 65, 507)]
BETAS = [0.0, 0.3, 1.0]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    monkeypatch.setitem(row_passes.BLOCK_NUMBERS, "cpu", 3 * 123)


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_equals_the_oracle(shape, head, reference, frozen, beta, backend, dtype, tolerance, small_chunks):
    case = with_more(make(*shape, **head, reference=reference, frozen=frozen), beta=beta)
    for output, error in errors(case, dtype, backend).items():
        assert error <= tolerance, output


@pytest.mark.pairwise
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_errors_are_not_above_those_of_plain_pytorch(head, reference, frozen, beta, dtype):
    case = with_more(make(129, 65, 507, **head, reference=reference, frozen=frozen, spread=4.0), beta=beta)
    ours, plain = errors(case, dtype), errors(case, dtype, "reference")
    for output in ours:
        assert ours[output] <= plain[output] * 1.02, (output, ours[output], plain[output])


@pytest.mark.pairwise
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("reference", [None, "shared", "own"], ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tolerance", [0.1, 0.013])
def test_sparse_gradients_with_single_logits_are_within_their_certificate(head, reference, frozen, backend, tolerance):
    """lse and logits_at: the error of the logits' gradient is at most what the report says."""
    n, v = 40, 300
    case = with_more(
        make(n, 8, v, **head, reference=reference, frozen=frozen, spread=4.0, ignored=0), beta=None, entropy=False
    )
    with coarse(1e-3, tolerance=tolerance):
        found, report = run_with_report(case, torch.float64, backend, "sparse", tolerance=tolerance)
    truth = run(case, torch.float64, "reference")
    assert report.mode == "sparse" and report.bound <= L1_SHARE * tolerance
    for output in ("nll", "lse", "logits_at", "rank", "log_p2"):
        assert relative(found[output], truth[output]) < 1e-10
    # W the identity: the gradient of the hidden states is that of the logits.
    square = replace(case, hidden=case.hidden @ case.weight.T, weight=torch.eye(v, dtype=torch.float64))
    if case.reference_hidden is not None:
        own = case.weight if case.reference_weight is None else case.reference_weight
        square = replace(square, reference_hidden=case.reference_hidden @ own.T, reference_weight=None)
        if reference == "own":
            square = replace(square, reference_weight=torch.eye(v, dtype=torch.float64))
    with coarse(1e-3, tolerance=tolerance):
        found, report = run_with_report(square, torch.float64, backend, "sparse", tolerance=tolerance)
    exact = run(square, torch.float64, "reference")["d_hidden"]
    error = (found["d_hidden"] - exact).abs().sum() / found["d_hidden"].abs().sum()
    assert error <= report.bound * (1 + report.bound) + 1e-9, (error, report.bound)
    assert report.bound <= L1_SHARE * tolerance and (report.exact_tokens or report.bound > 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("upstream", ["lse", "logits_at"])
def test_one_output_alone_has_a_gradient(backend, upstream):
    case = with_more(make(20, 8, 60), beta=None, entropy=False)
    for frozen in (False, True):
        for gradient in ("exact", "sparse"):
            one = replace(
                case, frozen=frozen, nll_upstream=torch.zeros(20), upstream={upstream: case.upstream[upstream]}
            )
            found, truth = run(one, torch.float64, backend, gradient), run(one, torch.float64, "reference")
            assert relative(found["d_hidden"], truth["d_hidden"]) < (1e-12 if gradient == "exact" else 0.2)


def test_single_logits_that_cancel_against_entries_are_certified():
    """p − q with q near p: a bound relative to the norm of p alone would be far too low."""
    n, v = 30, 200
    case = make(n, v, v, ignored=0, spread=4.0)
    case = replace(case, hidden=4 * torch.randn(n, v, dtype=torch.float64), weight=torch.eye(v, dtype=torch.float64))
    p = case.hidden.softmax(1)
    q, ids = (p * 1.01).topk(16, dim=1)
    case = replace(
        case, asked={"ids": ids}, upstream={"lse": torch.ones(n), "logits_at": -q}, nll_upstream=torch.zeros(n)
    )
    with coarse(2e-3):
        found, report = run_with_report(case, torch.float64, "torch", "sparse")
    exact = run(case, torch.float64, "reference")["d_hidden"]
    error = (found["d_hidden"] - exact).abs().sum() / exact.abs().sum()
    assert error <= report.bound * 1.2 + 1e-9 and report.bound <= 0.15


def test_gradcheck():
    case = with_more(make(6, 4, 11, bias=True, scale=0.7, softcap=3.0, reference="own"), k=3, beta=0.4)
    hidden, head, ref = case.inputs(torch.float64)

    def outputs(hidden, weight, bias):
        out = fl.token_losses(
            hidden, fl.LMHead(weight, bias, head.logit_scale, head.softcap), case.labels, reference=ref, **case.asked
        )
        return out.nll, out.kl, out.lse, out.logits_at, out.entropy, out.divergence

    assert torch.autograd.gradcheck(outputs, (hidden, head.weight, head.bias), eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_temperature_divides_the_logits_of_both_models(backend):
    case = with_more(make(20, 8, 60, bias=True, scale=0.8, softcap=5.0, reference="own"))
    hidden, head, ref = case.inputs(torch.float64)
    out = fl.token_losses(hidden, head, case.labels, reference=ref, temperature=2.5, backend=backend, **case.asked)
    valid = case.labels >= 0
    z = oracle.logits(hidden, head)[valid] / 2.5
    z_ref = oracle.logits(ref.hidden, fl.LMHead(ref.head.weight))[valid] / 2.5
    expected = {
        "nll": oracle.nll(z, case.labels[valid]), "lse": z.logsumexp(1), "kl": oracle.kl(z_ref, z),
        "entropy": oracle.entropy(z), "divergence": oracle.divergence(z_ref, z, 0.3), "log_p2": oracle.log_p2(z),
        "logits_at": oracle.logits_at(z, case.asked["ids"][valid].masked_fill(case.asked["ids"][valid] < 0, -1)),
    }  # fmt: skip
    for output, value in expected.items():
        torch.testing.assert_close(getattr(out, output)[valid], value, rtol=1e-10, atol=1e-12)


def test_beta_is_that_of_trl():
    """0: KL(p_ref ‖ p), which is kl; 1: KL(p ‖ p_ref)."""
    case = make(20, 8, 60, reference="own", ignored=0)
    hidden, head, ref = case.inputs(torch.float64)
    z, z_ref = hidden @ head.weight.T, ref.hidden @ ref.head.weight.T
    log_p, log_r = z.log_softmax(1), z_ref.log_softmax(1)

    def divergence(beta):
        return fl.token_losses(hidden, head, case.labels, reference=ref, beta=beta).divergence

    forward, backward = (log_r.exp() * (log_r - log_p)).sum(1), (log_p.exp() * (log_p - log_r)).sum(1)
    torch.testing.assert_close(divergence(0), forward, rtol=1e-10, atol=0)
    torch.testing.assert_close(divergence(1), backward, rtol=1e-10, atol=0)
    log_m = torch.log(0.25 * log_r.exp() + 0.75 * log_p.exp())
    mixed = 0.25 * (log_r.exp() * (log_r - log_m)).sum(1) + 0.75 * (log_p.exp() * (log_p - log_m)).sum(1)
    torch.testing.assert_close(divergence(0.25), mixed, rtol=1e-10, atol=0)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_divergence_near_the_reference_keeps_its_digits(beta):
    """p − p_ref cancels; a plain float32 difference of logarithms has a relative error of 1e-2 and more there."""
    case = make(64, 32, 500, reference="shared", near=1e-3, ignored=0)
    hidden, head, ref = case.inputs(torch.float32)
    out = fl.token_losses(hidden, head, case.labels, reference=ref, beta=beta)
    out.divergence.sum().backward()
    truth_hidden, truth_head, truth_ref = case.rounded(torch.float32).inputs(torch.float64)
    z, z_ref = (oracle.logits(h, truth_head) for h in (truth_hidden, truth_ref.hidden.detach()))
    truth = oracle.divergence(z_ref.detach(), z, beta)
    truth.sum().backward()
    assert relative(out.divergence.detach(), truth.detach()) < 2e-4
    assert relative(hidden.grad, truth_hidden.grad) < 2e-4


def test_divergence_far_from_the_reference_is_finite():
    hidden = torch.tensor([[200.0], [-150.0], [0.0]], requires_grad=True)
    weight, ref = torch.tensor([[1.0], [0.0], [-1.0]]), torch.tensor([[-100.0], [-160.0], [30.0]])
    for beta in (0.2, 0.5, 1.0):
        out = fl.token_losses(hidden, weight, torch.tensor([0, 1, 2]), reference=fl.Reference(ref), beta=beta)
        z, z_ref = hidden.detach().double() @ weight.double().T, ref.double() @ weight.double().T
        torch.testing.assert_close(out.divergence.double(), oracle.divergence(z_ref, z, beta), rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(out.divergence.sum(), hidden)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["rank", "log_p2", "topk_entropy"])
def test_what_is_computed_later_is_of_the_weights_of_the_call(name):
    """An optimizer step in between changes them in place."""
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    out = fl.token_losses(hidden, weight, torch.arange(6))
    asked = fl.token_losses(hidden, weight, torch.arange(6), wanted={name})
    before = getattr(fl.token_losses(hidden, weight, torch.arange(6)), name)
    out.nll.sum().backward()
    torch.optim.SGD([weight], lr=1.0).step()
    with pytest.raises(RuntimeError, match=rf'out.{name}: the weights .* changed in place .*wanted={{"{name}"}}'):
        getattr(out, name)
    assert torch.equal(getattr(asked, name), before)
    with torch.inference_mode():
        inference = fl.token_losses(hidden.detach().clone(), weight.detach().clone(), torch.arange(6))
        assert getattr(inference, name).isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("lead", [2.0, 12.0, 20.0, 30.0])
def test_topk_entropy_of_nearly_certain_tokens(backend, lead):
    z = torch.randn(4, 200) * 0.3
    z[:, 3] = lead
    labels = torch.full((4,), 3)
    out = fl.token_losses(z, torch.eye(200), labels, wanted=["topk_entropy"], backend=backend)
    top = z.double().topk(20).values
    p, rest = top.softmax(1), (top[:, 1:] - top[:, :1]).logsumexp(1).exp()
    truth = torch.log1p(rest) - (p[:, 1:] * (top[:, 1:] - top[:, :1])).sum(1)
    assert relative(out.topk_entropy, truth) < 6e-6  # measured 1.9e-6; 5e-2 by the softmax's logarithm


def test_rank_and_log_p2_are_computed_when_first_read():
    case = make(20, 8, 60, ignored=0.2)
    hidden, head, _ = case.inputs(torch.float32)
    out = fl.token_losses(hidden, head, case.labels)
    asked = fl.token_losses(hidden, head, case.labels, wanted={"rank", "log_p2", "topk_entropy"})
    for output in ("rank", "log_p2", "topk_entropy"):
        assert output not in vars(out) and output in vars(asked)
        torch.testing.assert_close(getattr(out, output), getattr(asked, output))
        assert output in vars(out) and not getattr(out, output).requires_grad
    z = hidden @ head.weight.T
    expected = (z > z.gather(1, case.labels.clamp(min=0)[:, None])).sum(1)
    assert torch.equal(out.rank, expected.masked_fill(case.labels < 0, -1))
    assert ((out.rank == 0) == (out.prediction == case.labels))[case.labels >= 0].all()


@pytest.mark.parametrize(
    "device, backend, frozen, sparse",
    [("cuda", "auto", True, False), ("cuda", "auto", False, True), ("cuda", "torch", True, True),
     ("cpu", "auto", True, True)],
)  # fmt: skip
def test_auto_in_a_graph_where_the_backend_is_not_known_yet(device, backend, frozen, sparse):
    head = Head(torch.zeros(8192, 2), None, 1.0, None)
    tolerance, note = preparation._tolerance(
        Options(), preparation.Outputs(), torch.bfloat16, head, not frozen, backend, device
    )
    assert (tolerance is not None) == sparse == (note is None)


def test_what_has_no_sparse_form_is_exact_and_the_report_says_so():
    hidden, weight, labels = torch.randn(5, 8, requires_grad=True), torch.randn(9000, 8), torch.arange(5)
    for asked, what in (({"entropy_gradient": True}, "entropy"), ({"beta": 0.5}, "divergence")):
        out = fl.token_losses(
            hidden, weight, labels, gradient="sparse", reference=fl.Reference(hidden.detach()), **asked
        )
        assert out.gradient_report.mode == "exact"
        assert str(out.gradient_report).endswith(f"as the gradient of the {what} has no sparse form")
    out = fl.token_losses(hidden, weight, labels, gradient="sparse", reference=fl.Reference(hidden.detach()), beta=0)
    assert out.gradient_report.mode == "sparse"
    assert torch.equal(out.divergence, out.kl)


def test_the_entropy_has_a_gradient_only_if_asked_for():
    hidden, weight, labels = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8), torch.arange(5)
    assert not fl.token_losses(hidden, weight, labels).entropy.requires_grad
    assert fl.token_losses(hidden, weight, labels, entropy_gradient=True).entropy.requires_grad


@pytest.mark.parametrize(
    "asked, error, message",
    [
        (dict(ids=[1]), TypeError, "ids: expected an int64 tensor"),
        (dict(ids=torch.zeros(5, 2)), TypeError, r"ids: expected int64 token ids, got torch.float32; .*ids.long\(\)"),
        (dict(ids=torch.zeros(5, dtype=torch.int64)), ValueError, r"ids: expected shape \[5, 'k'\].*got \[5\]"),
        (dict(ids=torch.zeros(5, 129, dtype=torch.int64)), ValueError, "expected 1 ≤ k ≤ 128 ids a token, got 129"),
        (dict(ids=torch.full((5, 2), 30)), ValueError, "ids: expected 0 ≤ id < 30 .*got 30"),
        (dict(ids=torch.full((5, 2), -1)), ValueError, "or -100 for none, .*got -1"),
        (dict(beta=0.5), ValueError, "beta=0.5: a divergence is one from a reference; give reference="),
        (dict(beta=1.5, reference=fl.Reference(torch.zeros(5, 8))), ValueError, r"beta: expected a number in \[0, 1\]"),
        (dict(temperature=0), ValueError, "temperature: expected a finite number > 0.*got 0"),
        (dict(wanted="rank"), ValueError, r"got 'rank'; write frozenset\({'rank'}\)"),
    ],
)
def test_bad_arguments(asked, error, message):
    with pytest.raises(error, match=message):
        fl.token_losses(torch.randn(5, 8), torch.randn(30, 8), torch.arange(5), **asked)


def test_ids_of_ignored_tokens_may_be_anything():
    hidden, weight, labels = torch.randn(5, 8), torch.randn(30, 8), torch.tensor([1, -100, 2, -100, 3])
    ids = torch.full((5, 2), 7)
    ids[1] = 999
    out = fl.token_losses(hidden, weight, labels, ids=ids)
    assert (out.logits_at[labels < 0] == 0).all()
    torch.testing.assert_close(out.logits_at[0], (weight[7] @ hidden[0]).expand(2))


def test_single_logits_of_an_infinite_head_reach_the_gradients():
    case = with_more(make(20, 6, 30, ignored=0), beta=None, entropy=False)
    hidden, head, _ = case.inputs(torch.float32)
    with torch.no_grad():
        hidden.abs_()
        head.weight[0, 0] = torch.inf
    fl.token_losses(hidden, head, case.labels, ids=case.asked["ids"]).lse.sum().backward()
    assert not hidden.grad.isfinite().all() and not head.weight.grad.isfinite().all()


def test_batched_backward_of_kept_rows_but_not_of_single_logits():
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8)
    out = fl.token_losses(hidden, weight, torch.arange(5), ids=torch.arange(10).view(5, 2))
    (jacobian,) = torch.autograd.grad(out.nll, hidden, torch.eye(5), is_grads_batched=True, retain_graph=True)
    assert jacobian.shape == (5, 5, 8) and torch.equal(jacobian[0, 1:], torch.zeros(4, 8))
    with pytest.raises(NotImplementedError, match="no batched backward"):
        torch.autograd.grad(out.lse, hidden, torch.eye(5), is_grads_batched=True)
