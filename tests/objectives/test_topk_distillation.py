"""TopKDistillationLoss against its formula on full logits, against others' code, near the teacher, and at the borders."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import HEADS, coarse, make, name, relative
from test_distillation import gradients

import fused_losses as fl
from fused_losses import backends
from fused_losses import reference as oracle

# Not smaller: of nine ids one may hold all, and what is left of the renormalised gradient is rounding in float32.
SHAPES = [(7, 5, 23), (33, 17, 123), (129, 65, 507)]
KINDS = [
    dict(divergence=divergence, rest=rest, beta=0.3)
    for divergence, rest in itertools.product(("forward", "reverse", "jsd"), ("none", "bucket"))
]
MORE = [dict(), dict(temperature=1.7, nll_weight=0.4), dict(normalise=True, nll_weight=0.4), dict(temperature=0.5)]


def label(kind):
    return "-".join(f"{value}" for key, value in kind.items() if key != "beta") or "plain"


def teacher(case, k=5, spread=2.0, seed=1):
    """Top k of random logits, with holes of both kinds, a token without any entry, and the label first at some."""
    g = torch.Generator().manual_seed(seed)
    n, v = len(case.labels), len(case.weight)
    z = spread * torch.randn(n, v, generator=g, dtype=torch.float64)
    z[::2].scatter_(1, case.labels.clamp(min=0)[::2, None], 3 * spread)
    logprobs, ids = z.log_softmax(-1).topk(min(k, v))
    ids[1::3, 2:] = -100
    logprobs[2::5, 1] = -torch.inf
    ids[-1] = -100
    logprobs[-1] = 0.0
    return {"teacher_ids": ids, "teacher_logprobs": logprobs}


def truth(options, case, given, dtype=torch.float64):
    """Loss and gradients from full logits; in bfloat16 what a plain training loop has."""
    hidden, head, _ = case.inputs(dtype)
    valid = case.labels >= 0
    z = oracle.logits(hidden[valid], head)
    ids, logprobs = (value[valid] for value in given.values())
    loss = oracle.topk_distillation(z, case.labels[valid], ids, logprobs, **options)
    return gradients(loss.sum() / valid.sum(), hidden, head)


def ours(options, case, given, dtype=torch.float64, **more):
    hidden, head, _ = case.inputs(dtype)
    return gradients(fl.TopKDistillationLoss(**options, **more)(hidden, head, case.labels, **given), hidden, head)


BACKENDS = [
    "torch",
    pytest.param("cpu", marks=pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="no kernels")),
]


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("kind", KINDS, ids=label)
@pytest.mark.parametrize("more", MORE, ids=label)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_equals_the_oracle(shape, head, frozen, kind, more, backend, dtype, tolerance):
    case = make(*shape, **head, frozen=frozen).rounded(dtype)
    given = teacher(case)
    given["teacher_logprobs"] = given["teacher_logprobs"].to(dtype)
    options = kind | more
    found, expected = ours(options, case, given, dtype, backend=backend), truth(options, case, given)
    assert found.keys() == expected.keys()
    for output in expected:
        assert relative(found[output], expected[output]) <= tolerance, output


@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_bfloat16_is_no_worse_than_plain_pytorch(kind):
    case = make(129, 65, 507, spread=4.0).rounded(torch.bfloat16)
    given = teacher(case, k=20, spread=4.0)
    expected = truth(kind, case, given)
    found, plain = ours(kind, case, given, torch.bfloat16), truth(kind, case, given, torch.bfloat16)
    for output in ("loss", "hidden", "weight"):  # both have logits of bfloat16
        assert relative(found[output], expected[output]) <= relative(plain[output], expected[output]) * 1.05, output


@pytest.mark.parametrize("kind", KINDS, ids=label)
@pytest.mark.parametrize("more", MORE[:2], ids=label)
def test_gradcheck(kind, more):
    case = make(6, 4, 11, bias=True, scale=0.7, softcap=3.0)
    given = teacher(case, k=4)
    hidden, head, _ = case.inputs(torch.float64)

    def value(hidden, weight, bias):
        return fl.TopKDistillationLoss(**kind, **more)(hidden, fl.LMHead(weight, bias, 0.7, 3.0), case.labels, **given)

    assert torch.autograd.gradcheck(value, (hidden, head.weight, head.bias), eps=1e-6, atol=1e-7, rtol=1e-5)


def own_top(hidden, weight, k, dtype=torch.float32):
    logprobs, ids = (hidden.double() @ weight.double().T).log_softmax(-1).topk(k)
    return {"teacher_ids": ids, "teacher_logprobs": logprobs.to(dtype)}


# --- near the teacher, and far from it


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != KINDS[0]], ids=label)
@pytest.mark.parametrize("spread", [2.0, 6.0])
def test_values_near_the_teacher_keep_their_digits(kind, spread):
    """The terms of first order cancel: plain float32 has an error of up to 3e-3 there."""
    g = torch.Generator().manual_seed(0)
    start, weight = torch.randn(200, 64, generator=g), torch.randn(3000, 64, generator=g) * spread / 8
    hidden, labels = start + 1e-3 * torch.randn(200, 64, generator=g), torch.zeros(200, dtype=torch.int64)
    given = own_top(start, weight, 32)
    case = replace(make(1, 1, 1), hidden=hidden.double(), weight=weight.double(), labels=labels)
    found, expected = ours(kind, case, given, torch.float32), truth(kind, case, given)
    assert 0 < expected["loss"] < 1.2e-5
    # The rest of a confident teacher is known to the rounding of lse only.
    assert relative(found["loss"], expected["loss"]) < (2e-3 if kind["rest"] == "bucket" and spread == 6 else 3e-5)
    assert relative(found["hidden"], expected["hidden"]) < 1.2e-3  # of logits in float32


@pytest.mark.parametrize("kind", KINDS[1:], ids=label)
def test_the_student_that_is_its_teacher_has_no_gradient(kind):
    case = make(40, 16, 300, ignored=0)
    given = own_top(case.hidden, case.weight, 8, torch.float64)
    found, far = ours(kind, case, given), ours(kind, replace(case, hidden=-case.hidden), given)
    assert 0 <= found["loss"] < 1e-25 and far["loss"] > 0.1
    assert found["hidden"].norm() < 1e-14 and far["hidden"].norm() > 1e-4


@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_far_from_the_teacher_all_is_finite(kind):
    hidden = torch.tensor([[200.0], [-150.0], [0.0]], requires_grad=True)
    weight, labels = torch.tensor([[1.0], [0.0], [-1.0], [0.5]]), torch.tensor([0, 1, 2])
    ids = torch.tensor([[2, 1], [0, 3], [0, -100]])
    logprobs = torch.tensor([[-1e-9, -400.0], [-0.1, -3.0], [-200.0, 0.0]])
    loss = fl.TopKDistillationLoss(**kind)(hidden, weight, labels, teacher_ids=ids, teacher_logprobs=logprobs)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.isfinite() and gradient.isfinite().all()
    z = hidden.detach().double() @ weight.double().T
    expected = oracle.topk_distillation(z, labels, ids, logprobs.double(), **kind).mean()
    if kind["divergence"] == "forward":
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


# --- the borders


@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_rounded_probabilities_may_sum_to_more_than_one(kind):
    """As top k of all of a vocabulary, rounded to bfloat16."""
    case = make(40, 8, 12, ignored=0, spread=1.0)
    logprobs, ids = (case.hidden @ case.weight.T).log_softmax(-1).topk(12)
    given = {"teacher_ids": ids, "teacher_logprobs": logprobs.bfloat16().double()}
    assert (given["teacher_logprobs"].exp().sum(-1) > 1.001).any()
    found, expected = ours(kind, case, given), truth(kind, case, given)
    for output in expected:
        assert relative(found[output], expected[output]) < 1e-9, output
    if kind["rest"] == "bucket":
        assert found["loss"] >= 0


@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_tokens_without_an_entry_count_in_n_alone(kind):
    case = make(20, 8, 60, ignored=0)
    given = teacher(case)
    some, none = given["teacher_ids"].clone(), torch.full_like(given["teacher_ids"], -100)
    some[10:] = -100
    first = replace(case, hidden=case.hidden[:10], labels=case.labels[:10])
    half = ours(kind, first, {key: value[:10] for key, value in given.items()})
    found = ours(kind, case, given | {"teacher_ids": some})
    assert found["loss"].item() == pytest.approx(half["loss"].item() / 2, rel=1e-12)
    assert not found["hidden"][10:].any()
    nothing = ours(kind, case, given | {"teacher_ids": none})
    assert nothing["loss"] == 0 and not nothing["hidden"].any() and not nothing["weight"].any()
    infinite = ours(kind, case, given | {"teacher_logprobs": torch.full_like(given["teacher_logprobs"], -torch.inf)})
    assert infinite["loss"] == 0 and not infinite["hidden"].any()


def test_all_of_the_vocabulary_is_the_kl():
    case = make(30, 8, 40, reference="own")
    hidden, head, ref = case.inputs(torch.float64)
    logprobs, ids = oracle.logits(ref.hidden, ref.head).log_softmax(-1).topk(40)
    given = dict(teacher_ids=ids, teacher_logprobs=logprobs)
    for divergence, beta in (("forward", 0), ("reverse", 1), ("jsd", 0.3)):
        expected = fl.JSDLoss(beta, 1.4)(
            hidden, head, case.labels, reference=fl.Reference(ref.hidden / 1, ref.head)
        ).item()
        for rest in ("none", "bucket"):
            loss = fl.TopKDistillationLoss(divergence, beta, rest, temperature=1.4, normalise=True)
            value = loss(hidden, head, case.labels, teacher_ids=ids, teacher_logprobs=logprobs / 1.4).item()
            # A rest of 0 counts as 1e-7.
            assert value == pytest.approx(expected, rel=1e-10, abs=0 if rest == "none" else 3e-6)
    assert given["teacher_ids"].shape == (30, 40)


def test_the_bucket_is_at_most_the_kl_of_the_vocabulary():
    case = make(30, 8, 200, reference="own", ignored=0)
    hidden, head, ref = case.inputs(torch.float64)
    logprobs, ids = oracle.logits(ref.hidden, ref.head).log_softmax(-1).topk(200)
    values = [
        fl.TopKDistillationLoss(rest="bucket")(
            hidden, head, case.labels, teacher_ids=ids[:, :k], teacher_logprobs=logprobs[:, :k]
        ).item()
        for k in (1, 4, 32, 128)
    ]
    values.append(fl.JSDLoss(0)(hidden, head, case.labels, reference=ref).item())
    assert values == sorted(values) and values[0] < 0.9 * values[-1]


def test_forward_without_a_rest_is_least_where_the_student_has_the_named_alone():
    """There it is Σq log Σq, below 0, and its gradient 0."""
    logprobs = torch.tensor([[0.5, 0.2]]).log()
    z = torch.tensor([[math.log(0.5), math.log(0.2), -60.0]], requires_grad=True)
    loss = fl.TopKDistillationLoss()(
        z, torch.eye(3), torch.tensor([0]), teacher_ids=torch.tensor([[0, 1]]), teacher_logprobs=logprobs
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.7 * math.log(0.7), rel=1e-6) and z.grad.abs().max() < 1e-7


# --- others' code


def trl(options, z, given):
    from trl.experimental.server_distillation import server_distillation_trainer as server

    ids, logprobs = given.values()
    named = (ids >= 0) & (logprobs > -torch.inf)
    student = z.log_softmax(-1).gather(-1, ids.clamp(min=0)).masked_fill(~named, -torch.inf)
    logprobs = logprobs.masked_fill(~named, -torch.inf)
    if options["rest"] == "bucket":
        (student, mask), (logprobs, _) = (server._add_tail_bucket(x, named) for x in (student, logprobs))
    else:
        student, logprobs = (x - x.logsumexp(-1, keepdim=True) for x in (student, logprobs))
        mask = named
    beta = {"forward": 0, "reverse": 1}.get(options["divergence"], options["beta"])
    return server._jsd_divergence(student, logprobs, beta, mask).sum(-1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*KINDS[1:], dict(divergence="jsd", rest="none", beta=0)], ids=label)
def test_is_that_of_trl(kind):
    case = make(40, 8, 60, ignored=0)
    hidden, head, _ = case.inputs(torch.float64)
    given = teacher(case)
    z = oracle.logits(hidden, head)[:-1]  # the last token has no entry: TRL's logsumexp is NaN there
    expected = trl(kind, z, {key: value[:-1] for key, value in given.items()}).sum() / 40
    found = fl.TopKDistillationLoss(**kind)(hidden, head, case.labels, **given)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


def test_is_that_of_lawftrack():
    """Top 4 of the target and a rest; forward KL by kl_div."""
    case = make(40, 8, 60, ignored=0)
    hidden, head, _ = case.inputs(torch.float64)
    target = (2 * torch.randn(40, 60, dtype=torch.float64)).softmax(-1)
    q, ids = target.topk(4)
    p = oracle.logits(hidden, head).softmax(-1).gather(-1, ids)
    p, rest = (torch.cat([x, (1 - x.sum(-1, keepdim=True)).clamp(min=1e-10)], -1) for x in (p, q))
    expected = F.kl_div(p.log(), rest, reduction="none").sum(-1).mean()
    found = fl.TopKDistillationLoss(rest="bucket")(hidden, head, case.labels, teacher_ids=ids, teacher_logprobs=q.log())
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)


# --- sparse gradients, chunks and graphs


@pytest.mark.parametrize("kind", KINDS, ids=label)
@pytest.mark.parametrize("near", [0.02, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sparse_call_is_within_its_certificate(kind, near, backend):
    """Near the teacher p and q cancel at the entries, so the bound must be relative to what is left."""
    n, v = 40, 300
    g = torch.Generator().manual_seed(5)
    start = 4 * torch.randn(n, v, generator=g, dtype=torch.float64)
    weight, labels = torch.eye(v, dtype=torch.float64), torch.randint(v, (n,), generator=g)
    hidden = start + near * torch.randn(n, v, generator=g, dtype=torch.float64)
    given, found = own_top(start, weight, 16), []
    for gradient in ("exact", "sparse"):
        x, loss = hidden.clone().requires_grad_(), fl.TopKDistillationLoss(**kind, gradient=gradient, backend=backend)
        with coarse(2e-3):
            loss(x, weight, labels, **given).backward()
        found.append(x.grad)
    exact, sparse = found
    report, error = loss.gradient_report, (sparse - exact).abs().sum() / sparse.abs().sum()
    assert report.mode == "sparse" and report.bound <= 0.15
    assert error <= report.bound * (1 + report.bound) + 1e-12
    # Without a rest the gradient of the renormalised ones is at the k alone, so nothing of it is left out.
    assert report.exact_tokens or (report.bound > 0) == (kind["rest"] == "bucket" or kind["divergence"] == "forward")


def test_with_two_temperatures_gradients_are_exact_and_the_report_says_so():
    case = make(20, 8, 60)
    loss = fl.TopKDistillationLoss(temperature=2.0, nll_weight=0.1, gradient="sparse")
    hidden, head, _ = case.inputs(torch.float64)
    loss(hidden, head, case.labels, **teacher(case)).backward()
    assert loss.gradient_report.mode == "exact" and "two temperatures" in str(loss.gradient_report)


def test_several_chunks(monkeypatch):
    from fused_losses.backends import chunks

    case = make(129, 17, 123)
    given = teacher(case)
    for kind in KINDS:
        whole = ours(kind, case, given)
        with monkeypatch.context() as patch:
            patch.setattr(chunks, "CHUNK_BYTES", 1)
            parts = ours(kind, case, given)
        for output in whole:
            assert relative(parts[output], whole[output]) < 1e-13


# --- mistakes

IDS, LOGPROBS = torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.full((3, 2), -1.0)


@pytest.mark.parametrize(
    "ids, logprobs, error, message",
    [
        (None, LOGPROBS, ValueError, "TopKDistillationLoss needs teacher_ids=: the ids that the teacher names"),
        (IDS, None, ValueError, "TopKDistillationLoss needs teacher_logprobs=: the teacher's log-probabilities"),
        (IDS.int(), LOGPROBS, TypeError, r"teacher_ids: expected int64 token ids, got torch.int32; .*teacher_ids.long"),
        (IDS[:, 0], LOGPROBS, ValueError, r"teacher_ids: expected shape \[3, 'k'\], .* got \[3\]"),
        (IDS.repeat(1, 65), LOGPROBS, ValueError, "teacher_ids: expected 1 ≤ k ≤ 128 ids a token, got 130"),
        (IDS + 28, LOGPROBS, ValueError, "teacher_ids: expected 0 ≤ id < 30 .*got 30"),
        (IDS - 1, LOGPROBS, ValueError, "teacher_ids: .*or -100 for none, .*got -1"),
        (IDS // 2, LOGPROBS, ValueError, "teacher_ids: expected no id twice at a token, got 0 twice"),
        (
            IDS,
            LOGPROBS[:, :1],
            ValueError,
            r"teacher_logprobs: expected the shape of teacher_ids \[3, 2\].*got \[3, 1\]",
        ),
        (IDS, [1, 2], TypeError, "teacher_logprobs: expected a tensor of the labels' shape .* and a last dimension k"),
        (IDS, -LOGPROBS, ValueError, "teacher_logprobs: expected log-probabilities, ≤ 0, got 1; give logits with"),
        (IDS, LOGPROBS / 3, ValueError, "teacher_logprobs: .*sum to at most 1 at a token, got a sum of 1.43"),
        (IDS, LOGPROBS * torch.nan, ValueError, "teacher_logprobs: expected finite numbers, or -inf .*got nan"),
    ],
)
def test_bad_fields(ids, logprobs, error, message):
    call = fl.TopKDistillationLoss(), torch.randn(3, 8), torch.randn(30, 8), torch.arange(3)
    call[0](*call[1:], teacher_ids=IDS, teacher_logprobs=LOGPROBS)
    given = {key: v for key, v in (("teacher_ids", ids), ("teacher_logprobs", logprobs)) if v is not None}
    with pytest.raises(error, match=message):
        call[0](*call[1:], **given)


def test_logits_and_duplicates_where_they_do_no_harm():
    hidden, weight, labels = torch.randn(3, 8), torch.randn(30, 8), torch.tensor([1, -100, 2])
    ids, logits = IDS.clone(), torch.tensor([[5.0, 3.0], [torch.nan, 9.0], [-2.0, torch.nan]])
    ids[1], ids[2, 1] = 999, -100
    loss = fl.TopKDistillationLoss(normalise=True)
    found = loss(hidden, weight, labels, teacher_ids=ids, teacher_logprobs=logits)
    shifted = loss(hidden, weight, labels, teacher_ids=ids, teacher_logprobs=logits + 2)
    assert found.item() == pytest.approx(shifted.item(), rel=1e-6) and found.isfinite()


def test_bad_options():
    with pytest.raises(ValueError, match="divergence: expected forward or reverse or jsd, got 'kl'"):
        fl.TopKDistillationLoss("kl")
    with pytest.raises(ValueError, match="rest: expected none or bucket, got True"):
        fl.TopKDistillationLoss(rest=True)
    with pytest.raises(ValueError, match="normalise: expected True or False, got 'yes'"):
        fl.TopKDistillationLoss(normalise="yes")
    with pytest.raises(TypeError, match="has no option kd_normalize_topk; did you mean normalise"):
        fl.TopKDistillationLoss(kd_normalize_topk=True)
    with pytest.raises(TypeError, match="reference: TopKDistillationLoss has no use for one"):
        fl.TopKDistillationLoss().check_call(fl.Reference(torch.zeros(3, 8)), {})
