"""Patched models beside accelerate's hooks, torch.compile and other threads.

These are cases that the matrix of test_patch_matrix.py has no place for.
"""

import threading

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_module
from wrapped_models import BATCH, IDS, autocast, base_of, device_hooks, llama, lora, nll_of

import fused_losses as fl

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning:transformers"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),  # Dynamo's own doing
]


def asft(model, reference, strength=1.0):
    with torch.no_grad():
        nll, logits = nll_of(model)
        log_p, log_r = logits.log_softmax(-1), nll_of(reference)[1].log_softmax(-1)
    return ((-nll).exp() * nll + strength * (log_r.exp() * (log_r - log_p)).sum(-1)).mean().item()


# --- references of models that accelerate has wrapped


def to_disk(folder):
    return lambda model: disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def to_memory(_):
    return lambda model: cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("offload", [to_memory, to_disk])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("reference", ["start", "model", "offloaded model"])
def test_offloaded(offload, when, reference, tmp_path):
    """Between calls its weights are on the meta device, where no copy can follow."""
    model, other = llama(), llama(5)
    want = asft(llama(), llama() if reference == "start" else llama(5))
    if when == "after":
        offload(tmp_path / "model")(model)
    if reference == "offloaded model":
        offload(tmp_path / "other")(other)
    fl.patch(model, fl.ASFTLoss(1.0), reference="start" if reference == "start" else other)
    if when == "before":
        offload(tmp_path / "model")(model)
    with torch.no_grad():
        assert model(**BATCH).loss.item() == pytest.approx(want, rel=3e-6)


@pytest.mark.parametrize("cache", [False, True])
def test_base_under_device_hooks(cache, tmp_path):
    """QLoRA over several devices."""
    model = lora(device_hooks(llama()))
    plain = lora(llama())
    fl.patch(model, fl.ASFTLoss(1.0), reference="base", reference_cache=tmp_path if cache else None)
    for _ in range(2):
        assert model(**BATCH).loss.item() == pytest.approx(asft(plain, llama()), rel=3e-6)


@pytest.mark.parametrize("reference", ["start", "model"])
@pytest.mark.parametrize("cache", [False, True])
def test_a_model_that_was_evaluated_before(reference, cache, tmp_path):
    """A look at the baseline leaves accelerate's autocast around the forward; the reference is under the same."""
    model = autocast(llama())
    given = "start" if reference == "start" else llama(5)
    fl.patch(model, fl.LAwFLoss(), reference=given, reference_cache=tmp_path if cache else None)
    confidence = torch.zeros(IDS.shape)
    for _ in range(2):
        loss = model(**BATCH, confidence=confidence).loss.item()
        assert abs(loss) < 1e-6 if reference == "start" else loss > 0.1


def test_hooks_taken_off_again():
    model = fl.patch(device_hooks(llama()), fl.TALRLoss(1.0))
    want = model(**BATCH).loss
    remove_hook_from_module(model, recurse=True)
    assert "_old_forward" not in vars(model) and torch.equal(model(**BATCH).loss, want)
    fl.unpatch(model)
    assert torch.equal(model(**BATCH).loss, llama()(**BATCH).loss)
    again = device_hooks(fl.patch(llama(), fl.TALRLoss(1.0)))
    fl.unpatch(again)
    remove_hook_from_module(again, recurse=True)
    assert torch.equal(again(**BATCH).loss, llama()(**BATCH).loss)
    fl.patch(again, fl.TALRLoss(1.0))
    torch.testing.assert_close(again(**BATCH).loss, want)
    fl.unpatch(again)
    assert "forward" not in vars(again)


# --- adapters


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["body", "head"])
def test_adalora(targets):
    config = peft.AdaLoraConfig(target_modules=targets, init_r=6, target_r=4, total_step=100)
    model = peft.get_peft_model(llama(), config)
    want = model(**BATCH).loss
    if "lm_head" in targets:
        with pytest.raises(
            TypeError,
            match=r"head: LlamaForCausalLM's is a peft\.tuners\.adalora.*only LoRA is supported on the LM head",
        ):
            fl.patch(model)
        return
    torch.testing.assert_close(fl.patch(model)(**BATCH).loss, want)
    fl.unpatch(model)
    fl.patch(model, fl.ASFTLoss(1.0), reference="base")
    assert model(**BATCH).loss.item() == pytest.approx(
        want.item() - nll_of(llama())[0].mean().item() + asft(llama(), llama()), rel=1e-5
    )


@pytest.mark.parametrize("kind", ["ia3", "loha", "vera"])
def test_other_adapters_on_the_head_are_refused(kind):
    config = dict(
        ia3=lambda: peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
        loha=lambda: peft.LoHaConfig(target_modules=["lm_head"]),
        vera=lambda: peft.VeraConfig(target_modules=["lm_head"], r=2),
    )[kind]()  # fmt: skip
    model = peft.get_peft_model(llama(), config)
    with pytest.raises(TypeError, match=r"head: LlamaForCausalLM's is a .*only LoRA is supported"):
        fl.patch(model)


# --- threads


class Meeting:
    """Lets one thread wait in the model's body for another to have done something."""

    def __init__(self, model, when=lambda model: True):
        self.entered, self.left, self.main = threading.Event(), threading.Event(), threading.get_ident()
        self.when = when
        base_of(model).model.register_forward_hook(self.wait)
        self.model, self.waited = model, 0

    def wait(self, *_):
        if threading.get_ident() == self.main and not self.waited and self.when(self.model):
            self.waited += 1
            self.entered.set()
            self.left.wait(1)  # who must not run now is still waiting afterwards

    def run(self, function):
        found = {}

        def other():
            assert self.entered.wait(60)
            try:
                found["result"] = function()
            finally:
                self.left.set()

        thread = threading.Thread(target=other)
        thread.start()
        return thread, found


def test_another_thread_while_adapters_are_off():
    model = fl.patch(lora(llama()), fl.LAwFLoss(), reference="base")
    plain = lora(llama())
    off = lambda model: next(m for m in model.modules() if hasattr(m, "lora_A")).disable_adapters  # noqa: E731
    meeting = Meeting(model, off)
    thread, found = meeting.run(lambda: model(input_ids=IDS).logits)
    inputs = dict(**BATCH, confidence=torch.zeros(IDS.shape))
    loss = model(**inputs).loss.item()
    thread.join()
    assert meeting.waited == 1 and torch.equal(found["result"], plain(input_ids=IDS).logits)
    fl.unpatch(model)
    reference = fl.patch(plain, fl.LAwFLoss(), reference="base")
    assert loss == pytest.approx(reference(**inputs).loss.item(), rel=1e-6) and loss > 0.01


@pytest.mark.parametrize("who", ["labels", "no labels", "generate", "the head"])
def test_two_threads_in_one_model(who):
    model = fl.patch(llama(), fl.TALRLoss(1.0))
    nll, _ = nll_of(llama())
    want = ((-nll).exp().clamp(min=0.01) * nll).mean().item()
    hidden = torch.randn(2, 16)
    do = {
        "labels": lambda: model(**BATCH).loss.item(), "no labels": lambda: model(input_ids=IDS).logits,
        "generate": lambda: model.generate(IDS[:, :4], max_new_tokens=2, do_sample=False),
        "the head": lambda: model.lm_head(hidden),
    }[who]  # fmt: skip
    meeting = Meeting(model)
    thread, found = meeting.run(do)
    assert model(**BATCH).loss.item() == pytest.approx(want, rel=1e-6)
    thread.join()
    plain = llama()
    expected = {
        "labels": want, "no labels": plain(input_ids=IDS).logits,
        "generate": plain.generate(IDS[:, :4], max_new_tokens=2, do_sample=False), "the head": plain.lm_head(hidden),
    }[who]  # fmt: skip
    if who == "labels":
        assert found["result"] == pytest.approx(expected, rel=1e-6)
    else:
        assert torch.equal(found["result"], expected)
    assert "forward" not in vars(model.lm_head)


# --- torch.compile


@pytest.mark.each_value
@pytest.mark.parametrize(
    "how",
    [lambda m: torch.compile(m, backend="eager"), lambda m: m.compile(backend="eager") or m],
    ids=["function", "method"],
)
@pytest.mark.parametrize("reference", [None, "start", "base"])
def test_compiled_after_the_patch(how, reference):
    torch._dynamo.reset()
    make = lora if reference == "base" else lambda model: model
    model = make(llama())
    fl.patch(model, fl.TALRLoss(1.0) if reference is None else fl.ASFTLoss(1.0), reference=reference)
    ran = how(model)
    loss = ran(**BATCH).loss
    loss.backward()
    plain = make(llama())
    nll, _ = nll_of(plain)
    want = ((-nll).exp().clamp(min=0.01) * nll).mean().item() if reference is None else asft(plain, llama())
    assert loss.item() == pytest.approx(want, rel=3e-6)
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    fl.unpatch(ran)
    torch.testing.assert_close(ran(**BATCH).loss, plain(**BATCH).loss)
