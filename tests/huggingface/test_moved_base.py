"""reference="base" with adapters whose initialisation has changed the weights around them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training import collate, llama, rows

import fused_losses as fl

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning:transformers")

MOVES = ["pissa", "pissa_niter_4", "olora", "OLoRA"]
NEED_MORE = ["corda", "loftq", "lora_ga"]  # than a configuration to be made: data, or a quantizer
LEAVES = [True, False, "gaussian", "orthogonal"]


def adapted(initialisation, base=None):
    torch.manual_seed(2)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=initialisation)
    return get_peft_model((llama() if base is None else base).float(), config).double()


def kl(model):
    """The loss where no token is an anchor."""
    batch = collate(rows(anchors=True))
    batch["confidence"] = torch.zeros_like(batch["confidence"])
    return float(model(**batch).loss.detach())


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("reference", ["base", "adapter-off"])
def test_base_is_refused(name, reference):
    with pytest.raises(
        ValueError, match=f"init_lora_weights='{name}' has moved .* not the original; take reference='start'"
    ):
        fl.patch(adapted(name), fl.LAwFLoss(), reference=reference)


@pytest.mark.parametrize("name", NEED_MORE)
def test_base_is_refused_by_what_the_configuration_says(name):
    model = adapted(True)
    model.peft_config["default"].init_lora_weights = name
    with pytest.raises(ValueError, match=f"init_lora_weights='{name}' has moved"):
        fl.patch(model, fl.LAwFLoss(), reference="base")


def test_base_is_refused_where_peft_comes_after_the_patch():
    model = adapted("pissa", base=fl.patch(llama(), fl.LAwFLoss(), reference="base"))
    with pytest.raises(ValueError, match="init_lora_weights='pissa' has moved"):
        kl(model)


def test_base_is_refused_with_a_second_adapter_that_moves():
    model = adapted(True).float()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="olora"))
    with pytest.raises(ValueError, match="init_lora_weights='olora' has moved"):
        fl.patch(model, fl.LAwFLoss(), reference="base")


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_start_is_the_original(name):
    """To what float32 loses when weights are taken apart."""
    model = fl.patch(adapted(name), fl.LAwFLoss(), reference="start")
    assert abs(kl(model)) < 1e-9
    other = fl.patch(adapted(name), fl.LAwFLoss(), reference=llama().double())
    assert abs(kl(other)) < 1e-9


@pytest.mark.parametrize("name", LEAVES)
def test_others_are_taken(name):
    model = fl.patch(adapted(name), fl.LAwFLoss(), reference="base")
    changes = name is False  # its adapter does something from the start, and the base is what it was
    assert (kl(model) > 1e-6) == changes
    truth = fl.patch(adapted(name), fl.LAwFLoss(), reference=llama().double())
    assert kl(model) == pytest.approx(kl(truth), rel=1e-6, abs=1e-12)


SOME_OPTIONS = {
    "boft": {"boft_block_size": 4}, "oft": {"oft_block_size": 4}, "c3a": {"block_size": 4},
    "vblora": {"vector_length": 8}, "fourierft": {"n_frequency": 8}, "trainable_tokens": {"token_indices": [1, 2]},
    "prefix_tuning": {"num_virtual_tokens": 2}, "prompt_tuning": {"num_virtual_tokens": 2},
    "p_tuning": {"num_virtual_tokens": 2}, "adaption_prompt": {"adapter_len": 2, "adapter_layers": 1},
}  # fmt: skip
# AdaLoRA adds a term to the loss; Poly wants tasks, CPT logits, X-LoRA adapters, Shadow a forward of its own.
OTHERWISE = {"adalora", "poly", "cpt", "xlora", "shadow"}


def with_tuner(name, config):
    """A model with the tuner, or why there is none."""
    where = {"target_modules": ["q_proj", "v_proj"]}
    for options in (where, {}):  # prompt learning has no layers
        try:
            config_of_it = config(task_type="CAUSAL_LM", **options, **SOME_OPTIONS.get(name, {}))
            torch.manual_seed(2)
            return get_peft_model(llama().float(), config_of_it)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
    return said


@pytest.mark.filterwarnings("ignore")
def test_base_is_the_original_with_every_tuner_of_peft():
    """In their default initialisation. With tuned weights the KL is that to the model before the tuner was there."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    batch = collate(rows(anchors=True))
    batch["confidence"] = torch.zeros_like(batch["confidence"])
    labelled = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        ids = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
        original = llama().float().eval()(**ids).logits.log_softmax(-1)[:, :-1]
    wrong, tried, not_made = {}, [], {}
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        name = kind.value.lower()
        if name in OTHERWISE:
            continue
        model = with_tuner(name, config)
        if isinstance(model, str):
            not_made[name] = model
            continue
        fl.patch(model, fl.LAwFLoss(), reference="base")
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
            got = float(model.eval()(**batch).loss)
            fl.unpatch(model)
            tuned = model(**ids).logits[:, -original.shape[1] - 1 : -1].log_softmax(-1)
        expected = float((original.exp() * (original - tuned)).sum(-1)[labelled].mean())
        tried.append(name)
        if not (expected > 1e-7 and abs(got - expected) <= 1e-3 * expected + 1e-7):
            wrong[name] = (got, expected)
    assert not wrong
    assert len(tried) >= 10 and {"lora", "ia3", "ln_tuning", "prefix_tuning"} <= set(tried), not_made
