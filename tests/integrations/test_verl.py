"""verl's loss and head: against full logits, with its own modules or, where it is not installed, stand-ins."""

import functools
import importlib.util
import pickle
import sys
import types

import pytest
import torch
from torch import nn

from fused_losses.integrations import verl as integration

HEAD, LOSSES = "verl.utils.experimental.torch_functional", "verl.workers.utils.losses"


class StandIn:
    """What is used of verl's FusedLinearForPPO, as read in verl 0.9.1."""

    def __init__(self, chunk_size=512, impl_backend="torch"):
        self.chunk_size, self.impl_backend = chunk_size, impl_backend

    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        raise AssertionError("verl's own")


@pytest.fixture
def verl(monkeypatch):
    """(FusedLinearForPPO, the module of losses), as they were afterwards."""
    if importlib.util.find_spec("verl") is None:
        for module in (HEAD, LOSSES):
            parts = module.split(".")
            for i in range(1, len(parts) + 1):
                name = ".".join(parts[:i])
                if name not in sys.modules:
                    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
                if i > 1:
                    monkeypatch.setattr(
                        sys.modules[".".join(parts[: i - 1])], parts[i - 1], sys.modules[name], raising=False
                    )
        sys.modules[HEAD].FusedLinearForPPO = type("FusedLinearForPPO", (StandIn,), dict(vars(StandIn)))
        sys.modules[LOSSES].sft_loss = None
    head, losses = importlib.import_module(HEAD).FusedLinearForPPO, importlib.import_module(LOSSES)
    monkeypatch.setattr(head, "forward", head.forward)
    monkeypatch.setattr(losses, "sft_loss", losses.sft_loss)
    return head, losses


def tensors(shape=(3, 7), dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, 16, generator=g, dtype=dtype, requires_grad=True)
    weight = torch.randn(31, 16, generator=g, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(31, shape, generator=g), torch.randn(2, *shape, generator=g, dtype=dtype)


@pytest.mark.parametrize("shape", [(3, 7), (7,), (1, 1)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_log_probabilities_and_entropies(verl, shape, temperature, entropy):
    integration.use()
    hidden, weight, ids, upstream = tensors(shape)
    head = verl[0](impl_backend="torch")
    found = head.forward(hidden_states=hidden, vocab_weights=weight, input_ids=ids, temperature=temperature)
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)
    truth = log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)
    assert found[0].dtype == torch.float32 and found[1].dtype == hidden.dtype
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)

    def gradients(log_probs, entropies):
        total = (log_probs * upstream[0]).sum() + (entropies * upstream[1]).sum() * entropy
        return torch.autograd.grad(total, (hidden, weight))

    for a, b in zip(gradients(*found), gradients(*truth), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def batch(mask):
    """Three sequences of 4, 6 and 3 tokens, as verl packs them."""
    ends = torch.tensor([0, 4, 10, 13])
    log_probs = (torch.randn(13, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 3).requires_grad_()
    nested = functools.partial(torch.nested.nested_tensor_from_jagged, offsets=ends)
    data = {"loss_mask": nested(mask), "batch_num_tokens": 7, "dp_size": 2}
    return log_probs, {"log_probs": nested(log_probs)}, data


MASK = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1])


def weights_of_talr(nll, valid, temperature=None):
    rows = torch.tensor([0] * 4 + [1] * 6 + [2] * 3)
    means = [nll[valid & (rows == row)].mean() for row in range(3) if (valid & (rows == row)).any()]
    tau = temperature or (torch.stack(means).quantile(0.5) if means else 1.0)
    return (-nll / tau).exp().clamp(min=0.01)


@pytest.mark.parametrize("name, options, weigh", [
    ("sft", {}, lambda nll, valid: 1.0), ("dft", {}, lambda nll, valid: (-nll).exp()),
    ("talr", {}, weights_of_talr), ("talr", {"temperature": 2.0}, functools.partial(weights_of_talr, temperature=2.0)),
], ids=["sft", "dft", "talr", "talr-2"])  # fmt: skip
@pytest.mark.parametrize("mask", [MASK, MASK * 0], ids=["", "no-label"])
def test_loss(verl, name, options, weigh, mask):
    integration.use(name, options)
    log_probs, output, data = batch(mask)
    # As verl's trainer makes it; it goes to other processes.
    loss = pickle.loads(pickle.dumps(functools.partial(verl[1].sft_loss, config=None)))
    found, metrics = loss(model_output=output, data=data, dp_group=None)
    valid = mask.roll(-1).bool()
    nll = -log_probs
    truth = (nll * weigh(nll.detach(), valid) * valid).sum() / 7 * 2
    assert metrics == {}
    torch.testing.assert_close(found, truth)
    (a,), (b,) = torch.autograd.grad(found, log_probs), torch.autograd.grad(truth, log_probs)
    torch.testing.assert_close(a, b)


def test_loss_of_padded_tensors(verl):
    integration.use("talr")
    log_probs = torch.tensor([[-1.0, -2.0, -9.0], [-0.5, -7.0, -8.0]], requires_grad=True)
    data = {"response_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]), "batch_num_tokens": 3, "dp_size": 1}
    found, _ = verl[1].sft_loss(None, {"log_probs": log_probs}, data)
    nll = torch.tensor([1.0, 2.0, 0.5])
    torch.testing.assert_close(found, (nll * (-nll / 1.0).exp()).sum() / 3)  # the median of means 1.5 and 0.5 is 1


def test_loss_is_that_of_verl(verl):
    """Where verl is installed."""
    own = verl[1].sft_loss
    if own is None:
        pytest.skip("verl is not installed")
    _, output, data = batch(MASK)
    integration.use("sft")
    torch.testing.assert_close(verl[1].sft_loss(None, output, data)[0], own(None, output, data)[0])


def test_the_head_alone_and_the_loss_alone(verl):
    head = verl[0].forward
    integration.use("dft", head=False)
    assert verl[0].forward is head
    integration.use("sft", {"gradient": "exact"})
    assert verl[0].forward is not head


@pytest.mark.parametrize("name, options, message", [
    ("lawf", {}, "LAwFLoss needs a frozen original, which verl does not hand"),
    ("weighted", {}, "WeightedLoss needs weights, which verl does not hand"),
    ("eaft", {}, "EAFTLoss needs topk_entropy, and verl hands log-probabilities alone"),
    ("sft", {"label_smoothing": 0.1}, "CrossEntropyLoss needs logits for label_smoothing"),
    ("sft", {"z_loss": 1e-4}, "CrossEntropyLoss needs logits for label_smoothing, z_loss"),
    ("tlar", {}, "did you mean talr"),
    ("talr", {"tau": 2}, "did you mean temperature"),
], ids=["reference", "field", "entropy", "smoothing", "z", "name", "option"])  # fmt: skip
def test_what_it_cannot_do_is_said(verl, name, options, message):
    before = verl[1].sft_loss
    with pytest.raises((TypeError, ValueError), match=message):
        integration.use(name, options)
    assert verl[1].sft_loss is before


def test_verl_that_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, HEAD, None)
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(ImportError, match="needs verl: pip install verl"):
        integration.use()


def test_a_model_with_verls_own_forward(verl):
    """use_fused_kernels, impl_backend torch: where verl is installed."""
    dense = pytest.importorskip("verl.models.transformers.dense_common")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(50, (2, 9))

    def out():
        found = dense.forward_with_torch_backend(model, input_ids=ids, return_dict=True, temperature=0.8)
        head = nn.utils.parameters_to_vector(torch.autograd.grad(found.log_probs.sum(), model.lm_head.parameters()))
        return found.log_probs, found.entropy, head

    theirs = out()
    integration.use("sft", {"gradient": "exact"})
    for a, b in zip(out(), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
