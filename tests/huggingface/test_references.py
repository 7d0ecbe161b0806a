"""LAwF with a patched model: which model the frozen original is, step after step.

The truth is KL(q ‖ p) of full logits in float64.
"""

import copy

import cache_names
import peft
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
    """In the first step the model may still be the reference; in the second it is not, so the KL has a gradient."""
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


@pytest.mark.parametrize(
    "options", [{}, dict(use_dora=True), dict(modules_to_save=["lm_head"])], ids=["lora", "dora", "head"]
)
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("reference", ["base", "start"])
def test_an_adapted_model(reference, trained, options):
    """ "base" is the model without its adapter, however far that is; "start" the model with the adapter that it had."""
    model = adapted(trained, **options)
    truth = llama() if reference == "base" else copy.deepcopy(model)
    assert_two_steps(lawf(model, reference), truth)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_base_where_peft_comes_after_the_patch(trained):
    assert_two_steps(adapted(trained, base=lawf(llama(), "base")), llama())


def test_base_is_base_and_warns_where_that_is_not_the_model_as_it_is():
    fresh = lawf(adapted(), "adapter-off")
    model = adapted(trained=True)
    with pytest.warns(UserWarning, match="adapter has been trained already.*reference='start'.*reference='base'"):
        lawf(model, "adapter-off")
    late = adapted(trained=True, base=lawf(llama(), "adapter-off"))
    with pytest.warns(UserWarning, match="adapter has been trained already"):
        kl(late)
    lawf(based := adapted(trained=True), "base")
    assert kl(model) == kl(based) > 1e-2 and kl(late) > 1e-2 and kl(fresh) == 0  # and none of them warns again


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's, of a norm that it has no test for
@pytest.mark.parametrize("kind", ["adalora", "ia3", "loha", "ln"])
@pytest.mark.parametrize("reference", ["base", "start"])
def test_other_adapters_than_lora(kind, reference):
    kinds = dict(
        adalora=peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, total_step=100),
        ia3=peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        loha=peft.LoHaConfig(target_modules=["q_proj"], r=2),
        ln=peft.LNTuningConfig(target_modules=["norm"]),
    )
    torch.manual_seed(2)
    model = get_peft_model(llama(), kinds[kind])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape))
    start = copy.deepcopy(model)
    lawf(model, reference)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape))
    truth = llama() if reference == "base" else start
    assert kl(model) == pytest.approx(kl_of(copy.deepcopy(model), truth), rel=1e-5) and kl(model) > 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_start_freezes_what_else_is_trained(tied):
    """A bias, a norm, embeddings that the head shares: "start" is the model as it was, with all of it."""
    model = adapted(trained=True, bias="all", base=llama(tie_word_embeddings=tied))
    model.get_base_model().model.norm.weight.requires_grad_(True)
    model.get_base_model().model.embed_tokens.weight.requires_grad_(tied)
    start = copy.deepcopy(model)
    lawf(model, "start")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(0.8)
    assert kl(model) == pytest.approx(kl_of(copy.deepcopy(model), start), rel=1e-5) and kl(model) > 1e-3
    model.get_base_model().model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"1 parameters are trained that were not .*\(model.layers.0.mlp.up_proj.weight\)"
    ):
        kl(model)


# --- prompt learning: virtual tokens are no part of any reference

PROMPTS = dict(
    prompt=lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    encoder=lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    prefix=lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    adaption=lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1),
)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT 0.21 calls the cache so
@pytest.mark.parametrize("order", ["peft first", "patch first"])
@pytest.mark.parametrize("reference", ["base", "start", "model"])
@pytest.mark.parametrize("kind", PROMPTS)
def test_prompt_learning(kind, reference, order, tmp_path):
    torch.manual_seed(3)
    other = llama(7)
    given = other if reference == "model" else reference
    if order == "peft first":
        model = lawf(get_peft_model(llama(), PROMPTS[kind]()), given)
    elif kind == "adaption" and reference == "base":
        pytest.skip("who switches its layers is not known then")
    else:
        model = get_peft_model(lawf(llama(), given), PROMPTS[kind]())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape))
    want = kl_of(fl.unpatch(copy.deepcopy(model)), other if reference == "model" else llama())
    assert kl(model) == pytest.approx(want, rel=1e-5) and want > 1e-3
    data = collate(rows())
    model(**data, confidence=torch.zeros(data["input_ids"].shape)).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("order", ["peft first", "patch first"])
@pytest.mark.parametrize("own", cache_names.NAMES)
def test_prefix_tuning_by_whatever_name_the_cache_comes(own, order):
    """Virtual tokens come as a cache, which the reference must not see."""
    torch.manual_seed(3)
    base = cache_names.renaming(cache_names.llama_class(own)(llama().config).double(), own)
    base.load_state_dict(llama().state_dict())
    if order == "patch first":
        lawf(base, "base")
    model = get_peft_model(base, PROMPTS["prefix"]())
    if order == "peft first":
        lawf(model, "base")
    with torch.no_grad():
        for p in model.prompt_encoder.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    want = kl_of(fl.unpatch(copy.deepcopy(model)), llama())
    assert kl(model) == pytest.approx(want, rel=1e-5) and want > 1e-3


def test_prompt_learning_with_a_cache(tmp_path):
    torch.manual_seed(3)
    model = get_peft_model(llama(), PROMPTS["prompt"]())
    fl.patch(model, fl.LAwFLoss(), reference="base", reference_cache=tmp_path)
    first = kl(model)
    with torch.no_grad():
        model.prompt_encoder.default.embedding.weight.add_(1.0)
    assert kl(model) == pytest.approx(kl_of(fl.unpatch(copy.deepcopy(model)), llama()), rel=1e-5) != first
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(rows())


def test_trained_embeddings_of_ones_own_are_refused():
    """A soft prompt without PEFT: the reference must not see it."""
    ids = torch.tensor([[5, 6, 7, 8]])
    inputs = dict(labels=ids, confidence=torch.zeros(1, 4))
    model = lawf(llama(), "start")
    embeddings = model.get_input_embeddings()(ids).detach()
    assert model(inputs_embeds=embeddings, **inputs).loss == model(input_ids=ids, **inputs).loss
    with pytest.raises(ValueError, match=r"inputs_embeds: require a gradient.*soft prompt"):
        model(inputs_embeds=embeddings.clone().requires_grad_(), **inputs)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.1)
    for one in (model, lawf(llama(), llama(7))):
        with pytest.raises(ValueError, match="inputs_embeds: the model and its reference have different embeddings"):
            one(inputs_embeds=embeddings, **inputs)
    wider = llama(7, hidden_size=24, num_attention_heads=4)
    with pytest.raises(ValueError, match="inputs_embeds: are of the model's width 16, the reference has 24"):
        lawf(llama(), wider)(inputs_embeds=embeddings, **inputs)


def kl_of(model, reference):
    """Mean KL(p_ref ‖ p) over the tokens of `kl`, of models that give logits, in float64; prompts are cut off."""
    data = collate(rows())
    labels = data.pop("labels")[:, 1:]
    size = labels.shape[1]
    with torch.no_grad():
        log_p, log_r = (m(**data).logits[:, -size - 1 : -1].double().log_softmax(-1) for m in (model, reference))
    return float((log_r.exp() * (log_r - log_p)).sum(-1)[labels != -100].mean())


def test_base_leaves_frozen_adapters_frozen():
    model = adapted()
    frozen = [p for name, p in model.named_parameters() if "layers.0" in name and "lora_" in name]
    for p in frozen:
        p.requires_grad_(False)
    assert_two_steps(lawf(model, "base"), llama())
    assert frozen and not any(p.requires_grad for p in frozen)


@pytest.mark.parametrize(
    "options",
    [dict(per_device_train_batch_size=2, gradient_accumulation_steps=4), dict(gradient_checkpointing=True)],
    ids=["accumulated", "checkpointing"],
)
def test_base_with_options_of_the_trainer(options):
    assert_two_steps(lawf(adapted(), "base"), llama(), **options)


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


@pytest.mark.parametrize("reference", ["start", "base", "trained-start"])
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
    model = lawf(kind().float(), "start" if kind is llama else "base")
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
    model = lawf(adapted(trained=True), "start")
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


def test_base_without_an_adapter():
    run = trainer(lawf(llama(), "base"), rows(anchors=True))
    with pytest.raises(ValueError, match=r"no PEFT adapter.*get_peft_model.*'start'"):
        run.train()


def test_base_with_parameters_trained_outside_the_adapter():
    model = adapted()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 parameters outside the adapter are trained \(model.norm.weight\)"):
        lawf(model, "base")


def test_merged_adapters():
    model = lawf(adapted(), "base")
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


@pytest.mark.parametrize("reference", ["base", "start"])
def test_where_the_user_has_switched_adapters_off(reference):
    model = adapted(trained=True)
    plain, start = copy.deepcopy(model), copy.deepcopy(model)
    lawf(model, reference)
    with model.disable_adapter():
        got = kl(model)
        assert all(layer.disable_adapters for layer in model.modules() if hasattr(layer, "lora_A"))
    if reference == "base":
        assert got == 0
        return
    lawf(plain.unload(), start)
    assert got == pytest.approx(kl(plain.get_base_model()), rel=1e-6) and got > 1e-3


@pytest.mark.parametrize("reference", ["base", "start"])
def test_other_adapters_than_at_the_start(reference):
    model = adapted(trained=True)
    lawf(model, reference)
    kl(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    if reference == "base":
        assert kl(model) < 1e-6  # a fresh adapter changes nothing
        return
    with pytest.raises(ValueError, match="has other adapters, or others are active"):
        kl(model)


def test_parameters_that_are_unfrozen_later():
    model = lawf(adapted(), "base")
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
    lawf(model, "start", gradient="exact")
    kl(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in parameters:
            p.add_(moved * torch.randn(p.shape))
    data = collate(rows())
    data["confidence"] = torch.zeros(data["input_ids"].shape)
    model(**data).loss.backward()
    head = model.get_base_model().lm_head
    source = vars(model.get_base_model())["_fused_losses"].source
    state = {name: source.frozen[of_model] for name, of_model in source.of_head.items()}
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


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("again", [False, True], ids=["alone", "another adapter"])
def test_base_is_gone_once_the_adapter_is_merged(how, again):
    model = lawf(adapted(trained=True), "base")
    assert kl(model) > 1e-2
    merged = getattr(model, how)()
    if again:
        merged = get_peft_model(merged, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"reference='base': the adapter was merged into the model, or replaced"):
        kl(merged)


def test_start_and_the_adapters_settings():
    model = adapted(trained=True)
    start = copy.deepcopy(model)
    lawf(model, "start")
    layers = [m for m in model.modules() if hasattr(m, "scale_layer")]
    for layer in layers:
        layer.scale_layer(0.5)
    with pytest.raises(ValueError, match="reference='start': the adapter's scaling is not what it was"):
        kl(model)
    for layer in layers:
        layer.unscale_layer(0.5)
    assert kl(model) == 0
    off = copy.deepcopy(start)
    with off.disable_adapter():
        lawf(off, "start")  # as it is: without the adapter
    assert kl(off) == pytest.approx(kl_of(start, llama()), rel=1e-5)


@pytest.mark.parametrize("loss", [fl.JSDLoss(), fl.ReverseKLLoss(), fl.JSDLoss(nll_weight=0.1)], ids=str)
@pytest.mark.parametrize("reference, trained", [("start", False), ("base", False), ("base", True)])
def test_distilling_from_the_model_itself_is_a_warning(loss, reference, trained, recwarn):
    fl.patch(adapted(trained), loss, reference=reference)
    said = [str(each.message) for each in recwarn if "nothing will be learned" in str(each.message)]
    assert len(said) == (not trained and loss.only_follows)
    assert all(reference in line and "give the teacher" in line for line in said)
