"""Objectives against direct transcriptions of their formulas, and the mechanics they share."""

import math

import pytest
import torch
from cases import make, relative

import fused_losses as fl
from fused_losses import reference as oracle

VALID = slice(None)


def inputs(dtype=torch.float64, reference=None, seed=0, **options):
    case = make(24, 9, 41, bias=True, scale=0.8, softcap=6.0, reference=reference, seed=seed, **options)
    hidden, head, ref = case.inputs(dtype)
    return hidden, head, case.labels, ref


def logits_of_valid(hidden, head, labels, ref):
    keep = labels.flatten() != -100
    z = oracle.logits(hidden.flatten(0, -2)[keep], head)
    z_ref = None
    if ref is not None:
        own = head if ref.head is None else ref.head
        z_ref = oracle.logits(ref.hidden.flatten(0, -2)[keep], own).detach()
    return z, z_ref, labels.flatten()[keep], keep


def check(loss, truth, hidden, head, tolerance=1e-10):
    """Values and gradients of a scalar loss and of its transcription agree."""
    leaves = [t for t in (hidden, head.weight, head.bias) if t is not None and t.requires_grad]
    got, expected = torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, leaves, retain_graph=True)
    assert loss.item() == pytest.approx(truth.item(), rel=tolerance, abs=1e-14)
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) < tolerance


def objectives(n=24):
    """Every objective with its call arguments and its transcription: (module, kwargs, truth(z, z_ref, y, keep))."""
    c = torch.zeros(n, dtype=torch.float64)
    c[::3], c[1::6] = 1.0, 0.3
    old = torch.linspace(0.5, 6.0, n, dtype=torch.float64)
    rows = torch.arange(n) // 6
    start = torch.tensor([0.4, 1.1, 2.0, 3.3], dtype=torch.float64)
    g = torch.Generator().manual_seed(7)
    logprobs, ids = (2 * torch.randn(n, 40, generator=g, dtype=torch.float64)).log_softmax(-1).topk(4)
    ids[::5, 2:] = -100
    named = dict(teacher_ids=ids, teacher_logprobs=logprobs)
    return {
        "cross_entropy": (fl.CrossEntropyLoss(), {}, lambda z, r, y, k: oracle.cross_entropy(z, y)),
        "talr-fixed": (fl.TALRLoss(1.3), {}, lambda z, r, y, k: oracle.talr(z, y, 1.3)),
        "talr-median": (
            fl.TALRLoss(),
            dict(sequence_ids=rows),
            lambda z, r, y, k: oracle.talr(z, y, oracle.talr_temperature(oracle.nll(z, y), rows[k])),
        ),
        "lawf": (fl.LAwFLoss(), dict(confidence=c), lambda z, r, y, k: oracle.lawf(z, r, y, c[k])),
        "lawf-weights": (
            fl.LAwFLoss(2.1, 0.3), dict(confidence=c), lambda z, r, y, k: oracle.lawf(z, r, y, c[k], 2.1, 0.3),
        ),
        "flow": (
            fl.FLOWLoss(1.5),
            dict(initial_nll=start, sequence_ids=rows),
            lambda z, r, y, k: oracle.flow(z, y, start[rows[k]], 1.5),
        ),
        "dft": (fl.DFTLoss(), {}, lambda z, r, y, k: oracle.dft(z, y)),
        "asft": (fl.ASFTLoss(0.2), {}, lambda z, r, y, k: oracle.asft(z, r, y, 0.2)),
        "eaft": (fl.EAFTLoss(2.0, top_k=7), {}, lambda z, r, y, k: oracle.eaft(z, y, 2.0, 7)),
        "psft": (fl.PSFTLoss(0.2), dict(old_nll=old), lambda z, r, y, k: oracle.psft(z, y, old[k], 0.2)),
        "jsd": (fl.JSDLoss(0.3), {}, lambda z, r, y, k: oracle.jsd(z, r, y, 0.3)),
        "jsd-forward": (fl.JSDLoss(0, 1.0, 0.2), {}, lambda z, r, y, k: oracle.jsd(z, r, y, 0, 1.0, 0.2)),
        "jsd-warm": (fl.JSDLoss(0.8, 2.5, 0.2), {}, lambda z, r, y, k: oracle.jsd(z, r, y, 0.8, 2.5, 0.2)),
        "topk": (
            fl.TopKDistillationLoss(), named, lambda z, r, y, k: oracle.topk_distillation(z, y, ids[k], logprobs[k]),
        ),
        "topk-rest": (
            fl.TopKDistillationLoss("jsd", 0.3, "bucket", temperature=2.0, nll_weight=0.5), named,
            lambda z, r, y, k: oracle.topk_distillation(z, y, ids[k], logprobs[k], "jsd", 0.3, "bucket", 2.0, 0.5),
        ),
        "reverse_kl": (fl.ReverseKLLoss(0.7), {}, lambda z, r, y, k: oracle.reverse_kl(z, r, 0.7)),
    }  # fmt: skip


NAMES = sorted(objectives())


def call(name, hidden, head, labels, ref, **more):
    module, arguments, truth = objectives()[name]
    if "confidence" in arguments:
        arguments = arguments | {"confidence": arguments["confidence"].masked_fill(labels == -100, 0)}
    if module.needs_reference:
        arguments = arguments | {"reference": ref}
    return module(hidden, head, labels, **arguments, **more), truth


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("reference", ["shared", "own"])
def test_equals_its_formula(name, frozen, reference):
    hidden, head, labels, ref = inputs(reference=reference, frozen=frozen)
    loss, truth = call(name, hidden, head, labels, ref)
    z, z_ref, y, keep = logits_of_valid(hidden, head, labels, ref)
    check(loss, truth(z, z_ref, y, keep).sum() / len(y), hidden, head)


@pytest.mark.parametrize("name", NAMES)
def test_num_items_replaces_the_count(name):
    hidden, head, labels, ref = inputs(reference="shared")
    mean, _ = call(name, hidden, head, labels, ref)
    total = mean.item() * (labels != -100).sum().item()
    for items in (7, 7.0, torch.tensor(7), torch.tensor([7.0])):
        assert call(name, hidden, head, labels, ref, num_items=items)[0].item() == pytest.approx(total / 7, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_all_ignored_is_zero_and_connected(name):
    hidden, head, labels, ref = inputs(reference="shared")
    loss, _ = call(name, hidden, head, torch.full_like(labels, -100), ref)
    loss.backward()
    assert loss.item() == 0
    assert (hidden.grad == 0).all() and (head.weight.grad == 0).all() and (head.bias.grad == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_reference_backend_agrees(name):
    hidden, head, labels, ref = inputs(reference="own")
    fast, _ = call(name, hidden, head, labels, ref)
    module, arguments, _ = objectives()[name]
    slow = type(module).__new__(type(module))
    slow.__dict__.update(module.__dict__ | {"backend": "reference"})
    if module.needs_reference:
        arguments = arguments | {"reference": ref}
    check(fast, slow(hidden, head, labels, **arguments), hidden, head)


@pytest.mark.parametrize("name", NAMES)
def test_float32_and_bf16_stay_near_the_truth(name):
    hidden, head, labels, ref = inputs(reference="own")
    truth, _ = call(name, hidden, head, labels, ref)
    for dtype, tolerance in ((torch.float32, 6e-7), (torch.bfloat16, 3.5e-3)):
        x, h, _, r = inputs(dtype, reference="own")
        loss, _ = call(name, x, h, labels, r)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(truth.item(), rel=tolerance)
        loss.backward()
        assert x.grad.dtype == dtype and h.weight.grad.dtype == dtype


# TALR


def talr_by_hand(rows, floor=0.01):
    """τ, weights and loss of a batch given as lists of nll, written out in plain Python."""
    means = sorted(sum(row) / len(row) for row in rows if row)
    middle = len(means) // 2
    tau = max(means[middle] if len(means) % 2 else (means[middle - 1] + means[middle]) / 2, 1e-6)
    weights = [[max(math.exp(-loss / tau), floor) for loss in row] for row in rows]
    total = sum(w * loss for ws, ls in zip(weights, rows, strict=True) for w, loss in zip(ws, ls, strict=True))
    return tau, weights, total / sum(len(row) for row in rows)


def inputs_with_nll(nll):
    """hidden and a head of two tokens such that label 0 has the given nll: z = (−log(eˡ − 1), 0)."""
    hidden = torch.zeros(*nll.shape, 1, dtype=torch.float64)
    hidden[..., 0] = -torch.log(torch.expm1(nll))
    return hidden.requires_grad_(), torch.tensor([[1.0], [0.0]], dtype=torch.float64)


BATCHES = {
    "odd": [[0.1, 2.0, 9.0], [0.5, 0.5], [3.0, 1.0, 0.2, 0.1]],
    "even": [[0.1, 2.0, 9.0], [0.5, 0.5], [3.0, 1.0, 0.2, 0.1], [6.0]],
    "one": [[0.3, 4.0, 0.01]],
    "one-token": [[2.5]],
    "a-row-without-labels": [[0.1, 2.0, 9.0], [], [3.0, 1.0]],
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_talr_by_hand(batch, packed):
    rows = BATCHES[batch]
    _, weights, expected = talr_by_hand(rows)
    width = max(map(len, rows))
    nll = torch.ones(len(rows), width, dtype=torch.float64)
    labels, ids = torch.full(nll.shape, -100), torch.zeros(nll.shape, dtype=torch.int64)
    for i, row in enumerate(rows):
        nll[i, : len(row)], labels[i, : len(row)], ids[i] = torch.tensor(row, dtype=torch.float64), 0, 70 - 3 * i
    if packed:
        nll, labels, ids = nll.view(1, -1), labels.view(1, -1), ids.view(1, -1)
    hidden, weight = inputs_with_nll(nll)
    loss = fl.TALRLoss()(hidden, weight, labels, sequence_ids=ids if packed else None)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    flat = torch.tensor([w for row in weights for w in row], dtype=torch.float64)
    p = (-nll[labels == 0]).exp()
    n = (labels == 0).sum()
    torch.testing.assert_close(hidden.grad[labels == 0][:, 0], -flat * (1 - p) / n, rtol=1e-10, atol=0)
    assert (hidden.grad[labels != 0] == 0).all()


def test_talr_floor_and_temperature_bounds():
    hidden, weight = inputs_with_nll(torch.tensor([[40.0, 0.1]], dtype=torch.float64))
    labels = torch.zeros(1, 2, dtype=torch.int64)
    assert fl.TALRLoss(1.0, floor=0.01)(hidden, weight, labels).item() == pytest.approx(
        (0.01 * 40 + math.exp(-0.1) * 0.1) / 2, rel=1e-9
    )
    certain, weight = inputs_with_nll(torch.tensor([[1e-9, 1e-9]], dtype=torch.float64))
    loss = fl.TALRLoss()(certain, weight, labels)  # τ would be 1e-9
    assert loss.item() == pytest.approx(math.exp(-1e-3) * 1e-9, rel=1e-6)


def test_talr_weights_carry_no_gradient():
    """The gradient is w·∂nll, not ∂(w·nll) = w·(1 − nll/τ)·∂nll."""
    hidden, weight = inputs_with_nll(torch.tensor([2.0], dtype=torch.float64))
    fl.TALRLoss(1.0)(hidden, weight, torch.tensor([0])).backward()
    assert hidden.grad.item() == pytest.approx(-math.exp(-2) * (1 - math.exp(-2)), rel=1e-10)


# LAwF


@pytest.mark.parametrize("confidence", [0.0, 1.0, 0.25, 0.999])
def test_lawf_is_the_kl_of_the_explicit_mixture(confidence):
    hidden, head, labels, ref = inputs(reference="shared")
    c = torch.full(labels.shape, confidence, dtype=torch.float64).masked_fill(labels == -100, 0)
    loss = fl.LAwFLoss()(hidden, head, labels, confidence=c, reference=ref)
    z, z_ref, y, keep = logits_of_valid(hidden, head, labels, ref)
    check(loss, oracle.lawf(z, z_ref, y, c[keep]).mean(), hidden, head)
    if confidence == 0:
        assert loss.item() == pytest.approx(oracle.kl(z_ref, z).mean().item(), rel=1e-10)
    if confidence == 1:
        assert loss.item() == pytest.approx(oracle.nll(z, y).mean().item(), rel=1e-10)


def test_lawf_gradient_is_that_of_the_mixed_losses():
    hidden, head, labels, ref = inputs(reference="own")
    c = torch.rand(labels.shape, dtype=torch.float64).masked_fill(labels == -100, 0)
    loss = fl.LAwFLoss()(hidden, head, labels, confidence=c, reference=ref)
    out = fl.token_losses(hidden, head, labels, reference=ref)
    n = (labels != -100).sum()
    mixed = (c * out.nll + (1 - c) * out.kl).sum() / n
    for a, b in zip(
        torch.autograd.grad(loss, (hidden, head.weight)), torch.autograd.grad(mixed, (hidden, head.weight)), strict=True
    ):
        assert relative(a, b) < 1e-12


def test_lawf_group_mean():
    hidden, head, labels, ref = inputs(reference="shared")
    c = (torch.arange(24) % 4 == 0).double()
    z, z_ref, y, keep = logits_of_valid(hidden, head, labels, ref)
    anchors = c[keep] > 0
    truth = 2.0 * oracle.nll(z, y)[anchors].mean() + 0.5 * oracle.kl(z_ref, z)[~anchors].mean()
    module = fl.LAwFLoss(2.0, 0.5, reduction="group_mean")
    check(module(hidden, head, labels, confidence=c, reference=ref), truth, hidden, head)
    counts = (int(anchors.sum()) * 3, 11)
    truth = 2.0 * oracle.nll(z, y)[anchors].sum() / counts[0] + 0.5 * oracle.kl(z_ref, z)[~anchors].sum() / 11
    check(module(hidden, head, labels, confidence=c, reference=ref, num_items=counts), truth, hidden, head)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_lawf_group_mean_with_an_empty_group(value):
    hidden, head, labels, ref = inputs(reference="shared")
    c = torch.full(labels.shape, value, dtype=torch.float64).masked_fill(labels == -100, 0)
    mean = fl.LAwFLoss()(hidden, head, labels, confidence=c, reference=ref)
    assert fl.LAwFLoss(reduction="group_mean")(
        hidden, head, labels, confidence=c, reference=ref
    ).item() == pytest.approx(mean.item(), rel=1e-12)


def test_lawf_takes_bool_and_integer_confidence_and_ignores_nan_where_ignored():
    hidden, head, labels, ref = inputs(reference="shared")
    anchors = torch.arange(24) % 3 == 0
    module = fl.LAwFLoss()
    expected = module(hidden, head, labels, confidence=anchors.double(), reference=ref).item()
    assert module(hidden, head, labels, confidence=anchors, reference=ref).item() == expected
    assert module(hidden, head, labels, confidence=anchors.long(), reference=ref).item() == expected
    holes = anchors.double().masked_fill(labels == -100, torch.nan)
    assert module(hidden, head, labels, confidence=holes, reference=ref).item() == expected


def test_lawf_with_a_target_probability():
    """c = (p* − p_ref)/(1 − p_ref) makes the target of the label p*."""
    hidden, head, labels, ref = inputs(reference="shared", ignored=0)
    z, z_ref, y, _ = logits_of_valid(hidden, head, labels, ref)
    r = (-oracle.nll(z_ref, y)).exp()
    target = r + (1 - r) * 0.4
    c = (target - r) / (1 - r)
    q = (1 - c)[:, None] * z_ref.softmax(-1)
    q[torch.arange(len(y)), y] = target
    truth = (q * (q.log() - z.log_softmax(-1))).sum(-1).mean()
    check(fl.LAwFLoss()(hidden, head, labels, confidence=c, reference=ref), truth, hidden, head)


# Others


def test_flow_takes_rows_as_sequences():
    hidden, head, labels, _ = inputs()
    start = torch.tensor([0.4, 1.1, 2.0, 3.3])
    rows = torch.arange(24) // 6
    by_ids = fl.FLOWLoss(1.5)(hidden, head, labels, initial_nll=start, sequence_ids=rows)
    by_rows = fl.FLOWLoss(1.5)(hidden.view(4, 6, 9), head, labels.view(4, 6), initial_nll=start)
    assert by_ids.item() == pytest.approx(by_rows.item(), rel=1e-14)


def test_an_objective_of_ones_own():
    class Focal(fl.Objective):
        def token_loss(self, out):
            return (1 - (-out.nll).exp()) ** 2 * out.nll  # with a gradient through the weight

    hidden, head, labels, _ = inputs()
    z, _, y, _ = logits_of_valid(hidden, head, labels, None)
    nll = oracle.nll(z, y)
    check(Focal()(hidden, head, labels), ((1 - (-nll).exp()) ** 2 * nll).mean(), hidden, head)


def test_an_objective_without_token_loss_says_so():
    hidden, head, labels, _ = inputs()
    with pytest.raises(TypeError, match="must define token_loss"):
        fl.Objective()(hidden, head, labels)


def test_objectives_have_no_state_and_a_readable_repr():
    for module, _, _ in objectives().values():
        assert not list(module.parameters()) and not module.state_dict()
    assert repr(fl.TALRLoss()) == "TALRLoss(temperature='median', floor=0.01)"
    assert repr(fl.LAwFLoss(2.0)) == "LAwFLoss(anchor_weight=2.0, retain_weight=1.0, reduction='token_mean')"


def test_an_objective_of_ones_own_with_tensors_per_token():
    class Weighted(fl.Objective):
        def token_loss(self, out, weight):
            return weight * out.nll

    hidden, head, labels, _ = inputs()
    weight = torch.rand(labels.shape, dtype=torch.float64)
    z, _, y, keep = logits_of_valid(hidden, head, labels, None)
    check(Weighted()(hidden, head, labels, weight=weight), (weight[keep] * oracle.nll(z, y)).mean(), hidden, head)


def test_psft_far_below_the_old_policy_has_no_gradient():
    """r = exp(150): clipped, and not 0 · ∞ in backward."""
    hidden, head, labels, _ = inputs()
    fl.PSFTLoss()(hidden, head, labels, old_nll=torch.full(labels.shape, 200.0)).backward()
    assert (hidden.grad == 0).all()


def test_fp16_gradients_neither_overflow_nor_underflow_before_they_are_scaled():
    """One anchor among 8,192 tokens has a weight of 8,192 under group_mean; FLOW can have weights of e^-16."""
    torch.manual_seed(0)
    x, w = torch.randn(8192, 32).half(), (3 * torch.randn(50, 32)).half()
    labels = torch.randint(50, (8192,))
    anchors = (torch.arange(8192) == 17).float()
    lawf, flow = fl.LAwFLoss(5.0, reduction="group_mean"), fl.FLOWLoss(1.0)
    for loss, scale in (
        (lambda x: lawf(x, w.to(x), labels, confidence=anchors, reference=fl.Reference(x.detach() + 0.1)), 1.0),
        (lambda x: flow(x[None, :512], w.to(x), labels[None, :512], initial_nll=torch.tensor([16.0])), 65536.0),
    ):
        gradients = []
        for dtype in (torch.float16, torch.float64):
            leaf = x.to(dtype, copy=True).requires_grad_()
            (scale * loss(leaf)).backward()
            gradients.append(leaf.grad)
        assert gradients[0].isfinite().all() and relative(*gradients) < 9e-4


# Mistakes in an objective's use


@pytest.mark.parametrize("reduction", ["token_mean", "group_mean"])
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("where", ["padding", "prompt", "everything", "with weight 0.01"])
def test_an_anchor_without_a_label_is_an_error(where, ignore_index, reduction):
    hidden, weight, labels = torch.randn(2, 5, 8), torch.randn(30, 8), torch.randint(10, 30, (2, 5))
    confidence = torch.zeros(2, 5)
    confidence[:, 2] = 1
    module = fl.LAwFLoss(reduction=reduction, ignore_index=ignore_index)
    given = dict(confidence=confidence, reference=fl.Reference(hidden + 1))
    module(hidden, weight, labels, **given)
    lost = {"padding": (1, slice(2, 5)), "prompt": (0, slice(0, 3)), "everything": ..., "with weight 0.01": (1, 2)}[
        where
    ]
    labels[lost] = ignore_index
    if where == "with weight 0.01":
        confidence[1, 2] = 0.01
    count, first = (2, "[0, 2]") if where == "everything" else (1, "[0, 2]" if where == "prompt" else "[1, 2]")
    with pytest.raises(ValueError) as error:
        module(hidden, weight, labels, **given)
    message = str(error.value)
    assert (
        message.startswith("confidence: expected 0 where the label is ignored") and f"at {count} such tokens" in message
    )
    assert f"position {first}" in message and "give them their label" in message
    confidence[lost] = 0
    module(hidden, weight, labels, **given)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float64])
def test_an_anchor_without_a_label_in_flat_tensors_of_any_dtype(kind):
    hidden, weight, labels = torch.randn(4, 8), torch.randn(30, 8), torch.tensor([1, -100, 2, -100])
    confidence = torch.tensor([0, 0, 1, 1]).to(kind)
    with pytest.raises(ValueError, match=r"at 1 such tokens, first 1 at position \[3\]"):
        fl.LAwFLoss()(hidden, weight, labels, confidence=confidence, reference=fl.Reference(hidden))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_anchor_without_a_label_is_an_error_in_a_graph(backend):
    hidden, weight, labels = torch.randn(2, 5, 8), torch.randn(30, 8), torch.randint(30, (2, 5))
    module = fl.LAwFLoss(backend=backend)

    def loss(confidence, labels):
        return module(hidden, weight, labels, confidence=confidence, reference=fl.Reference(hidden + 1))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    confidence = torch.zeros(2, 5).index_fill(1, torch.tensor([1]), 0.5)
    assert compiled(confidence, labels).item() == pytest.approx(loss(confidence, labels).item(), rel=1e-6)
    labels[1, 1] = -100
    with pytest.raises(
        ValueError, match=r"confidence: expected 0 where .* at 1 such tokens, first 0.5 at position \[1, 1\]"
    ):
        compiled(confidence, labels)
