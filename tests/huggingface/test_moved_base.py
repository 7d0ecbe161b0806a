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
