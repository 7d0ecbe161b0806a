"""Objectives that select or weigh tokens by what two models say of them: their borders, and what they refuse."""

import math

import pytest
import torch
from cases import make, relative
from test_patched_layouts import IDS, LABELS, TOLERANCE, VALID, build, token_nll
from torch.nn import functional as F

import fused_losses as fl
from fused_losses import backends
from fused_losses import reference as oracle

V = 123
KERNELS = pytest.param("cpu", marks=pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="no kernels"))


def inputs(reference="own", **options):
    case = make(33, 17, V, reference=reference, **options)
    hidden, head, ref = case.inputs(torch.float64)
    keep = case.labels >= 0
    z, z_ref = hidden[keep] @ head.weight.T, ref.hidden[keep] @ (head if ref.head is None else ref.head).weight.T
    return (hidden, head, case.labels), ref, z, z_ref.detach(), keep


def with_nll(*nll):
    """hidden and a head of two tokens such that label 0 has these losses: z = (−log(eˡ − 1), 0)."""
    loss = torch.tensor(nll, dtype=torch.float64)
    return (-torch.log(torch.expm1(loss)))[:, None].requires_grad_(), torch.tensor([[1.0], [0.0]], dtype=torch.float64)


# --- STM


def test_stm_of_a_reference_is_that_of_its_losses_in_a_field():
    call, ref, _, z_ref, keep = inputs()
    initial = torch.full((33,), torch.nan, dtype=torch.float64)
    initial[keep] = oracle.nll(z_ref, call[2][keep])
    for reduction in ("token_mean", "kept_mean"):
        loss = fl.STMLoss(30.0, reduction)
        by_field, by_model = loss(*call, initial_token_nll=initial), loss(*call, reference=ref)
        assert by_field.item() == pytest.approx(by_model.item(), rel=1e-12)
        for a, b in zip(*(torch.autograd.grad(x, call[0]) for x in (by_field, by_model)), strict=True):
            assert relative(a, b) < 1e-12


def test_stm_drops_tokens_as_labels_of_minus_100_do():
    """The authors' way: labels of the others are removed, and cross-entropy takes the mean of what is left."""
    call, ref, _, z_ref, keep = inputs()
    hidden, head, labels = call
    dropped = labels.clone()
    dropped[keep] = labels[keep].masked_fill(oracle.nll(z_ref, labels[keep]) >= math.log(30), -100)
    assert 0 < (dropped >= 0).sum() < keep.sum()
    truth = fl.CrossEntropyLoss()(hidden, head, dropped)
    kept, whole = (fl.STMLoss(30.0, how)(*call, reference=ref) for how in ("kept_mean", "token_mean"))
    assert kept.item() == pytest.approx(truth.item(), rel=1e-12)
    assert whole.item() == pytest.approx(truth.item() * ((dropped >= 0).sum() / keep.sum()).item(), rel=1e-6)
    items = fl.STMLoss(30.0, "kept_mean")(*call, reference=ref, num_items=7)
    assert items.item() == pytest.approx(truth.item() * (dropped >= 0).sum().item() / 7, rel=1e-12)


@pytest.mark.parametrize("reduction", ["token_mean", "kept_mean"])
def test_stm_that_keeps_nothing_or_everything(reduction):
    call, *_ = inputs()
    loss = fl.STMLoss(reduction=reduction)
    nothing = loss(*call, initial_token_nll=torch.full((33,), math.log(2.5)))
    nothing.backward()
    assert nothing == 0 and (call[0].grad == 0).all()
    everything = loss(*call, initial_token_nll=torch.full((33,), math.log(2.4999)))
    assert everything.item() == pytest.approx(fl.CrossEntropyLoss()(*call).item(), rel=1e-12)


def test_stm_needs_one_start_model():
    call, ref, *_ = inputs()
    with pytest.raises(ValueError, match=r"STMLoss needs one of reference=.* and initial_token_nll=.*; got neither"):
        fl.STMLoss()(*call)
    with pytest.raises(ValueError, match="got both"):
        fl.STMLoss()(*call, reference=ref, initial_token_nll=torch.ones(33))
    with pytest.raises(ValueError, match="initial_token_nll: expected finite numbers ≥ 0, got -1"):
        fl.STMLoss()(*call, initial_token_nll=-torch.ones(33))
    with pytest.raises(ValueError, match="threshold: expected a finite number > 1, got 1"):
        fl.STMLoss(1.0)
    with pytest.raises(ValueError, match="reduction: expected token_mean or kept_mean, got 'mean'"):
        fl.STMLoss(reduction="mean")


def test_stm_in_a_patched_model():
    """By the model as it was, and by a column, each shifted with the labels."""
    start, trained = build(seed=3), build(seed=0)
    nll, initial = token_nll(trained), token_nll(start)
    threshold = initial[VALID].median().exp().item() * 1.001
    want = (nll * (initial < math.log(threshold)) * VALID).sum() / VALID.sum()
    with fl.patched(trained, fl.STMLoss(threshold), reference=start):
        torch.testing.assert_close(trained(IDS, labels=LABELS).loss.double(), want, rtol=TOLERANCE, atol=0)
    column = torch.zeros(LABELS.shape)
    column[:, 1:] = initial
    model = build(seed=0)
    with fl.patched(model, fl.STMLoss(threshold)):
        loss = model(IDS, labels=LABELS, initial_token_nll=column).loss
        torch.testing.assert_close(loss.double(), want, rtol=TOLERANCE, atol=0)
        with pytest.raises(ValueError, match="STMLoss needs one of"):
            model(IDS, labels=LABELS)
    fl.patch(model, fl.STMLoss(threshold, "kept_mean"))
    assert not model.accepts_loss_kwargs


def test_the_start_models_losses_may_be_a_column_of_a_data_set():
    rows = [
        {"input_ids": [5, 6, 7], "initial_token_nll": [0, 1, 2]},
        {"input_ids": [5, 6], "initial_token_nll": [0, 3]},
    ]
    batch = fl.huggingface.AnchorCollator(0)(rows)
    assert batch["initial_token_nll"].tolist() == [[0.0, 1.0, 2.0], [0.0, 3.0, 0.0]] and "confidence" not in batch


# --- InfoSFT


def test_infosft_weights_by_hand():
    """0 at certainty and from P on, most in the middle, vanishing for impossible tokens."""
    p = torch.tensor([1e-12, 0.05, 0.4, 0.9, 0.93, 0.99], dtype=torch.float64)
    hidden, weight = with_nll(*(-p.log()).tolist())
    loss = fl.InfoSFTLoss()(hidden, weight, torch.zeros(6, dtype=torch.int64), num_items=1)
    gradient = torch.autograd.grad(loss, hidden)[0][:, 0]
    logit = torch.log(p / (1 - p))
    expected = p * (1 - logit / math.log(0.93 / 0.07)).clamp(min=0)
    torch.testing.assert_close(-gradient / (1 - p), expected, rtol=1e-6, atol=1e-9)
    assert gradient[5] == 0 and expected.argmax() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infosft_of_certain_and_impossible_tokens_is_finite(dtype):
    hidden = torch.tensor([[300.0], [-300.0], [1e-3]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=dtype)
    loss = fl.InfoSFTLoss()(hidden, weight, torch.zeros(3, dtype=torch.int64))
    loss.backward()
    assert loss.isfinite() and hidden.grad.isfinite().all()
    assert hidden.grad[:2].abs().double().max() < 1e-100 and hidden.grad[2] != 0


@pytest.mark.parametrize("wrong", [0.5, 1.0, 0.3, 2])
def test_infosft_needs_a_probability_above_a_half(wrong):
    with pytest.raises(ValueError, match=rf"max_probability: expected a finite number > 0.5 and < 1, got {wrong}"):
        fl.InfoSFTLoss(wrong)


# --- Mask the Target

LOGITS = [-60.0, -5.0, 0.0, 3.0, 8.0, 12.0, 20.0, 40.0, 90.0, 200.0]  # of the label over the others


def certain(backend, dtype, gradient="exact"):
    """Each pair of certainties of model and reference: the loss, ∂/∂z [tokens, V], its truth; W the identity."""
    v, n = 40, len(LOGITS) ** 2
    g = torch.Generator().manual_seed(0)
    z, z_ref = torch.randn(n, v, generator=g, dtype=torch.float64), torch.randn(n, v, generator=g, dtype=torch.float64)
    labels = torch.randint(v, (n,), generator=g)
    margin, margin_ref = torch.cartesian_prod(torch.tensor(LOGITS), torch.tensor(LOGITS)).double().T
    z.scatter_(1, labels[:, None], margin[:, None]), z_ref.scatter_(1, labels[:, None], margin_ref[:, None])
    z, z_ref = z.to(dtype).requires_grad_(), z_ref.to(dtype)
    loss = fl.MaskTheTargetLoss(1.0, backend=backend, gradient=gradient)
    value = loss(z, torch.eye(v, dtype=dtype), labels, reference=fl.Reference(z_ref), num_items=1)
    gradient = torch.autograd.grad(value, z)[0]
    z, z_ref = z.detach().double().requires_grad_(), z_ref.double()
    truth = torch.autograd.grad(oracle.mask_the_target(z, z_ref, labels, 1.0).sum(), z)[0]
    return value.detach(), gradient, truth, oracle.nll(z_ref, labels)


@pytest.mark.parametrize("backend", ["torch", KERNELS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mask_the_target_near_certainty(backend, dtype):
    """Never infinite or NaN, nor large; the twin's where the reference leaves more than 1e-6 to others."""
    value, gradient, of_truth, ref_nll = certain(backend, dtype)
    assert value.isfinite() and gradient.isfinite().all()
    clear = -torch.expm1(-ref_nll) > 1e-6
    # Where a model that is certain meets a reference that is not, 1 − p is cut off.
    cut = torch.cartesian_prod(torch.tensor(LOGITS), torch.tensor(LOGITS))[:, 0] > 60
    assert 40 < (clear & ~cut).sum() < 60
    difference = (gradient.double() - of_truth).abs().sum(1)
    assert difference[clear & ~cut].max() < (7e-4 if dtype == torch.float32 else 3e-9)  # measured 2.5e-4 and 9e-10
    assert gradient.abs().sum(1).max() < 4  # ‖∂nll/∂z‖₁ ≤ 2 and ‖∂KL/∂z‖₁ ≤ 2


@pytest.mark.parametrize("backend", ["torch", KERNELS])
def test_mask_the_target_near_certainty_in_sparse_mode(backend):
    value, gradient, *_ = certain(backend, torch.float32, "sparse")
    assert value.isfinite() and gradient.isfinite().all() and gradient.abs().sum(1).max() < 4


def test_mask_the_target_leaves_the_label_alone():
    """The KL's gradient at the label's logit is 0, and none where only the label's probability differs."""
    z_ref = torch.randn(5, 9, dtype=torch.float64)
    labels = torch.arange(5)
    z = z_ref.clone().scatter_add_(1, labels[:, None], torch.ones(5, 1, dtype=torch.float64)).requires_grad_()
    both = [
        loss(z, torch.eye(9, dtype=torch.float64), labels, **given)
        for loss, given in (
            (fl.MaskTheTargetLoss(3.0), {"reference": fl.Reference(z_ref)}), (fl.CrossEntropyLoss(), {})
        )
    ]  # fmt: skip
    assert both[0].item() == pytest.approx(both[1].item(), rel=1e-12)
    both.append(fl.SFTKLLoss(3.0)(z, torch.eye(9, dtype=torch.float64), labels, reference=fl.Reference(z_ref)))
    masked, plain, held = (torch.autograd.grad(loss, z)[0] for loss in both)
    assert (masked - plain).abs().max() < 1e-14 and (held - plain).abs().max() > 1e-3


def test_mask_the_target_in_sparse_mode_is_within_its_certificate():
    v, n = 300, 40
    case = make(n, 8, v, reference="shared", ignored=0, spread=4.0)
    z, z_ref = case.hidden @ case.weight.T, case.reference_hidden @ case.weight.T
    z.requires_grad_()
    loss = fl.MaskTheTargetLoss(0.5, gradient="sparse")
    eye = torch.eye(v, dtype=torch.float64)
    got = torch.autograd.grad(loss(z, eye, case.labels, reference=fl.Reference(z_ref)), z)[0]
    truth = torch.autograd.grad(oracle.mask_the_target(z, z_ref, case.labels, 0.5).mean(), z)[0]
    report = loss.gradient_report
    assert report.mode == "sparse" and report.bound <= 0.15
    assert (got - truth).abs().sum() <= report.bound * got.abs().sum() * (1 + report.bound) + 1e-12


# --- SFT + KL


def test_sft_kl_without_a_price_is_cross_entropy():
    call, ref, *_ = inputs()
    loss = fl.SFTKLLoss(0)(*call, reference=ref)
    assert loss.item() == pytest.approx(fl.CrossEntropyLoss()(*call).item(), rel=1e-12)
    with pytest.raises(ValueError, match="SFTKLLoss needs reference="):
        fl.SFTKLLoss(0.1)(*call)
    with pytest.raises(ValueError, match="kl_weight: expected a finite number ≥ 0"):
        fl.SFTKLLoss(-1)


# --- LAwF with a target probability


def marked():
    """A call, its reference, every other token marked, and the reference's probability of the labels."""
    call, ref, _, z_ref, keep = inputs()
    r = torch.zeros(33, dtype=torch.float64)
    r[keep] = (-oracle.nll(z_ref, call[2][keep])).exp()
    return call, ref, (torch.arange(33) % 2 == 0).double().masked_fill(~keep, 0), r


def test_lawf_target_is_the_confidence_that_makes_it():
    call, ref, mark, r = marked()
    target = r[mark > 0].median().item() + 1e-9
    confidence = torch.where((mark > 0) & (r < target), (target - r) / (1 - r), 0)
    assert 0 < (confidence > 0).sum() < (mark > 0).sum()
    want = fl.LAwFLoss(2.0, 0.5)(*call, confidence=confidence, reference=ref)
    targets = torch.full_like(mark, target).masked_fill(mark == 0, torch.nan)
    for loss, given in (
        (fl.LAwFLoss(2.0, 0.5, target_probability=target), {}),
        (fl.LAwFLoss(2.0, 0.5), {"target_probability": targets}),
        (fl.LAwFLoss(2.0, 0.5, target_probability=0.9), {"target_probability": targets}),  # the field decides
    ):
        got = loss(*call, confidence=mark * 0.01, reference=ref, **given)
        assert got.item() == pytest.approx(want.item(), rel=1e-12)
        assert relative(*(torch.autograd.grad(x, call[0], retain_graph=True)[0] for x in (got, want))) < 1e-12


def test_a_model_at_its_target_is_at_rest():
    """p = q, so neither loss nor gradient; the reference agrees more at some anchors, which are then retained."""
    z_ref = torch.randn(6, 9, dtype=torch.float64)
    z_ref[3:, 0] = 9.0
    labels, mark = torch.zeros(6, dtype=torch.int64), torch.ones(6)
    target = 0.7
    r = z_ref.softmax(1)[:, 0]
    z = z_ref.clone()
    z[:3, 0] += torch.log(target / (1 - target) * (1 - r[:3]) / r[:3])
    z.requires_grad_()
    loss = fl.LAwFLoss(target_probability=target)
    value = loss(z, torch.eye(9, dtype=torch.float64), labels, confidence=mark, reference=fl.Reference(z_ref))
    assert abs(value.item()) < 1e-15 and torch.autograd.grad(value, z)[0].abs().max() < 1e-15


def test_lawf_group_mean_with_a_target_takes_a_pair_of_items():
    call, ref, mark, r = marked()
    target = r[mark > 0].median().item() + 1e-9
    anchors = int(((mark > 0) & (r < target)).sum())
    loss = fl.LAwFLoss(2.0, 0.5, "group_mean", target)
    whole = loss(*call, confidence=mark, reference=ref)
    pair = loss(*call, confidence=mark, reference=ref, num_items=(anchors, int((call[2] >= 0).sum()) - anchors))
    assert 0 < anchors < int((mark > 0).sum()) and pair.item() == pytest.approx(whole.item(), rel=1e-12)
    assert relative(*(torch.autograd.grad(x, call[0])[0] for x in (pair, whole))) < 1e-12


@pytest.mark.parametrize("wrong", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_target_is_a_probability_at_every_anchor(wrong):
    call, ref, *_, keep = inputs()
    mark = torch.zeros(33).masked_fill(keep & (torch.arange(33) % 4 == 0), 1)
    targets = torch.full((33,), 0.5)
    fl.LAwFLoss()(*call, confidence=mark, reference=ref, target_probability=targets.masked_fill(mark == 0, wrong))
    targets[int(mark.nonzero()[-1])] = wrong
    with pytest.raises(
        ValueError, match="target_probability: expected numbers above 0 and below 1 at every anchor, got"
    ):
        fl.LAwFLoss()(*call, confidence=mark, reference=ref, target_probability=targets)
    if not math.isnan(wrong):
        with pytest.raises(ValueError, match="target_probability: expected a finite number > 0 and < 1, got"):
            fl.LAwFLoss(target_probability=wrong)
    with pytest.raises(ValueError, match="LAwFLoss needs confidence="):
        fl.LAwFLoss(target_probability=0.5)(*call, reference=ref)


def test_target_probabilities_of_a_batch_move_with_the_labels():
    rows = [{"input_ids": row.tolist(), "labels": y.tolist(), "anchors": [[7, 0.5]], "target_probability": [0.0] * 7 + [p] + [0.0] * 3}
            for row, y, p in zip(IDS, LABELS, (0.2, 0.5, 0.9), strict=True)]  # fmt: skip
    batch = fl.huggingface.AnchorCollator(0)(rows)
    model, start = build(seed=0), build(seed=3)
    with torch.no_grad():
        z, z_ref = (m.double()(IDS).logits[:, :-1][VALID] for m in (build(seed=0), build(seed=3)))
    marked, target = (batch[name][:, 1:][VALID] for name in ("confidence", "target_probability"))
    want = oracle.lawf_with_target(z, z_ref, LABELS[:, 1:][VALID], marked > 0, target).mean()
    with fl.patched(model, fl.LAwFLoss(), reference=start):
        torch.testing.assert_close(model(**batch).loss.double(), want, rtol=TOLERANCE, atol=0)
    untargeted = oracle.lawf(z, z_ref, LABELS[:, 1:][VALID], marked).mean()
    assert abs(want / untargeted - 1) > 1e-3


# --- EKSFT


def eksft_by_hand(z, z_ref, labels, share, selection):
    """Of sorted lists, in plain Python: mean nll off M, mean H / ln V, mean KL(p ‖ p_ref)."""
    p, log_p, log_r = z.softmax(1), z.log_softmax(1), z_ref.log_softmax(1)
    h, kl = -(p * log_p).sum(1), (p * (log_p - log_r)).sum(1)
    count = math.floor(share * len(labels))
    top = [sorted(range(len(labels)), key=lambda t: -float(x[t]))[:count] for x in (h, kl)]
    out = set(top[0]) | set(top[1]) if selection == "union" else set(top[0]) & set(top[1])
    nll = [-float(log_p[t, labels[t]]) for t in range(len(labels)) if t not in out]
    means = [sum(part) / len(part) for part in (nll, h[top[0]].tolist(), kl[top[1]].tolist())]
    return means[0] - 0.05 * means[1] / math.log(z.shape[1]) + 0.05 * means[2]


@pytest.mark.parametrize("selection", ["union", "intersection"])
@pytest.mark.parametrize("share", [0.2, 0.37])
def test_eksft_by_hand(selection, share):
    call, ref, z, z_ref, keep = inputs()
    loss = fl.EKSFTLoss(share, selection=selection)(*call, reference=ref)
    assert loss.item() == pytest.approx(eksft_by_hand(z.detach(), z_ref, call[2][keep], share, selection), rel=1e-10)


def test_eksft_of_too_few_tokens_is_cross_entropy():
    call, ref, *_ = inputs()
    hidden, head, labels = call
    few = labels.clone()
    few[(labels >= 0).nonzero().flatten()[4:]] = -100
    loss = fl.EKSFTLoss()(hidden, head, few, reference=ref)
    assert loss.item() == pytest.approx(fl.CrossEntropyLoss()(hidden, head, few).item(), rel=1e-12)


def test_eksft_of_all_tokens_learns_no_label():
    call, ref, *_ = inputs()
    hidden, head, labels = call
    first = fl.EKSFTLoss(1.0, 0.3, 0.7)(hidden, head, labels, reference=ref)
    other = fl.EKSFTLoss(1.0, 0.3, 0.7)(hidden, head, torch.where(labels >= 0, 5, -100), reference=ref)
    assert first.item() == pytest.approx(other.item(), rel=1e-12)


def test_eksft_takes_the_first_of_equals():
    """Equal tokens: two of ten, whatever the order in which a sort would leave them."""
    z = torch.zeros(10, 7, dtype=torch.float64).requires_grad_()
    eye, labels = torch.eye(7, dtype=torch.float64), torch.arange(10) % 7
    loss = fl.EKSFTLoss(reduction="token_mean")(z, eye, labels, reference=fl.Reference(z.detach()), num_items=1)
    gradient = torch.autograd.grad(loss, z)[0]
    nll = torch.autograd.grad(F.cross_entropy(z, labels, reduction="sum"), z)[0]
    assert gradient[:2].abs().max() < 1e-16 and torch.allclose(gradient[2:], nll[2:])


def test_eksft_raises_the_entropy_and_lowers_the_divergence():
    call, ref, *_ = inputs()
    hidden, head, labels = call
    loss = fl.EKSFTLoss(1.0, 1.0, 0.0)(hidden, head, labels, reference=ref)
    step = hidden.detach() - 0.1 * torch.autograd.grad(loss, hidden)[0]
    before, after = (fl.token_losses(h, head, labels).entropy.mean() for h in (hidden, step))
    assert after > before
    loss = fl.EKSFTLoss(1.0, 0.0, 1.0)(hidden, head, labels, reference=ref)
    step = hidden.detach() - 0.1 * torch.autograd.grad(loss, hidden)[0]
    before, after = (
        fl.token_losses(h, head, labels, reference=ref, beta=1.0).divergence.mean() for h in (hidden, step)
    )
    assert after < before


def test_eksft_is_exact_and_the_report_says_so():
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(9000, 8)
    loss = fl.EKSFTLoss(gradient="sparse")
    loss(hidden, weight, torch.arange(9), reference=fl.Reference(hidden.detach() + 1)).backward()
    assert "has no sparse form" in str(loss.gradient_report)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(fraction=0), "fraction: expected a finite number > 0 and ≤ 1, got 0"),
        (dict(fraction=1.2), "fraction: expected .*got 1.2"),
        (dict(selection="both"), "selection: expected union or intersection, got 'both'"),
        (dict(reduction="mean"), "reduction: expected group_mean or token_mean, got 'mean'"),
        (dict(entropy_weight=-1), "entropy_weight: expected a finite number ≥ 0"),
    ],
)
def test_options_of_eksft(options, message):
    with pytest.raises(ValueError, match=message):
        fl.EKSFTLoss(**options)


def test_means_of_eksft_cannot_be_accumulated():
    call, ref, *_ = inputs()
    with pytest.raises(ValueError, match=r"num_items: reduction='group_mean' takes means within the call, got 7"):
        fl.EKSFTLoss()(*call, reference=ref, num_items=7)
    model = fl.patch(build(), fl.EKSFTLoss(), reference=build(seed=3))
    assert not model.accepts_loss_kwargs
    with pytest.raises(ValueError, match="token_mean"):
        model(IDS, labels=LABELS, num_items_in_batch=3)


@pytest.mark.parametrize("reduction", ["group_mean", "token_mean"])
def test_eksft_in_a_patched_model(reduction):
    model, start = build(seed=0), build(seed=3)
    with torch.no_grad():
        z, z_ref = (m.double()(IDS).logits[:, :-1][VALID] for m in (build(seed=0), build(seed=3)))
    want = oracle.eksft(z, z_ref, LABELS[:, 1:][VALID], reduction=reduction)
    with fl.patched(model, fl.EKSFTLoss(reduction=reduction), reference=start):
        torch.testing.assert_close(model(IDS, labels=LABELS).loss.double(), want, rtol=TOLERANCE, atol=0)


# --- peers' conventions


def test_the_lower_median_of_an_even_number_of_sequences():
    """torch.median takes the lower; of an odd number nothing changes."""
    for rows, means in (([0.1, 2.0, 9.0, 3.0], (2.0, 2.5)), ([0.1, 2.0, 9.0], (2.0, 2.0))):
        hidden, weight = with_nll(*rows)
        labels = torch.zeros(len(rows), 1, dtype=torch.int64)
        for how, tau in zip(("lower", "mean"), means, strict=True):
            loss = fl.TALRLoss(even_median=how)(hidden[:, None], weight, labels)
            assert loss.item() == pytest.approx(fl.TALRLoss(tau)(hidden[:, None], weight, labels).item(), rel=1e-10)
        assert torch.tensor(rows).median().item() == pytest.approx(means[0])
    with pytest.raises(ValueError, match="even_median: expected mean or lower, got 'upper'"):
        fl.TALRLoss(even_median="upper")
    assert repr(fl.TALRLoss(even_median="lower")).endswith("floor=0.01, even_median='lower')")


def test_the_upper_clip_of_psft_may_be_another():
    nll = torch.linspace(0.9, 2.0, 9, dtype=torch.float64)
    hidden, weight = with_nll(*nll.tolist())
    old = nll + torch.log(torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.27, 1.29, 3.0], dtype=torch.float64))
    labels = torch.zeros(9, dtype=torch.int64)
    for high, clipped in ((None, 5), (0.28, 7)):
        loss = fl.PSFTLoss(epsilon_high=high)(hidden, weight, labels, old_nll=old, num_items=1)
        assert (torch.autograd.grad(loss, hidden)[0] == 0).flatten().tolist() == [t >= clipped for t in range(9)]
        least = torch.minimum((old - nll).exp(), torch.tensor(1 + (high or 0.2)))
        assert loss.item() == pytest.approx(-least.sum().item(), rel=1e-6)
    with pytest.raises(ValueError, match="epsilon_high: expected a finite number > 0, got 0"):
        fl.PSFTLoss(epsilon_high=0)
    loss = fl.PSFTLoss(epsilon_high=0.28)
    loss.epsilon_high = None
    assert repr(loss) == "PSFTLoss(epsilon=0.2)"


def test_the_normaliser_of_eaft_may_be_a_number():
    """LLaMA-Factory's 3.0 is 0.14 % above ln 20."""
    call, *_ = inputs()
    ours, theirs = fl.EAFTLoss()(*call), fl.EAFTLoss(normaliser=3.0)(*call)
    assert theirs.item() == pytest.approx(ours.item() * math.log(20) / 3, rel=1e-12)
    with pytest.raises(ValueError, match="normaliser: expected a finite number > 0, got 0"):
        fl.EAFTLoss(normaliser=0)
