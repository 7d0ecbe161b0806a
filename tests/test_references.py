"""LAwF with a patched model: which model the frozen original is, step after step, against KL(q ‖ p) of full logits in float64."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training import V, collate, error, expected, llama, log_probs, rows, step, trainer

import fused_losses as fl

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning:transformers"),
]

TOLERANCE = 6e-7  # float64, but Llama normalises in float32


def adapted(trained=False, base=None, **options):
    """With an adapter that changes nothing yet, or one that was trained before."""
    torch.manual_seed(2)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], **options)
    model = get_peft_model(llama() if base is None else base, config).double()
    if trained:
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape))
    return model


def assert_two_steps(model, reference, data=None, **options):
    """In the first step the model may still be the reference; in the second it is not, so that the KL has a gradient."""
    data = rows(anchors=True) if data is None else data
    run = trainer(model, data, **options)
    for _ in range(2):
        plain = fl.unpatch(copy.deepcopy(model))
        loss, gradients = expected(plain, data, "lawf", reference)
        assert error(step(run), gradients) < TOLERANCE
        assert run.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-6)
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    assert all(p.grad is None for name, p in base.named_parameters() if not p.requires_grad)


def lawf(model, reference, **options):
    return fl.patch(model, fl.LAwFLoss(**options), reference=reference)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_adapter_off(trained, dora):
    model = adapted(trained, use_dora=dora)
    reference = copy.deepcopy(model) if trained else llama()
    assert_two_steps(lawf(model, "adapter-off"), reference)


def test_adapter_off_where_peft_comes_after_the_patch():
    assert_two_steps(adapted(base=lawf(llama(), "adapter-off")), llama())


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_adapter_off_with_a_trained_copy_of_the_head(trained):
    model = adapted(trained, modules_to_save=["lm_head"])
    reference = copy.deepcopy(model) if trained else llama()
    assert_two_steps(lawf(model, "adapter-off"), reference)


def test_adapter_off_leaves_frozen_adapters_frozen():
    model = adapted()
    frozen = [p for name, p in model.named_parameters() if "layers.0" in name and "lora_" in name]
    for p in frozen:
        p.requires_grad_(False)
    assert_two_steps(lawf(model, "adapter-off"), llama())
    assert frozen and not any(p.requires_grad for p in frozen)


@pytest.mark.parametrize(
    "options",
    [dict(per_device_train_batch_size=2, gradient_accumulation_steps=4), dict(gradient_checkpointing=True)],
    ids=["accumulated", "checkpointing"],
)
def test_adapter_off_with_options_of_the_trainer(options):
    assert_two_steps(lawf(adapted(), "adapter-off"), llama(), **options)


def test_start_is_a_copy_of_the_whole_model():
    assert_two_steps(lawf(llama(), "start"), llama())


def test_start_of_an_adapted_model_has_its_adapter():
    model = adapted(trained=True)
    assert_two_steps(lawf(model, "start"), copy.deepcopy(model))


@pytest.mark.parametrize("other", ["same-shape", "wider", "adapted"])
def test_another_model(other):
    wider = dict(hidden_size=24, num_attention_heads=4, num_hidden_layers=1, tie_word_embeddings=True)
    reference = {"same-shape": llama(7), "wider": llama(7, **wider), "adapted": adapted(True, llama(7))}
    reference = reference[other]
    before = {name: p.detach().clone() for name, p in reference.named_parameters()}
    assert_two_steps(lawf(llama(), reference), copy.deepcopy(reference))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in reference.named_parameters())


def test_anchor_and_retain_weights_reach_the_loss():
    data = rows(anchors=True)
    only_anchors = [
        {**r, "labels": [t if c > 0 else -100 for t, c in zip(r["labels"], r["confidence"], strict=True)]} for r in data
    ]
    _, gradients = expected(llama(), only_anchors, "lawf", llama(7))
    labels, anchors = (sum(label != -100 for r in part for label in r["labels"]) for part in (data, only_anchors))
    gradients = {name: g * 2 * anchors / labels for name, g in gradients.items()}
    run = trainer(lawf(llama(), llama(7), anchor_weight=2.0, retain_weight=0.0), data)
    assert error(step(run), gradients) < TOLERANCE


# --- the reference stays as it is


@pytest.mark.parametrize("reference", ["start", "adapter-off", "trained-adapter-off"])
def test_dropout_does_not_reach_the_reference(reference):
    make = lambda: adapted(reference.startswith("trained"), llama(attention_dropout=0.5), lora_dropout=0.5)  # noqa: E731
    batch = collate(rows(2, anchors=True))
    model = lawf(make(), reference.removeprefix("trained-"))
    model.train()
    torch.manual_seed(5)
    loss = model(**batch).loss
    assert model.training and all(m.training for m in model.modules())

    plain, frozen = make().train(), make().eval()
    confidence = batch.pop("confidence")[:, 1:].double()
    labels = batch.pop("labels")[:, 1:]
    torch.manual_seed(5)
    logp = plain(**batch).logits[:, :-1].log_softmax(-1)
    with torch.no_grad():
        p_ref = frozen(**batch).logits[:, :-1].softmax(-1)
    onehot = torch.nn.functional.one_hot(labels.clamp(min=0), V)
    q = confidence[..., None] * onehot + (1 - confidence[..., None]) * p_ref
    kl = (torch.xlogy(q, q) - q * logp).sum(-1)[labels != -100]
    assert loss.item() == pytest.approx(kl.mean().item(), rel=1e-6)


@pytest.mark.parametrize("kind", [adapted, llama])
def test_autocast_is_the_same_for_the_reference(kind):
    """Where nothing was trained yet and nothing is an anchor, the KL is 0, so it is where both are rounded alike."""
    model = lawf(kind().float(), "start" if kind is llama else "adapter-off")
    data = [{**row, "confidence": [0.0] * len(row["labels"])} for row in rows(anchors=True)]
    run = trainer(model, data, data, bf16=True)
    assert abs(run.evaluate()["eval_loss"]) < 1e-6


def test_generation_and_scoring_need_no_reference():
    model, calls = lawf(llama(), other := llama(7)), []
    other.register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, llama()(torch.tensor([[5, 6, 7]])).logits)
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
    assert not calls
    model(**collate(rows(2, anchors=True)))
    assert calls == [1]


def test_saved_models_have_no_reference_in_them(tmp_path):
    model = lawf(adapted(trained=True), "adapter-off")
    trainer(model, rows(anchors=True)).train()
    model.save_pretrained(tmp_path / "adapter")
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter").double()
    assert torch.allclose(log_probs(loaded, [5, 6, 7]), log_probs(fl.unpatch(model), [5, 6, 7]), atol=1e-6)
    full = lawf(llama(), "start")
    assert full.state_dict().keys() == llama().state_dict().keys()


# --- what cannot be


def test_other_vocabulary():
    with pytest.raises(ValueError, match=r"vocabulary has 101 tokens, the model's 97.*tokenizer"):
        lawf(llama(), llama(7, vocab_size=101))


def test_adapter_off_without_an_adapter():
    run = trainer(lawf(llama(), "adapter-off"), rows(anchors=True))
    with pytest.raises(ValueError, match=r"no PEFT adapter.*get_peft_model.*'start'"):
        run.train()


def test_adapter_off_with_parameters_trained_outside_the_adapter():
    model = adapted()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 parameters outside the adapter are trained \(model.norm.weight\)"):
        lawf(model, "adapter-off")


def test_merged_adapters():
    model = lawf(adapted(), "adapter-off")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(**collate(rows(2, anchors=True)))


def test_the_model_itself_as_its_reference():
    model = llama()
    with pytest.raises(ValueError, match="the trained model itself"):
        lawf(model, model)


def test_confidence_is_asked_for():
    run = trainer(lawf(llama(), "start"))
    with pytest.raises(ValueError, match="confidence: is missing in the batch"):
        run.train()


def kl(model):
    """Mean KL to the reference: LAwF without anchors."""
    data = collate(rows())
    data["confidence"] = torch.zeros(data["input_ids"].shape)
    with torch.no_grad():
        return model(**data).loss.item()


def test_an_adapter_that_comes_late_and_trained():
    """Such as a checkpoint that is resumed: what it started from is unknown."""
    model = adapted(base=lawf(llama(), "adapter-off"))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).add_(0.1)
    with pytest.raises(ValueError, match="came after the patch and is not at its start"):
        kl(model)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_where_the_user_has_switched_adapters_off(trained):
    model = adapted(trained)
    plain, start = copy.deepcopy(model), copy.deepcopy(model)
    lawf(model, "adapter-off")
    with model.disable_adapter():
        got = kl(model)
        assert all(layer.disable_adapters for layer in model.modules() if hasattr(layer, "lora_A"))
    if not trained:
        assert got == 0
        return
    lawf(plain.unload(), start)
    assert got == pytest.approx(kl(plain.get_base_model()), rel=1e-6) and got > 1e-3


def test_other_adapters_than_at_the_start():
    model = adapted()
    lawf(model, "adapter-off")
    kl(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    with pytest.raises(ValueError, match="has other adapters, or others are active"):
        kl(model)


def test_parameters_that_are_unfrozen_later():
    model = lawf(adapted(), "adapter-off")
    kl(model)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="parameters outside the adapter are trained"):
        kl(model)


def test_dropout_on_the_head_of_a_reference():
    model = adapted(trained=True, lora_dropout=0.5)
    head = get_peft_model(
        llama(), LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    )
    for trained in (model, head):
        base = trained.get_base_model()
        lawf(base, "start")
        trained.eval()
        assert kl(base) == 0


@pytest.mark.parametrize("moved", [1e-2, 1e-3])
def test_an_adapter_in_float32_on_a_head_in_bf16(moved):
    """The KL of two adapters that nearly agree: neither is rounded to the head's dtype."""
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).to(
        torch.bfloat16
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.float()
    model.eval()
    lawf(model, "adapter-off", gradient="exact")
    kl(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in parameters:
            p.add_(moved * torch.randn(p.shape))
    data = collate(rows())
    data["confidence"] = torch.zeros(data["input_ids"].shape)
    model(**data).loss.backward()
    head = model.get_base_model().lm_head
    state = vars(model.get_base_model())["_fused_losses"].source.frozen_head
    with torch.no_grad():
        x = (
            model.get_base_model()
            .model(data["input_ids"], attention_mask=data["attention_mask"])
            .last_hidden_state.double()
        )
    a, b = (p.detach().double().requires_grad_() for p in parameters)
    a0, b0 = (v.double() for v in state.values())
    scaling, base = head.scaling["default"], x @ head.base_layer.weight.double().T
    labels = data["labels"][:, 1:] != -100
    log_p = (base + (x @ a.T) @ b.T * scaling).log_softmax(-1)[:, :-1][labels]
    log_r = (base + (x @ a0.T) @ b0.T * scaling).log_softmax(-1)[:, :-1][labels]
    (log_r.exp() * (log_r - log_p)).sum(-1).mean().backward()
    for p, truth in zip(parameters, (a, b), strict=True):
        assert (p.grad.double() - truth.grad).norm() / truth.grad.norm() < 5e-3
