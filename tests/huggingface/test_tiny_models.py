"""The tiny models are what their users take them for: complete, finite, without dropout, every factor at work."""

import inspect

import pytest
import torch

transformers = pytest.importorskip("transformers")
import tiny_models  # noqa: E402

TESTED_WITH = "5.23."
EXPECTED_UNBUILDABLE = {
    "Gemma4AssistantForCausalLM": "its forward takes no labels",
    "Gemma4UnifiedAssistantForCausalLM": "its forward takes no labels",
    "DiffusionGemmaForBlockDiffusion": "its forward takes no labels",
    "InklingForConditionalGeneration": "it needs scipy",
    "MuseSparkForConditionalGeneration": "its audio tower has sizes of its own",
    "PI0ForConditionalGeneration": "its forward takes no labels",
    "Qwen2_5OmniForConditionalGeneration": "its forward takes no labels",
    "Qwen3OmniMoeForConditionalGeneration": "its forward takes no labels",
    "VibeVoiceAsrForConditionalGeneration": "its audio tower has sizes of its own",
    **tiny_models.NOT_TRIED,
}
WITHOUT_HEAD = ("BlipForConditionalGeneration", "NemotronH_Omni_Reasoning_V3")  # that get_output_embeddings() names
NAMES = tiny_models.quick_names()


def check(name: str) -> None:
    model, inputs = tiny_models.build(name)
    first, second = model(**inputs), model(**inputs)
    assert model.training
    assert torch.equal(first.loss, second.loss)
    assert first.logits.shape[-1] % 64
    # Nearly uniform logits would hide a wrong head, large ones would hide rounding; some models mask the ids of images.
    assert 0.2 < first.logits[first.logits > torch.finfo(torch.float32).min].std() < 3
    if "load_balancing_loss_func" in inspect.getsource(type(model).forward):
        assert first.aux_loss > 0

    first.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() for g in gradients.values())
    if name not in WITHOUT_HEAD:
        head = [p.grad for p in model.get_output_embeddings().parameters() if p.grad is not None]
        assert head and all(gradient.any() for gradient in head)
    assert all(p.any() for p in model.parameters() if p.numel())


@pytest.mark.parametrize("name", NAMES)
def test_every_class(name):
    """With another release of transformers a class that fails is listed among the skipped ones."""
    try:
        check(name)
    except tiny_models.CannotBuild as error:
        if name not in EXPECTED_UNBUILDABLE and transformers.__version__.startswith(TESTED_WITH):
            raise
        pytest.skip(f"{name}: {error}")
    except Exception as error:
        if transformers.__version__.startswith(TESTED_WITH):
            raise
        pytest.skip(f"{name}: {type(error).__name__}: {error}")


def test_list_of_exceptions():
    assert len(NAMES) >= 165
    assert set(NAMES) >= set(EXPECTED_UNBUILDABLE)


def test_batch():
    """Two rows, one of them padded, labels ignored in different places of each."""
    _, inputs = tiny_models.build("LlamaForCausalLM")
    ignored = inputs["labels"] == -100
    assert inputs["attention_mask"].sum(1).tolist() == [12, 9]
    assert ignored[1, 9:].all()
    assert not torch.equal(ignored[0, :9], ignored[1, :9])
    assert torch.equal(inputs["labels"][~ignored], inputs["input_ids"][~ignored])


def test_seed():
    state = torch.get_rng_state()
    (a, x), (b, y), (c, z) = (tiny_models.build("LlamaForCausalLM", seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert torch.equal(x["input_ids"], y["input_ids"])
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert not torch.equal(x["input_ids"], z["input_ids"])


def test_size_is_checked_before_memory(monkeypatch):
    monkeypatch.setitem(tiny_models.OVERRIDES, "LlamaForCausalLM", dict(vocab_size=10**12))
    with pytest.raises(tiny_models.CannotBuild, match="a size that the table does not know"):
        tiny_models.build("LlamaForCausalLM")
