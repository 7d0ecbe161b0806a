"""Two models, measured along the same tokens: against full logits in float64."""

import copy
import types

import peft
import pytest
import torch
import tuned
from transformers import LlamaConfig, LlamaForCausalLM

import fused_losses as fl
from fused_losses.checking.pair import Pair, Row, batches
from fused_losses.huggingface import kv_cache

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads it
VOCABULARY = len(tuned.tokenizer())
TOLERANCE = 3e-6  # nats; measured 1e-6, as logits are float32


def rows(*lengths):
    """Of tokens before and measured; ragged."""
    draw = lambda n: tuple(torch.randint(VOCABULARY, (n,)).tolist())  # noqa: E731
    return [Row(draw(a), draw(b)) for a, b in lengths]


def assert_as_full_logits(measured, model, original, some):
    for row, found in zip(some, measured, strict=True):
        q, p = (tuned.full_log_probabilities(m, row.before, row.measured) for m in (model, original))
        labels = torch.tensor(row.measured)[:, None]
        for name, value in (("nll", -q.gather(1, labels)[:, 0]), ("original_nll", -p.gather(1, labels)[:, 0]),
                            ("kl", (p.exp() * (p - q)).sum(1))):  # fmt: skip
            torch.testing.assert_close(getattr(found, name), value, rtol=1e-6, atol=TOLERANCE)
        assert torch.equal(found.rank, (q > q.gather(1, labels)).sum(1))
        assert torch.equal(found.original_rank, (p > p.gather(1, labels)).sum(1))


RAGGED = ((1, 1), (5, 12), (40, 3), (2, 77), (3, 1))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["v_proj", "lm_head"]], ids=["body", "head"])
def test_adapter_against_its_original(targets):
    original = tuned.original()
    model, some = tuned.with_adapter(copy.deepcopy(original), target_modules=targets), rows(*RAGGED)
    with Pair(model).measuring() as measure:
        assert_as_full_logits(measure(some, ranks=True), model, original, some)


def test_full_fine_tune_against_another_model():
    original, model, some = tuned.original(0), tuned.original(7), rows(*RAGGED)
    with Pair(model, original).measuring() as measure:
        assert_as_full_logits(measure(some, ranks=True), model, original, some)


def test_rows_come_back_in_their_order_however_they_are_batched(monkeypatch):
    model, some = tuned.with_adapter(tuned.original()), rows(*RAGGED)
    with Pair(model).measuring() as measure:
        together, counted = measure(some), []
        monkeypatch.setattr("fused_losses.checking.pair.batches", lambda lengths: ([i] for i in range(len(lengths))))
        alone = measure(some, advance=counted.append)
    assert counted == [1] * 5
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.kl, b.kl, rtol=0, atol=TOLERANCE)
    assert list(batches([3, 9, 4, 1], tokens=10)) == [[1], [2, 0], [3]]
    assert list(batches([50, 2], tokens=10)) == [[0], [1]] and list(batches([])) == []


def test_adapter_that_changes_nothing_has_no_kl_at_all():
    some = rows(*RAGGED)
    with Pair(tuned.with_adapter(tuned.original(), strength=0)).measuring() as measure:
        for found in measure(some):
            assert not found.kl.any() and torch.equal(found.nll, found.original_nll)


def test_patched_model_in_training_is_measured_and_stays_patched():
    model, some = tuned.with_adapter(tuned.original()), rows(*RAGGED)
    with Pair(model).measuring() as measure:
        before = measure(some)
    digest = Pair(model).digest(tuned=False), Pair(model).digest(tuned=True)
    loss = fl.TALRLoss()
    fl.patch(model.train(), loss)
    ids = torch.randint(VOCABULARY, (2, 9))
    value = model(input_ids=ids, labels=ids).loss
    with Pair(model).measuring() as measure:
        assert all(torch.equal(a.kl, b.kl) for a, b in zip(measure(some), before, strict=True))
    assert (Pair(model).digest(tuned=False), Pair(model).digest(tuned=True)) == digest
    assert torch.equal(model(input_ids=ids, labels=ids).loss, value) and model.training
    fl.unpatch(model)


def test_model_is_left_as_it_was():
    model = tuned.with_adapter(tuned.original()).train()
    state = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    training = [m.training for m in model.modules()]
    kind = type(model.get_base_model())
    ids = torch.randint(VOCABULARY, (1, 9))
    before = model.eval()(ids).logits
    model.train()
    pair = Pair(model)
    with pair.asked(tuned=False) as asked:
        assert not asked.training and not torch.is_grad_enabled()
    with pytest.raises(KeyError), pair.measuring() as measure:
        measure(rows((2, 2)))
        raise KeyError
    assert [m.training for m in model.modules()] == training and type(model.get_base_model()) is kind
    for name, p in model.named_parameters():
        assert torch.equal(p, state[name][0]) and p.requires_grad == state[name][1]
    assert torch.equal(model.eval()(ids).logits, before)


def test_original_has_one_digest_alone_and_in_an_adapted_model():
    original = tuned.original()
    alone = Pair(tuned.original(7), original).digest(tuned=False)
    for options in ({}, {"target_modules": ["k_proj", "lm_head"]}):
        model = tuned.with_adapter(copy.deepcopy(original), **options)
        assert Pair(model).digest(tuned=False) == alone
        assert Pair(model).digest(tuned=True) not in (alone, Pair(tuned.original(7), original).digest(tuned=True))
    with torch.no_grad():
        model.get_base_model().model.norm.weight[3] += 1e-6
    assert Pair(model).digest(tuned=False) != alone


def test_digest_of_the_tuned_model_sees_the_adapters_settings():
    model = tuned.with_adapter(tuned.original())
    before = Pair(model).digest(tuned=True)
    for layer in model.modules():
        if "default" in (getattr(layer, "lora_A", None) or ()):
            layer.scaling["default"] *= 2
    assert Pair(model).digest(tuned=True) != before


def other_vocabulary():
    return LlamaForCausalLM(LlamaConfig(**tuned.SIZES, vocab_size=50))


@pytest.mark.parametrize(
    "make, kind, message",
    [
        (lambda: Pair(tuned.original()), ValueError, "has no PEFT adapter .* original"),
        (lambda: Pair("gpt2"), TypeError, "model: expected a model of transformers, got str"),
        (lambda: Pair(tuned.original(), "gpt2"), TypeError, "original: expected a model of transformers, got str"),
        (lambda: Pair(tuned.original(), fl.patch(tuned.original())), ValueError, "original: Llama.* is patched"),
        (lambda: Pair(tuned.original(), other_vocabulary()), ValueError, "vocabulary of [0-9]+ tokens, got one of 50"),
    ],
)  # fmt: skip
def test_pairs_that_cannot_be_compared(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_original_must_be_another_model():
    model = tuned.original()
    with pytest.raises(ValueError, match="original: is the tuned model itself"):
        Pair(model, model)


def test_adapter_that_cannot_be_switched_is_refused_before_any_work():
    model = tuned.with_adapter(tuned.original())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"its adapter is merged into the weights.*--original"):
        Pair(model)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match="its adapter is switched off"):
        Pair(model)
    Pair(model)


PROMPTS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT 0.21 calls the cache so
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # generate() gives them
@pytest.mark.parametrize("kind", PROMPTS)
def test_virtual_tokens_are_before_the_first_token_alone(kind):
    """Token by token without a cache is what generate() says with one, which PEFT has to find."""
    torch.manual_seed(2)
    model = peft.get_peft_model(tuned.original(), PROMPTS[kind]()).eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_()
    ids = said = torch.tensor([[5, 6, 7, 8]])
    for _ in range(8):
        said = torch.cat([said, model(input_ids=said).logits[:, -1:].argmax(-1)], 1)
    with Pair(model).asked(tuned=True) as asked:
        mask = torch.ones_like(ids)
        found = asked.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    assert found.tolist() == said.tolist()


@pytest.mark.parametrize("version, renamed", [("0.21.2", True), ("0.22.0", False)])
def test_peft_is_told_of_the_cache_where_it_knows_the_old_name_alone(version, renamed, monkeypatch):
    monkeypatch.setattr("peft.__version__", version)
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.22.0")
    own = lambda: {"input_ids": 1, "cache": 2}  # noqa: E731
    model = types.SimpleNamespace(base_model_prepare_inputs_for_generation=own)
    with kv_cache.known_to_peft(model):
        made = model.base_model_prepare_inputs_for_generation()
    assert made == {"input_ids": 1, "past_key_values" if renamed else "cache": 2}
    assert model.base_model_prepare_inputs_for_generation is own
