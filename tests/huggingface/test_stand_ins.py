"""What a patched model hands out in place of tensors answers libraries that ask as an ordinary object would.

It answers nothing wrong afterwards.
"""

import copy
import pickle

import numpy as np
import pytest
import torch
from accelerate.utils.operations import concatenate, convert_to_fp32, recursively_apply, send_to_device
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import fused_losses as fl
from fused_losses.huggingface import LogitsNotKept

V = 97
IDS = torch.randint(1, V, (3, 11), generator=torch.Generator().manual_seed(1))
LABELS = IDS.masked_fill(torch.arange(11) < 2, -100)


def llama():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes, pad_token_id=0, initializer_range=0.3))


def output(loss=None, **inputs):
    return fl.patch(llama(), loss)(input_ids=IDS, labels=LABELS, **inputs)


def log_probs():
    return output(fl.TALRLoss(), fused_lm_head=True)


@pytest.fixture(params=["logits", "log_probs"])
def handed_out(request):
    return output().logits if request.param == "logits" else log_probs().log_probs


def test_hasattr(handed_out):
    for name in ("softmax", "numpy", "grad_fn", "__fspath__", "__len__x", "keys", "_asdict", "anything", "is_cuda"):
        assert hasattr(handed_out, name) is False, name
    assert getattr(handed_out, "exp", "none") == "none"
    assert hasattr(handed_out, "to") and hasattr(handed_out, "detach")


def test_copies_and_pickles(handed_out):
    for twin in (
        copy.copy(handed_out),
        copy.deepcopy(handed_out.detach()),
        pickle.loads(pickle.dumps(handed_out.detach())),
    ):
        assert type(twin) is type(handed_out) and repr(twin) == repr(handed_out.detach())
    assert not torch.is_tensor(handed_out) and not isinstance(handed_out, torch.Tensor)
    assert len(repr(handed_out)) < 600 and handed_out is not None and handed_out != None  # noqa: E711


def test_recursion_over_outputs():
    """accelerate's: mixed precision, device hooks, metrics."""
    for out in (output(), log_probs()):
        for result in (convert_to_fp32(out), send_to_device(out, "cpu"), recursively_apply(lambda t: t + 0, out)):
            assert type(result) is type(out) and result.keys() == out.keys()
            assert torch.equal(result.loss, out.loss)


def test_a_move_to_another_device():
    """As the root hook of device_map does with outputs, to where the inputs were."""
    logits = output().logits
    there = send_to_device(dict(logits=logits), torch.device("meta"))["logits"]
    assert there.device.type == "meta" and there.argmax(-1).device.type == "meta" and there.shape == logits.shape
    assert logits.to("cpu", torch.bfloat16).dtype == torch.bfloat16 and logits.cpu().argmax(-1).device.type == "cpu"


def test_predictions_survive_copies():
    logits = output().logits
    again = pickle.loads(pickle.dumps(logits))
    assert torch.equal(again.argmax(-1), logits.argmax(-1)) and (logits.argmax(-1)[:, 1:-1] >= 0).all()
    assert torch.equal(copy.deepcopy(logits)[:, 3:].argmax(-1), logits.argmax(-1)[:, 3:])


def test_hidden_states_are_not_kept_alive():
    out = output()
    assert out.logits.origin.hidden is None and out.logits.origin.call is None


def test_no_numbers_for_numpy():
    for one in (output().logits, log_probs().log_probs):
        with pytest.raises((LogitsNotKept, TypeError), match="patched"):
            np.asarray(one)


def ce(logits, **options):
    return F.cross_entropy(logits[..., :-1, :].contiguous().view(-1, V), LABELS[..., 1:].reshape(-1), **options)


@pytest.mark.parametrize("loss", [fl.CrossEntropyLoss(), fl.TALRLoss(), fl.TALRLoss(1.0), fl.DFTLoss()], ids=str)
@pytest.mark.parametrize("inputs", [{}, dict(num_items_in_batch=7)], ids=["mean", "items"])
@pytest.mark.parametrize("options", [{}, dict(reduction="sum"), dict(label_smoothing=0.1)], ids=str)
def test_cross_entropy_after_the_forward_is_refused(loss, inputs, options):
    """As in every compute_loss of one's own: it would be the objective, under another divisor."""
    logits = output(loss, **inputs).logits
    with pytest.raises(LogitsNotKept, match=r"(after its forward|label_smoothing).*keep_logits=True"):
        ce(logits, **options)


@pytest.mark.parametrize(
    "use", [lambda z, y: F.cross_entropy(input=z, target=y), lambda z, y: torch.nn.CrossEntropyLoss()(z, y)]
)
def test_other_ways_to_call_it(use):
    with pytest.raises(LogitsNotKept, match="after its forward"):
        use(output().logits.view(-1, V), LABELS.view(-1))


def test_cross_entropy_of_kept_logits_is_cross_entropy():
    model = llama()
    want = ce(model(input_ids=IDS).logits)
    out = fl.patch(model, fl.TALRLoss(), keep_logits=True)(input_ids=IDS, labels=LABELS)
    assert ce(out.logits).item() == pytest.approx(want.item(), rel=1e-6) and out.loss < 0.9 * want


def test_per_token_log_probabilities_are_refused():
    one = log_probs().log_probs
    assert (-one).sum() == -one.sum() > 0
    for use in (lambda x: x.exp(), lambda x: x * 2, lambda x: x[0], lambda x: torch.exp(x), lambda x: list(x)):
        with pytest.raises(TypeError, match=r"DFTLoss.*other trainers \(DPO"):
            use(one)
    with pytest.raises((TypeError, RuntimeError)):
        concatenate([one, one])


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z.__setitem__((slice(None), slice(None), [3, 4]), -1e4),
        lambda z: z.masked_fill_(z.argmax(-1)[..., None] > 0, 0.0), lambda z: z.mul_(2.0), lambda z: z.__imul__(2.0),
        lambda z: torch.fill_(z, 0.0), lambda z: z.__iadd__(1.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("keep", [False, True])
def test_a_model_that_changes_its_logits_in_place(change, keep):
    """Such as Chameleon, which rules tokens of images out: a copy would be changed, and the loss would be another."""

    class Changing(LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
            change(logits)
            return self.loss_function(logits, labels, V), logits

    model = fl.patch(Changing(llama().config), keep_logits=keep)
    with pytest.raises(LogitsNotKept, match=r"Changing (changes its logits in place|asks for argmax)"):
        model(input_ids=IDS, labels=LABELS)


@pytest.mark.parametrize("other", [lambda z: z[..., :50], lambda z: z * -1, lambda z: z / -2.0, lambda z: z * 0])
def test_the_largest_of_other_logits(other):
    """The predictions are those of the loss's logits: of a part of the vocabulary, or of others, they are wrong."""
    logits = output().logits
    with pytest.raises(LogitsNotKept, match="argmax of other logits than the loss"):
        other(logits).argmax(-1)
    assert torch.equal((logits * 2)[:, 1:].argmax(-1), logits.argmax(-1)[:, 1:])
    kept = fl.patch(llama(), keep_logits=True)(input_ids=IDS, labels=LABELS).logits
    assert other(kept).argmax(-1).max() < V
