"""Mistakes that other implementations of these losses shipped, one test each, named after the mistake.

Sources are given as issue numbers of the projects where they were reported.
"""

import pytest
import torch
import torch.nn.functional as F
from cases import errors, make, relative, run

import fused_losses as fl
from fused_losses import reference as oracle
from fused_losses.backends import chunks


def test_every_rows_gradient_scaled_by_the_first_rows_upstream_gradient():
    """Liger #488, #872, #968: hidden by tests whose upstream gradients were all ones."""
    case = make(50, 8, 30, ignored=0)
    case.nll_upstream[:] = torch.linspace(-3, 5, 50)
    case.nll_upstream[0] = 0
    assert max(errors(case, torch.float64).values()) < 1e-12


@pytest.mark.parametrize("loss", [fl.CrossEntropyLoss(), None], ids=["summed", "per-token"])
def test_weight_gradient_accumulated_in_bf16_across_chunks(loss, monkeypatch):
    """Liger #512, #827, #830; CCE #14: small addends vanish in a bf16 sum, more so the more chunks there are."""
    hidden = (1 + torch.rand(2048, 8) / 8).bfloat16()
    weight, labels = torch.zeros(64, 8, dtype=torch.bfloat16), torch.arange(2048) % 64

    def gradient(chunk_bytes):
        monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
        w = weight.clone().requires_grad_()
        value = loss(hidden, w, labels) if loss else fl.token_losses(hidden, w, labels).nll.mean()
        value.backward()
        return w.grad

    w = weight.double().requires_grad_()
    F.cross_entropy(hidden.double() @ w.T, labels).backward()
    one, many = relative(gradient(1 << 30), w.grad), relative(gradient(1), w.grad)
    assert many < one * 1.1 and many < 5e-3
    naive = torch.zeros_like(weight)
    p = torch.full((2048, 64), 1 / 64).bfloat16() / 2048
    p[torch.arange(2048), labels] -= 1 / 2048
    for start in range(0, 2048, 16):
        naive += p[start : start + 16].T @ hidden[start : start + 16]
    assert relative(naive, w.grad) > 5 * many  # the mistake shows on this input


def test_hidden_gradient_accumulated_in_bf16():
    case = make(64, 96, 1000, spread=4.0)
    assert errors(case, torch.bfloat16)["d_hidden"] <= errors(case, torch.bfloat16, "reference")["d_hidden"] * 1.02


def test_probability_minus_one_formed_in_bf16():
    """Liger #1329: at p = 0.999 the label's entry p − 1 is lost entirely when p is rounded to bf16 first."""
    for nll in (1e-3, 1e-5, 1e-7):
        hidden = torch.tensor([[1.0]], requires_grad=True)
        gap = -torch.log(torch.expm1(torch.tensor(nll, dtype=torch.float64)))
        weight = torch.tensor([[gap], [0.0]], dtype=torch.float32, requires_grad=True)
        out = fl.token_losses(hidden, weight, torch.tensor([0]))
        out.nll.backward()
        z = weight.detach().double().flatten()
        truth = -torch.expm1(-oracle.nll(z[None], torch.tensor([0])))
        assert relative(out.nll.detach(), torch.log1p((-gap).exp())) < 1e-5
        assert relative(-weight.grad[0], truth) < 1e-5 and relative(weight.grad[1], truth) < 1e-5
    logits_bf16 = torch.tensor([[7.0, 0.0]]).bfloat16()
    assert (logits_bf16.softmax(-1)[0, 0] - 1).item() == 0  # the mistake


def test_large_common_offset_in_the_logits():
    """lse − z[label] of two large numbers; here every logit is 10,000 and more, and exact in float32."""
    base = torch.tensor([[0.0, 1.0, 2.0, 5.0]])
    hidden, weight = torch.tensor([[1.0, 1.0]]), torch.cat([torch.full((1, 4), 16384.0), base]).T.contiguous()
    out = fl.token_losses(hidden, weight, torch.tensor([3]), reference=fl.Reference(hidden, weight.clone()))
    truth = oracle.nll(base.double(), torch.tensor([3]))
    assert relative(out.nll, truth) < 1e-6
    assert relative(out.entropy, oracle.entropy(base.double())) < 1e-6
    assert relative(out.reference_nll, truth) < 1e-6
    lse = torch.logsumexp(hidden @ weight.T, -1)
    assert relative(lse - (hidden @ weight.T)[:, 3], truth) > 1e-3  # the mistake


def test_kl_on_bf16_logits():
    """Liger #1432: 4 to 23 % of the gradient, more near the reference."""
    case = make(64, 96, 1000, reference="own", spread=4.0, near=0.3)
    assert max(errors(case, torch.bfloat16).values()) < 0.005  # measured 0.0018


@pytest.mark.parametrize("d", [1, 63, 64, 65, 129])
def test_bias_added_once_per_block_of_the_hidden_dimension(d):
    """CCE #52."""
    assert max(errors(make(20, d, 50, bias=True), torch.float32).values()) < 1e-6


@pytest.mark.parametrize("v", [2, 127, 129, 4095, 4096, 4097, 8193])
def test_vocabulary_that_the_tile_does_not_divide(v):
    """verl #2899; 4,096 columns are converted at a time for fp16."""
    case = make(5, 7, v)
    assert max(errors(case, torch.float32).values()) < 1e-5
    assert max(errors(case, torch.float16).values()) < 8e-4


def test_log_probability_above_zero():
    """verl #2656."""
    hidden = torch.randn(200, 16).bfloat16() * 6
    weight = torch.randn(60, 16).bfloat16() * 3
    out = fl.token_losses(hidden, weight, (hidden @ weight.T).argmax(-1), reference=fl.Reference(hidden + 0.01))
    assert (out.nll >= 0).all() and (out.reference_nll >= 0).all() and (out.kl >= 0).all()
    assert (out.entropy >= 0).all() and (out.reference_entropy >= 0).all()
    assert (out.nll < 1e-3).any()  # certain tokens are among them


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_all_ignored_gives_nan_or_a_loss_without_a_graph(frozen):
    hidden = torch.randn(4, 6, requires_grad=True)
    weight = torch.randn(9, 6, requires_grad=not frozen)
    labels = torch.full((4,), -100)
    for loss in (
        fl.token_losses(hidden, weight, labels, reference=fl.Reference(hidden.detach())).nll.sum(),
        fl.token_losses(hidden, weight, labels, reference=fl.Reference(hidden.detach())).kl.sum(),
        fl.CrossEntropyLoss()(hidden, weight, labels),
        fl.TALRLoss()(hidden[None], weight, labels[None]),
    ):
        assert loss.item() == 0 and loss.requires_grad
        hidden.grad = weight.grad = None
        loss.backward()
        assert (hidden.grad == 0).all() and (frozen or (weight.grad == 0).all())


def test_ignored_rows_read_before_they_are_written():
    """Liger #1338. Fresh memory is NaN in these tests, and so are the hidden states of ignored tokens."""
    case = make(40, 8, 30, ignored=0.5, reference="shared")
    hidden, head, ref = case.inputs(torch.float32)
    ignored = case.labels == -100
    with torch.no_grad():
        hidden[ignored] = torch.nan
        ref.hidden[ignored] = torch.nan
    out = fl.token_losses(hidden, head, case.labels, reference=ref)
    (out.nll.sum() + out.kl.sum()).backward()
    for field in ("nll", "kl", "entropy", "reference_nll", "reference_entropy"):
        assert (getattr(out, field)[ignored] == 0).all() and getattr(out, field).isfinite().all()
    assert (hidden.grad[ignored] == 0).all() and hidden.grad.isfinite().all() and head.weight.grad.isfinite().all()


@pytest.mark.parametrize("loss", [fl.CrossEntropyLoss(), fl.TALRLoss(1.0), fl.DFTLoss(), fl.EAFTLoss()], ids=repr)
def test_num_items_in_batch_ignored(loss):
    """Liger #339, #802; Unsloth #8261: the mean over each micro-batch is not the mean over the batch."""
    case = make(40, 8, 30, ignored=0.4)
    n = (case.labels != -100).sum()
    hidden, head, _ = case.inputs(torch.float64)
    loss(hidden, head, case.labels).backward()
    whole = head.weight.grad.clone()
    head.weight.grad = None
    for part in (slice(0, 7), slice(7, 11), slice(11, 40)):
        loss(hidden[part], head, case.labels[part], num_items=n).backward()
    assert relative(head.weight.grad, whole) < 1e-12


def test_lora_on_the_head_dropped_without_a_word():
    """TRL #5676, #6530: a wrapped head is refused, not read as if its weight were all there is."""

    class LoRALinear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = torch.nn.Linear(4, 9)
            self.weight = self.base_layer.weight

    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for head in (LoRALinear(), Scaled(4, 9)):
        with pytest.raises(TypeError, match="merge an adapter first"):
            fl.token_losses(torch.randn(3, 4), head, torch.tensor([0, 1, 2]))


def test_sharded_weight_read_as_the_whole_head():
    """Liger #332, TRL #6065: ZeRO-3 leaves an empty placeholder, FSDP a flat shard."""
    with pytest.raises(ValueError, match="gathered"):
        fl.LMHead(torch.empty(0))
    with pytest.raises(ValueError, match=r"\[V, D\]"):
        fl.LMHead(torch.zeros(36))


def test_mean_divides_by_the_sum_of_weights():
    hidden, weight = torch.randn(10, 4), torch.randn(9, 4)
    labels = torch.arange(10) % 9
    nll = fl.token_losses(hidden, weight, labels).nll
    w = (-nll).exp()
    assert fl.DFTLoss()(hidden, weight, labels).item() == pytest.approx((w * nll).sum().item() / 10, rel=1e-6)
    assert w.sum() < 9  # so that the mistake would show


def test_fractional_masks_truncated_to_integers():
    hidden, weight = torch.randn(10, 4), torch.randn(9, 4)
    labels, ref = torch.arange(10) % 9, fl.Reference(torch.randn(10, 4))
    losses = [
        fl.LAwFLoss()(hidden, weight, labels, confidence=torch.full((10,), c), reference=ref).item()
        for c in (0, 0.5, 1.0)
    ]
    assert len(set(losses)) == 3
    assert fl.CrossEntropyLoss()(hidden, weight, labels, num_items=2.5).item() == pytest.approx(
        fl.CrossEntropyLoss()(hidden, weight, labels).item() * 4, rel=1e-6
    )


def test_packed_rows_taken_for_one_sequence():
    case = make(12, 6, 20, ignored=0)
    hidden, head, _ = case.inputs(torch.float64)
    packed = (hidden[None], head, case.labels[None])
    ids = torch.tensor([[0] * 3 + [1] * 4 + [2] * 5])
    nll = fl.token_losses(*packed).nll[0].detach()
    tau = torch.stack([nll[:3].mean(), nll[3:7].mean(), nll[7:].mean()]).median()
    expected = ((-nll / tau).exp().clamp(min=0.01) * nll).mean()
    assert fl.TALRLoss()(*packed, sequence_ids=ids).item() == pytest.approx(expected.item(), rel=1e-12)
    assert fl.TALRLoss()(*packed).item() != pytest.approx(expected.item(), rel=1e-3)  # the row's mean as τ


def test_padding_tokens_counted_as_a_sequences_tokens():
    case = make(12, 6, 20, ignored=0)
    hidden, head, _ = case.inputs(torch.float64)
    labels = case.labels.view(2, 6).clone()
    labels[1, 2:] = -100
    ids = torch.tensor([[0] * 6, [1] * 2 + [-1] * 4])  # an id of its own for the padding
    loss = fl.TALRLoss()(hidden.view(2, 6, 6), head, labels)
    nll = fl.token_losses(hidden.view(2, 6, 6), head, labels).nll.detach()
    tau = (nll[0].mean() + nll[1, :2].mean()) / 2
    valid = nll[labels != -100]
    expected = ((-valid / tau).exp().clamp(min=0.01) * valid).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    packed = fl.TALRLoss()(hidden.view(2, 6, 6), head, labels, sequence_ids=ids)
    assert packed.item() == pytest.approx(expected.item(), rel=1e-12)


def test_scalar_argument_in_another_precision():
    """A scale, a soft-cap, α or τ given in float64 must change no dtype, nor be rounded for float64."""
    case = make(20, 6, 30, scale=1 / 3, softcap=10 / 3, reference="own")
    assert max(errors(case, torch.float64).values()) < 1e-12
    hidden, head, ref = case.inputs(torch.float32)
    confidence = torch.rand(20).masked_fill(case.labels == -100, 0)
    loss = fl.LAwFLoss(1 / 3, 1 / 7)(hidden, head, case.labels, confidence=confidence, reference=ref)
    assert loss.dtype == torch.float32
    loss.backward()
    assert hidden.grad.dtype == torch.float32


def test_second_backward_finds_its_tensors_changed():
    """Gradients taken in forward and scaled in place are wrong the second time."""
    case = make(30, 8, 20)
    for loss in (fl.CrossEntropyLoss(), fl.TALRLoss()):
        hidden, head, _ = case.inputs(torch.float64)
        value = loss(hidden[None], head, case.labels[None])
        (3 * value).backward(retain_graph=True)
        first = hidden.grad.clone(), head.weight.grad.clone()
        first[0].mul_(1), hidden.grad.zero_(), head.weight.grad.zero_()
        (3 * value).backward()
        assert torch.equal(hidden.grad, first[0]) and torch.equal(head.weight.grad, first[1])


def test_upstream_scale_rounded_to_the_gradients_dtype():
    """A scalar upstream gradient of 1/3 becomes bf16 before the product where both are simply multiplied: 0.2 % off,
    the same way in every entry."""
    case = make(30, 8, 20, ignored=0)
    gradients = []
    for scale in (1.0, 1 / 3):
        hidden, head, _ = case.inputs(torch.bfloat16)
        (fl.CrossEntropyLoss()(hidden, head, case.labels) * scale).backward()
        gradients.append(head.weight.grad.double())
    ratio = (gradients[1] * gradients[0]).sum() / (gradients[0] * gradients[0]).sum()
    assert abs(ratio * 3 - 1) < 3e-4


@pytest.mark.slow
def test_offsets_past_two_to_the_31():
    """N·V = 2.3e9 entries: nothing of that size is held, and the tokens at the end are right."""
    n, v, d = 70_000, 33_000, 1
    hidden = torch.randn(n, d)
    weight, labels = torch.randn(v, d), torch.randint(v, (n,))
    hidden[-1], labels[-1] = 3.0, v - 1
    with torch.no_grad():
        nll = fl.token_losses(hidden, weight, labels).nll
    tail = slice(n - 50, n)
    truth = oracle.nll((hidden[tail] @ weight.T).double(), labels[tail])
    assert relative(nll[tail], truth) < 1e-6


def test_adding_the_reference_does_not_change_the_nll():
    case = make(30, 8, 20, reference="own")
    with_reference = run(case, torch.float64)
    from dataclasses import replace

    without = run(replace(case, reference_hidden=None, reference_weight=None, kl_upstream=None), torch.float64)
    for name in ("nll", "entropy"):
        assert relative(with_reference[name], without[name]) < 1e-13


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.5))


def test_the_reference_keeps_keys_and_values_that_nobody_reads():
    model, reference, seen = tiny_llama(), tiny_llama(), []
    reference.model.register_forward_pre_hook(lambda *given: seen.append(given[2].get("use_cache")), with_kwargs=True)
    ids = torch.randint(1, 40, (2, 6))
    with fl.patched(model, fl.LAwFLoss(), reference=reference):
        model(input_ids=ids, labels=ids, confidence=torch.zeros(2, 6))
    assert seen == [False]


@pytest.mark.parametrize(
    "starts", [(0, 10, 20), (0, 3, 5), (0, 0, 0)], ids=["numbered on", "from where the last ended", "from 0"]
)
def test_only_positions_that_fall_back_begin_a_packed_sequence(starts):
    """transformers begins one wherever a position is not its predecessor's successor."""
    model = tiny_llama()
    lengths, ids = (4, 3, 5), torch.randint(1, 40, (1, 12))
    numbers = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    positions = torch.cat([start + torch.arange(n) for start, n in zip(starts, lengths, strict=True)])[None]
    labels = ids.clone()
    labels[:, [0, 4, 7]] = -100
    batch = dict(input_ids=ids, labels=labels, position_ids=positions, use_cache=False)
    with fl.patched(model, fl.TALRLoss()):
        told, found = model(**batch, sequence_ids=numbers).loss, model(**batch).loss
        one = model(**batch, sequence_ids=torch.zeros_like(numbers)).loss
    assert torch.equal(found, told) and abs(one - told) > 1e-3 * told
