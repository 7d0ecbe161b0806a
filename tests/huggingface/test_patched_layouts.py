"""Patched models that lay hidden states, labels and sequences out in ways of their own.

Each token keeps its label, its sequence and its fields.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutputWithPast as Output

import fused_losses as fl

V = 97
SIZES = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, initializer_range=0.3,
)  # fmt: skip
IDS = torch.randint(1, V, (3, 11), generator=torch.Generator().manual_seed(1))
LABELS = IDS.clone()
LABELS[0, :4] = LABELS[2, -3:] = -100
VALID = LABELS[:, 1:] != -100
TOLERANCE = 2e-6


def build(cls=LlamaForCausalLM, seed=0):
    torch.manual_seed(seed)
    return cls(LlamaConfig(**SIZES))


def token_nll(model, ids=IDS, labels=LABELS, **inputs):
    """[B, T − 1] float64, 0 without a label, of an unpatched model."""
    with torch.no_grad():
        logits = model(input_ids=ids, **inputs).logits.double()[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)


def talr(nll, valid, sequences):
    tau = torch.stack([nll[valid & (sequences == s)].mean() for s in sequences[valid].unique()]).quantile(0.5)
    weighted = (-nll / tau).exp().clamp(min=0.01) * nll
    return (weighted * valid).sum() / valid.sum()


ROWS = torch.arange(3)[:, None].expand(3, 10)


class Custom(LlamaForCausalLM):
    """A model of one's own, whose loss is made from what `rows` gives to the head."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        if labels is None:
            return Output(logits=self.lm_head(hidden))
        return Output(loss=self.loss(hidden, labels))


class Flattened(Custom):
    def loss(self, hidden, labels):
        return F.cross_entropy(self.lm_head(hidden[:, :-1].reshape(-1, 32)).float(), labels[:, 1:].reshape(-1))


class Cut(Custom):
    def loss(self, hidden, labels):
        return F.cross_entropy(self.lm_head(hidden[:, :-1]).float().reshape(-1, V), labels[:, 1:].reshape(-1))


class Labelled(Custom):
    """Only tokens with a label reach the head."""

    def loss(self, hidden, labels):
        labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(self.lm_head(hidden[labels != -100]).float(), labels[labels != -100])


class Transposed(Custom):
    """[T, B, D], as older models have it."""

    def loss(self, hidden, labels):
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].T
        return F.cross_entropy(self.lm_head(hidden.transpose(0, 1)).view(-1, V), shifted.reshape(-1))


class CutLogits(Custom):
    """All tokens reach the head, and logits are cut."""

    def loss(self, hidden, labels):
        return F.cross_entropy(self.lm_head(hidden)[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))


class ChosenLogits(Custom):
    def loss(self, hidden, labels):
        logits, labels = self.lm_head(hidden)[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits[labels != -100], labels[labels != -100])


class Unshifted(Custom):
    """Labels are taken as they are: token t predicts labels[t]."""

    def loss(self, hidden, labels):
        return F.cross_entropy(self.lm_head(hidden).view(-1, V), labels.view(-1))


LAYOUTS = [Flattened, Cut, Labelled, Transposed, CutLogits, ChosenLogits]


@pytest.mark.parametrize("cls", LAYOUTS)
class TestLayouts:
    def test_sequences_of_talr(self, cls):
        model = build(cls)
        want = talr(token_nll(model), VALID, ROWS)
        with fl.patched(model, fl.TALRLoss()):
            torch.testing.assert_close(model(IDS, LABELS).loss.double(), want, rtol=TOLERANCE, atol=0)

    def test_fields(self, cls):
        model, old = build(cls), torch.rand(3, 11) * 5
        nll = token_nll(model)
        ratio = (old[:, 1:].double() - nll).exp()
        want = -(torch.minimum(ratio, ratio.clip(0.8, 1.2)) * VALID).sum() / VALID.sum()
        with fl.patched(model, fl.PSFTLoss()):
            torch.testing.assert_close(model(IDS, LABELS, old_nll=old).loss.double(), want, rtol=TOLERANCE, atol=0)

    @pytest.mark.parametrize("reference", ["same layout", "another", "start"])
    def test_a_reference(self, cls, reference):
        """Which sees all tokens, whatever reaches the trained model's head."""
        model, other = build(cls), build(LlamaForCausalLM if reference == "another" else cls, 5)
        fl.patch(model, fl.ASFTLoss(1.0), reference="start" if reference == "start" else other)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9)
        plain, other = build(cls), build(cls) if reference == "start" else other
        with torch.no_grad():
            for p in plain.parameters():
                p.mul_(0.9)
            log_p, log_r = (m(input_ids=IDS).logits.double()[:, :-1].log_softmax(-1) for m in (plain, other))
        nll = token_nll(plain)
        want = (((-nll).exp() * nll + (log_r.exp() * (log_r - log_p)).sum(-1)) * VALID).sum() / VALID.sum()
        loss = model(IDS, LABELS).loss
        torch.testing.assert_close(loss.double(), want, rtol=TOLERANCE, atol=0)
        loss.backward()
        assert model.lm_head.weight.grad.norm() > 0


def test_labels_that_are_not_shifted():
    model, old = build(Unshifted), torch.rand(3, 11) * 5
    with torch.no_grad():
        logits = model(IDS).logits.double()
    valid = LABELS != -100
    nll = F.cross_entropy(logits.transpose(1, 2), LABELS, reduction="none", ignore_index=-100)
    ratio = (old.double() - nll).exp()
    with fl.patched(model, fl.PSFTLoss()):
        want = -(torch.minimum(ratio, ratio.clip(0.8, 1.2)) * valid).sum() / valid.sum()
        torch.testing.assert_close(model(IDS, LABELS, old_nll=old).loss.double(), want, rtol=TOLERANCE, atol=0)
    with fl.patched(model, fl.TALRLoss()):
        want = talr(nll, valid, torch.arange(3)[:, None].expand(3, 11))
        torch.testing.assert_close(model(IDS, LABELS).loss.double(), want, rtol=TOLERANCE, atol=0)


def test_a_layout_that_cannot_be_followed():
    """Chunks of the batch: τ would be of a chunk. Cross-entropy needs no order."""

    class Chunked(Custom):
        def loss(self, hidden, labels):
            pieces = zip(hidden[:, :-1].chunk(2, 1), labels[:, 1:].chunk(2, 1), strict=True)
            return (
                sum(F.cross_entropy(self.lm_head(h).reshape(-1, V), y.reshape(-1), reduction="sum") for h, y in pieces)
                / VALID.sum()
            )

    model = build(Chunked)
    want = token_nll(model).sum() / VALID.sum()
    with fl.patched(model):
        torch.testing.assert_close(model(IDS, LABELS).loss.double(), want, rtol=TOLERANCE, atol=0)
    with fl.patched(model, fl.TALRLoss()), pytest.raises(ValueError, match="takes its loss in several parts"):
        model(IDS, LABELS)
    with fl.patched(model, fl.TALRLoss(1.0)):  # a fixed τ needs none
        nll = token_nll(model)
        want = (((-nll).exp().clamp(min=0.01) * nll) * VALID).sum() / VALID.sum()
        torch.testing.assert_close(model(IDS, LABELS).loss.double(), want, rtol=TOLERANCE, atol=0)


# --- packed sequences

LENGTHS = (4, 9, 6)
DOCUMENTS = [torch.randint(1, 80, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
FEATURES = [dict(input_ids=d.tolist(), labels=d.tolist()) for d in DOCUMENTS]
NUMBERS = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(return_position_ids=False, return_flash_attn_kwargs=True),
        dict(return_position_ids=False, return_seq_idx=True),
        dict(return_flash_attn_kwargs=True, return_seq_idx=True),
    ],
    ids=["position_ids", "cu_seq_lens", "seq_idx", "all"],
)
def test_packed_by_a_collator(options):
    model, batch = build(), DataCollatorWithFlattening(**options)(FEATURES)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "input_ids")}
    nll = token_nll(model, batch["input_ids"], batch["labels"], use_cache=False, **inputs)
    valid = batch["labels"][:, 1:] != -100
    want, one = talr(nll, valid, NUMBERS[:, 1:]), talr(nll, valid, torch.zeros(1, 18))
    assert abs(one / want - 1) > 1e-3
    with fl.patched(model, fl.TALRLoss()):
        torch.testing.assert_close(model(**batch, use_cache=False).loss.double(), want, rtol=TOLERANCE, atol=0)


def two_rows():
    ids = torch.cat(DOCUMENTS)
    ids = torch.stack([ids, ids.flip(0)])
    labels = ids.clone()
    labels[:, [0, 4, 13]] = -100
    return ids, labels


@pytest.mark.parametrize("how", ["seq_idx", "sequence_ids", "cu_seq_lens_q", "position_ids", "position_ids of one row"])
def test_two_packed_rows(how):
    """Numbers that begin anew in each row are other sequences there."""
    model, (ids, labels) = build(), two_rows()
    row = torch.cat([torch.arange(n) for n in LENGTHS])
    ends = torch.tensor([0, *LENGTHS, *LENGTHS]).cumsum(0).int()
    inputs = {
        "seq_idx": dict(seq_idx=NUMBERS.expand(2, -1).int()), "sequence_ids": dict(sequence_ids=NUMBERS.expand(2, -1)),
        "cu_seq_lens_q": dict(cu_seq_lens_q=ends), "position_ids": dict(position_ids=torch.stack([row, row])),
        "position_ids of one row": dict(position_ids=row[None]),
    }[how]  # fmt: skip
    of_model = {name: value for name, value in inputs.items() if name == "position_ids"}
    nll = token_nll(model, ids, labels, use_cache=False, **of_model)
    numbers = torch.cat([NUMBERS, NUMBERS + 3])[:, 1:]
    want = talr(nll, labels[:, 1:] != -100, numbers)
    with fl.patched(model, fl.TALRLoss()):
        got = model(input_ids=ids, labels=labels, use_cache=False, **inputs).loss
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE, atol=0)


def qwen2_vl():
    torch.manual_seed(0)
    rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)
    vision = dict(
        depth=1,
        embed_dim=16,
        hidden_size=32,
        num_heads=2,
        mlp_ratio=2,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
    )
    special = dict(image_token_id=93, video_token_id=94, vision_start_token_id=95, vision_end_token_id=96)
    text = dict(**SIZES, bos_token_id=1, eos_token_id=2, rope_parameters=rope)
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **special))


@pytest.mark.parametrize("axes", [3, 4])
def test_packed_by_positions_of_several_axes(axes):
    model, ids = qwen2_vl(), torch.cat(DOCUMENTS)[None]
    labels = ids.clone()
    labels[:, [0, 4, 13]] = -100
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None, None].expand(axes, 1, -1)
    nll = token_nll(model, ids, labels, position_ids=positions, use_cache=False)
    want = talr(nll, labels[:, 1:] != -100, NUMBERS[:, 1:])
    with fl.patched(model, fl.TALRLoss()):
        got = model(input_ids=ids, labels=labels, position_ids=positions, use_cache=False).loss
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE, atol=0)


def test_an_image_is_no_sequence():
    """Its patches share a time and differ in height and width."""
    model = qwen2_vl()
    positions = torch.tensor([[0, 1, 2, 2, 2, 2, 4, 5], [0, 1, 2, 2, 3, 3, 4, 5], [0, 1, 2, 3, 2, 3, 4, 5]])[:, None]
    ids = DOCUMENTS[1][None, :8]
    nll = token_nll(model, ids, ids, position_ids=positions, use_cache=False)
    with fl.patched(model, fl.TALRLoss()):
        got = model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss
    want = talr(nll, torch.ones(1, 7, dtype=torch.bool), torch.zeros(1, 7))
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE, atol=0)


# --- two heads in one forward


class TwoHeads(LlamaForCausalLM):
    """Multi-token prediction: the head is called for the next token and for the one after."""

    both_without_labels = False

    def __init__(self, config):
        super().__init__(config)
        self.mtp = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def both(self, input_ids):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        return self.lm_head(hidden), torch.tanh(self.mtp(hidden))

    def forward(self, input_ids=None, labels=None, **kwargs):
        z, after = self.both(input_ids)
        if labels is None:
            return Output(logits=z, hidden_states=(self.lm_head(after),) if self.both_without_labels else None)
        later = F.pad(labels, (0, 1), value=-100)[:, 1:]
        loss = self.loss_function(z, labels, V) + 0.3 * self.loss_function(self.lm_head(after), later, V)
        return Output(loss=loss, logits=z)


class BothHeads(TwoHeads):
    both_without_labels = True


class LossesLast(TwoHeads):
    def forward(self, input_ids=None, labels=None, **kwargs):
        z, after = self.both(input_ids)
        z_after = self.lm_head(after)
        if labels is None:
            return Output(logits=z)
        later = F.pad(labels, (0, 1), value=-100)[:, 1:]
        loss = self.loss_function(z, labels, V) + 0.3 * self.loss_function(z_after, later, V)
        return Output(loss=loss, logits=z)


@pytest.mark.parametrize("cls", [TwoHeads, LossesLast])
def test_two_heads(cls):
    model = build(cls)
    want, predictions = model(IDS, LABELS), model(IDS).logits.argmax(-1)
    want.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    fl.patch(model)
    out = model(IDS, LABELS)
    out.loss.backward()
    torch.testing.assert_close(out.loss, want.loss, rtol=TOLERANCE, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6)
    seen = out.logits.argmax(-1)
    valid = F.pad(VALID, (0, 1))
    assert torch.equal(seen[valid], predictions[valid]) and (seen[~valid] == -1).all()


@pytest.mark.parametrize("cls", [TwoHeads, BothHeads])
def test_two_heads_with_a_reference(cls):
    model, other = build(cls), build(cls, 9)

    def part(z, reference, shift):
        log_p, log_r = (x.double()[:, :-shift].log_softmax(-1) for x in (z, reference))
        y = LABELS[:, shift:]
        nll = F.nll_loss(log_p.transpose(1, 2), y, reduction="none", ignore_index=-100)
        loss = (-nll).exp() * nll + (log_r.exp() * (log_r - log_p)).sum(-1)
        return (loss * (y != -100)).sum() / (y != -100).sum()

    with torch.no_grad():
        (z, after), (r, r_after) = model.both(IDS), other.both(IDS)
        want = part(z, r, 1) + 0.3 * part(model.lm_head(after), other.lm_head(r_after), 2)
    fl.patch(model, fl.ASFTLoss(1.0), reference=other)
    if cls is TwoHeads:
        with pytest.raises(ValueError, match="TwoHeads called its head 2 times, the reference 1"):
            model(IDS, LABELS)
    else:
        torch.testing.assert_close(model(IDS, LABELS).loss.double(), want, rtol=TOLERANCE, atol=0)


# --- fields that are arguments of the model too


class Masked(fl.Objective):
    def token_loss(self, out, attention_mask=None):
        return out.nll if attention_mask is None else 0.5 * attention_mask * out.nll


class Required(fl.Objective):
    def token_loss(self, out, attention_mask):
        return 0.5 * attention_mask * out.nll


class ByPosition(fl.Objective):
    def token_loss(self, out, position_ids):
        return (position_ids >= 5) * out.nll


@pytest.mark.parametrize("cls", [Masked, Required])
@pytest.mark.parametrize("by_position", [False, True])
def test_a_field_named_as_an_argument_of_the_model(cls, by_position):
    model, mask = build(), torch.ones_like(IDS)
    want = 0.5 * token_nll(model).sum() / VALID.sum()
    with fl.patched(model, cls()):
        out = model(IDS, mask, labels=LABELS) if by_position else model(IDS, attention_mask=mask, labels=LABELS)
        torch.testing.assert_close(out.loss.double(), want, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("rows", [1, 3])
def test_positions_as_a_field(rows):
    model = build()
    nll, positions = token_nll(model), torch.arange(11).expand(rows, 11)
    want = (nll * (torch.arange(1, 11) >= 5)).sum() / VALID.sum()
    with fl.patched(model, ByPosition()):
        got = model(IDS, position_ids=positions, labels=LABELS, use_cache=False).loss
        torch.testing.assert_close(got.double(), want, rtol=TOLERANCE, atol=0)


def test_a_field_of_another_shape_is_named():
    model = build()
    mask = torch.ones(3, 1, 11, 11, dtype=torch.bool)
    with (
        fl.patched(model, Required()),
        pytest.raises(ValueError, match=r"attention_mask: expected the labels' shape \[3, 11\]"),
    ):
        model(IDS, attention_mask=mask, labels=LABELS)


@pytest.mark.parametrize("ends", [[0, 4, 13, 19, 30], [0, 19], [0, 13, 4, 19], [0, 4, 13], [4, 13, 19], [[0, 19]]])
def test_ends_of_sequences_that_do_not_fit(ends):
    model, ids = build(), torch.cat(DOCUMENTS)[None]
    inputs = dict(input_ids=ids, labels=ids, use_cache=False, cu_seq_lens_q=torch.tensor(ends, dtype=torch.int32))
    with fl.patched(model, fl.TALRLoss()):
        if ends == [0, 19]:
            assert model(**inputs).loss > 0
        else:
            with pytest.raises(ValueError, match="cu_seq_lens_q: expected ends of sequences from 0 to the 19 tokens"):
                model(**inputs)


@pytest.mark.parametrize("numbers", [2, 4])
def test_a_number_for_each_sequence(numbers):
    with fl.patched(build(), fl.FLOWLoss(2.0)) as model:
        with pytest.raises(ValueError, match=f"initial_nll: expected a number for each of the 3 rows.*got {numbers}"):
            model(IDS, labels=LABELS, initial_nll=torch.ones(numbers))
        with pytest.raises(TypeError, match="initial_nll: expected a tensor of a number for each sequence, got list"):
            model(IDS, labels=LABELS, initial_nll=[1.0, 2.0, 3.0])
