"""Losses against a teacher: JSDLoss and ReverseKLLoss against full logits and TRL."""

import copy
import math

import pytest
import torch
from cases import HEADS, coarse, make, name, relative
from patched_llama import VOCABULARY, batch, llama

import fused_losses as fl
from fused_losses import reference as oracle
from fused_losses.tokens import Observer

SHAPES = [(1, 3, 5), (33, 17, 123), (129, 65, 507)]
LOSSES = {
    "jsd": (fl.JSDLoss, dict(beta=0.3, nll_weight=0.5)),
    "forward": (fl.JSDLoss, dict(beta=0, temperature=2.0)),
    "forward, two softmaxes": (fl.JSDLoss, dict(beta=0, temperature=2.0, nll_weight=0.5)),
    "jsd, two softmaxes": (fl.JSDLoss, dict(beta=0.7, temperature=0.5, nll_weight=0.5)),
    "reverse": (fl.ReverseKLLoss, dict(temperature=1.5)),
}


def truth(kind, options, case):
    """Loss and gradients from full logits in float64."""
    hidden, head, ref = case.inputs(torch.float64)
    valid = case.labels >= 0
    z, z_ref = (oracle.logits(h[valid], own or head) for h, own in ((hidden, None), (ref.hidden, ref.head)))
    arguments = (z, z_ref.detach(), case.labels[valid])
    loss = oracle.jsd(*arguments, **options) if kind is fl.JSDLoss else oracle.reverse_kl(*arguments[:2], **options)
    return gradients(loss.sum() / valid.sum(), hidden, head)


def gradients(loss, hidden, head):
    loss.backward()
    found = {"loss": loss.detach(), "hidden": hidden.grad, "weight": head.weight.grad}
    if head.bias is not None:
        found["bias"] = head.bias.grad
    return {key: value.double() for key, value in found.items() if value is not None}


def ours(kind, options, case, dtype=torch.float64, **more):
    hidden, head, ref = case.inputs(dtype)
    return gradients(kind(**options, **more)(hidden, head, case.labels, reference=ref), hidden, head)


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("reference", ["shared", "own"])
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_equals_the_oracle(shape, head, reference, frozen, loss, dtype, tolerance):
    case = make(*shape, **head, reference=reference, frozen=frozen).rounded(dtype)
    found, expected = ours(*LOSSES[loss], case, dtype), truth(*LOSSES[loss], case)
    assert found.keys() == expected.keys()
    for output in expected:
        assert relative(found[output], expected[output]) <= tolerance, output


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reference", ["shared", "own"])
def test_bfloat16_is_no_worse_than_plain_pytorch(loss, reference):
    case = make(129, 65, 507, reference=reference, spread=4.0).rounded(torch.bfloat16)
    expected = truth(*LOSSES[loss], case)
    found, plain = (ours(*LOSSES[loss], case, torch.bfloat16, backend=backend) for backend in ("auto", "reference"))
    # Cross-entropy alone has logits of bfloat16, as plain PyTorch; two gradients of bfloat16 are added after it.
    most = 1.06 if "two" in loss else 0.6
    for output in ("hidden", "weight"):
        assert relative(found[output], expected[output]) <= relative(plain[output], expected[output]) * most, output


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss):
    case = make(6, 4, 11, bias=True, scale=0.7, softcap=3.0, reference="own")
    hidden, head, ref = case.inputs(torch.float64)
    kind, options = LOSSES[loss]

    def value(hidden, weight, bias):
        return kind(**options)(hidden, fl.LMHead(weight, bias, 0.7, 3.0), case.labels, reference=ref)

    assert torch.autograd.gradcheck(value, (hidden, head.weight, head.bias), eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_conventions_are_those_of_trl(beta, temperature):
    from trl.experimental.gkd import GKDTrainer

    case = make(20, 8, 60, reference="own", ignored=0.3)
    hidden, head, ref = case.inputs(torch.float64)
    z, z_ref = oracle.logits(hidden, head), oracle.logits(ref.hidden, ref.head)
    labels = case.labels[None]
    expected = GKDTrainer.generalized_jsd_loss(
        z[None], z_ref[None], labels, beta=beta, temperature=temperature, reduction="batchmean"
    )
    found = fl.JSDLoss(beta, temperature)(hidden, head, case.labels, reference=ref)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_ends_are_the_two_kls():
    case = make(20, 8, 60, reference="own")
    hidden, head, ref = case.inputs(torch.float64)

    def value(loss):
        return loss(hidden, head, case.labels, reference=ref).item()

    forward, backward = value(fl.JSDLoss(0)), value(fl.ReverseKLLoss())
    assert value(fl.JSDLoss(1)) == backward
    near = 2**-40
    assert value(fl.JSDLoss(near)) / near == pytest.approx(forward, rel=3e-6)
    assert value(fl.JSDLoss(1 - near)) / near == pytest.approx(backward, rel=3e-6)
    assert abs(forward - backward) > 0.1


def test_forward_kl_may_be_sparse_within_its_certificate():
    n, v = 40, 300
    case = make(n, v, v, reference="shared", ignored=0)
    g = torch.Generator().manual_seed(3)
    hidden = 4 * torch.randn(n, v, generator=g, dtype=torch.float64)
    ref = fl.Reference(hidden + 0.3 * torch.randn(n, v, generator=g, dtype=torch.float64))
    weight = torch.eye(v, dtype=torch.float64)  # the gradient of the hidden states is that of the logits
    found = []
    for gradient in ("exact", "sparse"):
        x, loss = hidden.clone().requires_grad_(), fl.JSDLoss(0, 1.5, gradient=gradient)
        with coarse(1e-3):
            loss(x, weight, case.labels, reference=ref).backward()
        found.append(x.grad)
    exact, sparse = found
    report = loss.gradient_report
    error = (sparse - exact).abs().sum() / sparse.abs().sum()
    assert report.mode == "sparse" and 0 < error <= report.bound * (1 + report.bound) + 1e-9 and report.bound <= 0.15


BACKENDS = ["cpu", "torch"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6, 1e8])
def test_of_two_models_that_are_certain_of_other_tokens_it_is_at_its_bound(backend, beta, size):
    """log 2 at beta 0.5: the difference of large logits is rounded by far more than the logarithm of the mixture."""
    weight, hidden = torch.eye(5), size * torch.eye(5)
    loss = fl.JSDLoss(beta, backend=backend)(hidden, weight, torch.arange(5), reference=fl.Reference(-hidden))
    # The student has all of its mass on an id; the teacher's is on the four others.
    bound = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert loss.item() == pytest.approx(bound, rel=1.7e-7)  # measured 5.6e-8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", [fl.JSDLoss(0.5), fl.JSDLoss(0), fl.ReverseKLLoss()], ids=["jsd", "kl", "reverse"])
@pytest.mark.parametrize("size", [1e3, 1e5, 1e8])
def test_two_models_that_are_certain_of_the_same_token_agree(backend, loss, size):
    """The largest logit is a rounded sum, by more than 1 at 1e8."""
    loss = copy.deepcopy(loss)
    loss.backend, loss.gradient = backend, "exact"
    hidden = (size * torch.eye(7)[[0, 1, 2]] + torch.randn(3, 7) * size / 100).requires_grad_()
    reference = fl.Reference(hidden.detach() + size / 100 * torch.randn(3, 7))
    value = loss(hidden, torch.eye(7), torch.arange(3), reference=reference)
    value.backward()
    assert value.item() < 1e-30 and hidden.grad.abs().max() < 1e-30


@pytest.mark.parametrize(
    "loss, why",
    [(fl.JSDLoss(0, 2.0, 0.1, gradient="sparse"), "taken at two temperatures"),
     (fl.JSDLoss(0.5, gradient="sparse"), "the divergence has no sparse form"),
     (fl.ReverseKLLoss(gradient="sparse"), "the divergence has no sparse form")],
    ids=str,
)  # fmt: skip
def test_what_is_exact_says_so(loss, why):
    hidden, weight, labels = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8), torch.arange(5)
    loss(hidden, weight, labels, reference=fl.Reference(hidden.detach() + 1)).backward()
    assert loss.gradient_report.mode == "exact" and why in str(loss.gradient_report)


def test_both_passes_take_num_items_and_leave_ignored_tokens_out():
    case = make(20, 8, 60, reference="own")
    hidden, head, ref = case.inputs(torch.float64)
    loss = fl.JSDLoss(0.5, 2.0, 0.3)
    total = loss(hidden, head, case.labels, reference=ref).item() * (case.labels >= 0).sum().item()
    assert loss(hidden, head, case.labels, reference=ref, num_items=7).item() == pytest.approx(total / 7, rel=1e-12)
    none = torch.full_like(case.labels, -100)
    value = loss(hidden, head, none, reference=ref)
    value.backward()
    assert value.item() == 0 and not hidden.grad.any()


def test_what_is_logged_is_the_nll_at_temperature_1_where_there_is_one():
    case = make(20, 8, 60, reference="own")
    hidden, head, ref = case.inputs(torch.float64)
    plain = fl.token_losses(hidden, head, case.labels).nll.detach()
    for nll_weight, scale in ((0.3, 1.0), (0.0, 2.0)):
        observer, loss = Observer(), fl.JSDLoss(0.5, 2.0, nll_weight)
        with loss.observed(observer):
            loss(hidden, head, case.labels, reference=ref)
        expected = plain if scale == 1 else fl.token_losses(hidden, head, case.labels, temperature=scale).nll
        torch.testing.assert_close(observer.nll, expected)


def test_a_reference_is_needed():
    hidden, weight, labels = torch.randn(5, 8), torch.randn(30, 8), torch.arange(5)
    for loss in (fl.JSDLoss(), fl.ReverseKLLoss()):
        with pytest.raises(ValueError, match=f"{type(loss).__name__} needs reference="):
            loss(hidden, weight, labels)


def with_teacher(teacher, inputs, k=8):
    """The batch with the teacher's top k of each token, none of the first; −100 where it says nothing."""
    logprobs, ids = teacher(input_ids=inputs["input_ids"]).logits.log_softmax(-1).topk(k)
    first = torch.full_like(ids[:, :1], -100)
    ids, logprobs = torch.cat([first, ids[:, :-1]], 1), torch.cat([0.0 * first, logprobs.detach()[:, :-1]], 1)
    return {**inputs, "teacher_ids": ids.index_fill(2, torch.tensor([k - 1]), -100), "teacher_logprobs": logprobs}


@pytest.mark.parametrize("options", [dict(), dict(divergence="jsd", rest="bucket", temperature=2.0, nll_weight=0.3)])
def test_a_patched_model_takes_entries_of_a_teacher(options):
    model, inputs = llama(), with_teacher(llama().eval(), batch())
    labels = inputs["labels"][:, 1:]
    valid = labels >= 0
    z = copy.deepcopy(model).double()(input_ids=inputs["input_ids"]).logits[:, :-1][valid].detach()
    ids, logprobs = (inputs[key][:, 1:][valid] for key in ("teacher_ids", "teacher_logprobs"))
    expected = oracle.topk_distillation(z, labels[valid], ids, logprobs.double(), **options).mean()
    with fl.patched(model, fl.TopKDistillationLoss(**options)):
        out = model(**inputs)
        out.loss.backward()
        with pytest.raises(ValueError, match=r"teacher_ids: is missing in the batch, .* with a last dimension k"):
            model(input_ids=inputs["input_ids"], labels=inputs["labels"])
        with pytest.raises(
            ValueError, match=r"teacher_ids: expected the labels' shape \[3, 11\] and a last dimension k"
        ):
            model(**inputs | {"teacher_ids": inputs["teacher_ids"][:, 1:]})
        model.eval()
        with torch.no_grad():  # the mean nll, which knows no teacher
            nll = model(**inputs).loss
    assert out.loss.item() == pytest.approx(expected.item(), rel=3e-6)
    assert nll.item() == pytest.approx(oracle.nll(z, labels[valid]).mean().item(), rel=3e-6)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_entries_of_a_teacher_under_prompt_tuning():
    """They are as long as the labels given, without the virtual tokens."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    inputs = with_teacher(llama().eval(), batch())
    plain = {key: inputs[key] for key in ("input_ids", "labels")}
    valid, labels = plain["labels"][:, 1:] >= 0, plain["labels"][:, 1:]
    z = model(**plain).logits[:, 4:-1][valid].detach().double()
    ids, logprobs = (inputs[key][:, 1:][valid] for key in ("teacher_ids", "teacher_logprobs"))
    fl.patch(model, fl.TopKDistillationLoss())
    found, n = model(**inputs).loss, valid.sum()
    # The last virtual token predicts the first of the row, of which the teacher says nothing.
    first = (plain["labels"][:, 0] >= 0).sum()
    expected = oracle.topk_distillation(z, labels[valid], ids, logprobs.double()).sum() / (n + first)
    assert found.item() == pytest.approx(expected.item(), rel=3e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_patched_model_and_its_teacher(loss):
    kind, options = LOSSES[loss]
    model, teacher, inputs = llama(), llama(hidden_size=24, head_dim=6).eval(), batch()

    def logits(of):
        of = copy.deepcopy(of).double()
        return of(input_ids=inputs["input_ids"]).logits[:, :-1][valid].detach()

    valid = inputs["labels"][:, 1:] >= 0
    z, z_ref, labels = logits(model), logits(teacher), inputs["labels"][:, 1:][valid]
    expected = oracle.jsd(z, z_ref, labels, **({"beta": 1.0, **options}))
    with fl.patched(model, kind(**options), reference=teacher):
        found = model(**inputs).loss
    assert found.item() == pytest.approx(expected.mean().item(), rel=2e-6)
    assert z.shape[-1] == VOCABULARY
