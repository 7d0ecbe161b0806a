"""The op against the float64 oracle: values and gradients, over shapes, heads, references and dtypes."""

import itertools
from dataclasses import replace

import pytest
import torch
from cases import HEADS, REFERENCES, errors, make, name, near_the_reference, relative, run

import fused_losses as fl
from fused_losses import backends
from fused_losses import reference as oracle
from fused_losses.backends import chunks, row_passes

# The least; one token of a real model's width; odd sizes that no chunk or vector divides; one more than a power of two,
# so that every tile has a tail of one; a V larger than 4,096 and than the other sizes by far.
SHAPES = [(1, 1, 2), (1, 576, 252), (33, 17, 123), (129, 65, 507), (64, 64, 4097)]


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks and several row blocks also for small inputs."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    monkeypatch.setitem(row_passes.BLOCK_NUMBERS, "cpu", 3 * 123)


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_equals_the_oracle(shape, head, reference, frozen, dtype, tolerance, small_chunks):
    case = make(*shape, **head, reference=reference, frozen=frozen)
    for output, error in errors(case, dtype).items():
        assert error <= tolerance, output


@pytest.mark.skipif(backends.unavailable("cpu") is not None, reason=str(backends.unavailable("cpu")))
@pytest.mark.pairwise
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=name)
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
def test_compiled_kernels_equal_the_oracle_in_exact_mode(shape, head, reference, frozen, small_chunks):
    case = make(*shape, **head, reference=reference, frozen=frozen)
    for output, error in errors(case, torch.float32, "cpu").items():
        assert error <= 1e-5, output


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name)
@pytest.mark.parametrize("of_bias", [torch.float32, torch.bfloat16, torch.float16], ids=name)
def test_a_bias_of_another_dtype_than_the_weight(of_bias, dtype, backend):
    """As a reference of class weights has it. The bound is of half-precision logits, which `reference` has."""
    if backends.unavailable(backend) is not None:
        pytest.skip(backends.unavailable(backend))
    case = make(33, 16, 123, bias=True, reference="own", ignored=0)
    values = {}
    for to, to_bias, by in ((dtype, of_bias, backend), (torch.float64, torch.float64, "reference")):
        rounded = [t.to(dtype).to(to) for t in (case.hidden, case.weight)]
        bias = case.bias.to(of_bias).to(to_bias)
        head, labels = fl.LMHead(rounded[1], bias), case.labels
        other = fl.Reference(rounded[0] * 0.5, fl.LMHead(rounded[1], -bias))
        loss = fl.CrossEntropyLoss(0.1, class_weights=torch.arange(1, 124), backend=by)
        out = fl.token_losses(rounded[0], head, labels, reference=other, backend=by)
        values[to] = out.nll, out.kl, out.reference_nll, loss(rounded[0], replace(head, softcap=5.0), labels)
    for ours, truth in zip(*values.values(), strict=True):
        assert relative(ours, truth) < 5e-3


def test_float32_error_is_that_of_float32():
    """The grid's bound of 1e-5 has room for KL gradients that cancel; a well-conditioned case must do far better."""
    worst = max(errors(make(129, 65, 507, reference="own", bias=True), torch.float32).values())
    assert worst < 1.5e-6  # measured 5e-7


# A trainable head cannot be shared here: finite differences would move the frozen reference too.
@pytest.mark.parametrize(
    "reference, frozen", [(None, False), (None, True), ("own", False), ("own", True), ("shared", True)]
)
def test_gradcheck(reference, frozen):
    case = make(6, 4, 11, bias=True, scale=0.7, softcap=3.0, reference=reference, frozen=frozen)
    hidden, head, ref = case.inputs(torch.float64)

    def outputs(hidden, weight, bias):
        out = fl.token_losses(
            hidden, fl.LMHead(weight, bias, head.logit_scale, head.softcap), case.labels, reference=ref
        )
        return (out.nll,) if ref is None else (out.nll, out.kl)

    assert torch.autograd.gradcheck(outputs, (hidden, head.weight, head.bias), eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", [(64, 96, 1000), (129, 65, 507)], ids=name)
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("chunks", ["one-chunk", "many-chunks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_errors_are_not_above_those_of_plain_pytorch(
    shape, head, reference, frozen, chunks, dtype, request
):
    """Plain: logits in the half dtype, then fp32, as a training loop does it. ε = 2 % of its error, for chance."""
    if chunks == "many-chunks":
        request.getfixturevalue("small_chunks")
    case = make(*shape, **head, reference=reference, frozen=frozen, spread=4.0)
    ours, plain = errors(case, dtype), errors(case, dtype, "reference")
    for output in ours:
        assert ours[output] <= plain[output] * 1.02, (output, ours[output], plain[output])


@pytest.mark.parametrize("reference", ["shared", "own"])
def test_kl_gradient_near_the_reference_survives_bf16(reference):
    """KL about 0.003: p − p_ref cancels. bf16 logits lose a third of the gradient and more."""
    case = near_the_reference(reference)
    truth = run(case, torch.float64, "reference")
    assert 0.002 < truth["kl"].mean() < 0.005
    ours, plain = run(case, torch.bfloat16), run(case, torch.bfloat16, "reference")
    figures = {k: (relative(ours[k], truth[k]), relative(plain[k], truth[k])) for k in ("kl", "d_hidden", "d_weight")}
    print("relative error, ours and plain bf16 logits:", figures)
    for output in ("d_hidden", "d_weight"):
        assert figures[output][0] <= 0.005  # measured 0.0017
        assert figures[output][1] > 0.30
    assert figures["kl"][0] <= 5e-5  # measured 1.6e-5


def test_shapes_and_fill_values():
    case = make(24, 5, 13, reference="shared")
    hidden, head, ref = case.inputs(torch.float32)
    labels = case.labels.view(2, 3, 4)
    out = fl.token_losses(hidden.view(2, 3, 4, 5), head, labels, reference=fl.Reference(ref.hidden.view(2, 3, 4, 5)))
    ignored = labels == -100
    assert ignored.any()
    for field in ("nll", "kl", "entropy", "reference_nll", "reference_entropy"):
        value = getattr(out, field)
        assert value.shape == labels.shape and value.dtype == torch.float32
        assert (value[ignored] == 0).all() and (value[~ignored] > 0).all()
    assert (out.prediction[ignored] == -1).all()
    best = (hidden @ head.weight.T).argmax(-1).view(labels.shape)
    assert (out.prediction == best)[~ignored].all()
    assert not any(
        getattr(out, f).requires_grad for f in ("entropy", "prediction", "reference_nll", "reference_entropy")
    )


def test_a_single_hidden_vector_and_a_scalar_label():
    hidden, weight = torch.randn(5), torch.randn(11, 5)
    out = fl.token_losses(hidden, weight, torch.tensor(3))
    assert out.nll.shape == ()
    torch.testing.assert_close(out.nll, -(weight @ hidden).log_softmax(0)[3])


def test_without_reference_the_fields_are_none():
    out = fl.token_losses(torch.randn(3, 5), torch.randn(11, 5), torch.tensor([1, 2, 3]))
    assert out.kl is None and out.reference_nll is None and out.reference_entropy is None


def test_head_can_be_a_tensor_a_linear_or_an_lmhead():
    linear = torch.nn.Linear(5, 11)
    hidden, labels = torch.randn(3, 5), torch.tensor([1, 2, 3])
    results = [fl.token_losses(hidden, head, labels).nll for head in (linear, fl.LMHead(linear.weight, linear.bias))]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    no_bias = torch.nn.Linear(5, 11, bias=False)
    torch.testing.assert_close(
        fl.token_losses(hidden, no_bias, labels).nll,
        fl.token_losses(hidden, no_bias.weight, labels).nll,
        rtol=0,
        atol=0,
    )


def test_reference_head_of_another_width():
    hidden, weight = torch.randn(9, 5), torch.randn(11, 5)
    ref_hidden, ref_weight = torch.randn(9, 8), torch.randn(11, 8)
    out = fl.token_losses(hidden, weight, torch.arange(9), reference=fl.Reference(ref_hidden, ref_weight))
    expected = oracle.kl((ref_hidden @ ref_weight.T).double(), (hidden @ weight.T).double())
    torch.testing.assert_close(out.kl.double(), expected, rtol=1e-5, atol=1e-6)


def test_identical_reference_has_zero_kl_and_zero_gradient():
    case = make(20, 16, 50, reference="shared", near=0.0)
    case = case.rounded(torch.bfloat16)
    hidden, head, ref = case.inputs(torch.bfloat16)
    out = fl.token_losses(hidden, head, case.labels, reference=ref)
    out.kl.sum().backward()
    assert (out.kl == 0).all() and (hidden.grad == 0).all() and (head.weight.grad == 0).all()


def test_kl_far_from_the_reference():
    """Differences of logits of several hundred: neither overflow nor a lost term."""
    hidden = torch.tensor([[200.0], [-150.0], [0.0]], dtype=torch.float32, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    ref = torch.tensor([[-100.0], [-160.0], [30.0]])
    out = fl.token_losses(hidden, weight, torch.tensor([0, 1, 2]), reference=fl.Reference(ref))
    expected = oracle.kl(ref.double() @ weight.double().T, hidden.detach().double() @ weight.double().T)
    torch.testing.assert_close(out.kl.double(), expected, rtol=1e-6, atol=1e-7)
    out.kl.sum().backward()
    p = (hidden.detach() @ weight.T).softmax(-1) - (ref @ weight.T).softmax(-1)
    torch.testing.assert_close(hidden.grad, p @ weight, rtol=1e-5, atol=1e-7)


def test_bias_of_minus_infinity_rules_tokens_out():
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    bias = torch.zeros(10)
    bias[7:] = -torch.inf
    labels = torch.arange(6)
    out = fl.token_losses(hidden, fl.LMHead(weight, bias), labels, reference=fl.Reference(hidden.detach() + 0.1))
    (out.nll.sum() + out.kl.sum()).backward()
    short = fl.token_losses(hidden, weight[:7], labels, reference=fl.Reference(hidden.detach() + 0.1))
    for field in ("nll", "kl", "entropy", "reference_entropy"):
        torch.testing.assert_close(getattr(out, field), getattr(short, field), rtol=1e-5, atol=1e-6)
    assert (weight.grad[7:] == 0).all() and hidden.grad.isfinite().all()


def test_results_are_the_same_from_run_to_run():
    case = make(129, 65, 507, reference="own", bias=True)
    first = run(case, torch.float32)
    for _ in range(3):
        again = run(case, torch.float32)
        assert all(torch.equal(first[k], again[k]) for k in first)


def test_only_what_requires_a_gradient_gets_one():
    case = make(20, 16, 50, bias=True)
    for wants in itertools.product([False, True], repeat=3):
        hidden, head, _ = case.inputs(torch.float64)
        tensors = (hidden, head.weight, head.bias)
        for tensor, want in zip(tensors, wants, strict=True):
            tensor.requires_grad_(want)
        nll = fl.token_losses(hidden, head, case.labels).nll
        assert nll.requires_grad == any(wants)
        if any(wants):
            nll.sum().backward()
        truth = oracle.nll(oracle.logits(hidden[case.labels >= 0], head), case.labels[case.labels >= 0]).sum()
        expected = torch.autograd.grad(truth, [t for t in tensors if t.requires_grad]) if any(wants) else ()
        for tensor, gradient in zip([t for t in tensors if t.requires_grad], expected, strict=True):
            assert relative(tensor.grad, gradient) < 1e-12
        assert all((t.grad is not None) == w for t, w in zip(tensors, wants, strict=True))


def test_nothing_flows_to_the_reference():
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    ref_hidden, ref_weight = torch.randn(6, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    fl.token_losses(hidden, weight, torch.arange(6), reference=fl.Reference(ref_hidden, ref_weight)).kl.sum().backward()
    assert ref_hidden.grad is None and ref_weight.grad is None and weight.grad is not None


def test_non_contiguous_inputs():
    case = make(30, 12, 40, ignored=0)
    expected = run(case, torch.float64)
    hidden = case.hidden.T.contiguous().T.requires_grad_()
    weight = case.weight.T.contiguous().T.requires_grad_()
    out = fl.token_losses(hidden, weight, case.labels)
    (out.nll * case.nll_upstream).sum().backward()
    assert relative(hidden.grad, expected["d_hidden"]) < 1e-12 and relative(weight.grad, expected["d_weight"]) < 1e-12


def test_an_infinite_logit_reaches_every_gradient():
    """A check of the gradients alone, as GradScaler's, must see it."""
    for reference in (None, "own"):
        case = make(20, 6, 30, ignored=0, reference=reference)
        hidden, head, ref = case.inputs(torch.float32)
        with torch.no_grad():
            hidden.abs_()
            head.weight[0, 0] = torch.inf
        out = fl.token_losses(hidden, head, case.labels, reference=ref)
        out.nll.sum().backward()
        assert (
            not out.nll.isfinite().any() and not head.weight.grad.isfinite().all() and not hidden.grad.isfinite().all()
        )
