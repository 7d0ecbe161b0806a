"""A patched model answers TRL's `fused_lm_head=True` with what TRL's own head answers, for any of its trainers."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from training import DESCENT, V, collate, error, llama, mixtral, rows, step, tokenizer, with_lora
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

import fused_losses as fl

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning:transformers"),
]

EVERYTHING = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TOLERANCE = 1e-6  # TRL's head sums in float32
PER_TOKEN = (*EVERYTHING, "label_mask")
GRADED = ("log_probs", "entropy")


def small(config, model, **more):
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    heads = dict(num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    return model(config(**sizes, **heads, initializer_range=0.3, **more)).double()


def gemma2():
    return small(Gemma2Config, Gemma2ForCausalLM, final_logit_softcapping=3.0)


def granite():
    return small(GraniteConfig, GraniteForCausalLM, logits_scaling=0.8)


def with_bias():
    model = llama(tie_word_embeddings=False)
    model.lm_head = torch.nn.Linear(16, V, dtype=torch.float64)
    return model


def frozen_head():
    model = llama(tie_word_embeddings=False)
    model.lm_head.requires_grad_(False)
    return model


def experts():
    """PyTorch has no grouped products in float64."""
    return mixtral().float()


MODELS = {f.__name__: f for f in (llama, gemma2, granite, with_bias, frozen_head, with_lora, experts)}


def batch(**more):
    return {**collate(rows(4)), **more}


def with_head(model, patched, **head):
    """TRL's head on a model; of a patched one it is ours that answers."""
    if patched:
        fl.patch(model)
    add_fused_lm_head(model.get_base_model() if hasattr(model, "peft_config") else model, **head)
    return model.train()


def answered(model, inputs, upstream=GRADED):
    """The output, and gradients of the upstream fields under weights that are not ones."""
    out = model(**inputs, fused_lm_head=True, use_cache=False)
    g = torch.Generator().manual_seed(3)
    total = sum((getattr(out, name) * torch.randn(out.log_probs.shape, generator=g)).sum() for name in upstream)
    total.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance=TOLERANCE):
    assert type(ours) is FusedCausalLMOutput
    for name in (*PER_TOKEN, "loss", "aux_loss"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert (mine is None) == (other is None), name
        if other is not None:
            assert mine.shape == other.shape and mine.requires_grad == other.requires_grad, name
            assert (mine.dtype == torch.bool) == (other.dtype == torch.bool), name
            torch.testing.assert_close(mine.double(), other.double(), rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("upstream", [GRADED, ("log_probs",), ("entropy",)], ids="+".join)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_all_fields_and_their_gradients(model, upstream):
    head = dict(temperature=0.7, outputs=EVERYTHING)
    (ours, mine), (theirs, other) = (answered(with_head(model(), p, **head), batch(), upstream) for p in (True, False))
    tolerance = 1e-5 if model is experts else TOLERANCE
    assert_same(ours, theirs, tolerance)
    assert error(mine, other) < tolerance


@pytest.mark.parametrize("asked", [("log_probs",), ("log_probs", "entropy"), ("log_probs", "is_top1")], ids="+".join)
def test_only_what_was_asked_for(asked):
    ours, theirs = (with_head(llama(), p, outputs=asked)(**batch(), fused_lm_head=True) for p in (True, False))
    assert_same(ours, theirs)


def test_shifted_labels():
    inputs = batch()
    inputs["shift_labels"] = torch.nn.functional.pad(inputs.pop("labels"), (0, 1), value=-100)[:, 1:].contiguous()
    ours, theirs = (with_head(llama(), p, outputs=EVERYTHING)(**inputs, fused_lm_head=True) for p in (True, False))
    assert_same(ours, theirs)


def test_without_any_label():
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    (ours, mine), (theirs, _) = (answered(with_head(llama(), p, outputs=EVERYTHING), inputs) for p in (True, False))
    assert_same(ours, theirs)
    assert not any(g.any() for g in mine.values())


def test_the_number_of_items_divides_the_loss():
    ours, theirs = (
        with_head(llama(), p)(**batch(), fused_lm_head=True, num_items_in_batch=torch.tensor(77)) for p in (True, False)
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("cast", [False, True])
def test_under_autocast(cast):
    """In bfloat16 both are off; ours, whose gradients are sums in float32, by no more."""
    head = dict(outputs=EVERYTHING, cast_lm_head_to_fp32=cast)

    def run(patched):
        with torch.autocast("cpu", torch.bfloat16):
            model = with_head(llama().float(), patched, **head)
            return answered(model, batch())

    truth = answered(with_head(llama(), False, outputs=EVERYTHING), batch())
    (ours, mine), (theirs, other) = run(True), run(False)
    for name in ("log_probs", "entropy", "mean_logits", "log_sum_sq_probs"):
        off, allowed = ((getattr(out, name) - getattr(truth[0], name)).abs().max() for out in (ours, theirs))
        assert off <= 1.5 * allowed + 1e-3, name
    assert error(mine, truth[1]) <= 1.5 * error(other, truth[1])


def test_lora_on_the_head():
    """TRL's head leaves an adapter of the head out; the truth is of full logits."""
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model = get_peft_model(llama(tie_word_embeddings=False), config)
    inputs = batch()
    z = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    mask, log_p = labels != -100, z.log_softmax(-1)
    expected = {
        "log_probs": log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0],
        "entropy": -(log_p.exp() * log_p).sum(-1), "mean_logits": z.mean(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
    }  # fmt: skip
    out, gradients = answered(with_head(copy.deepcopy(model), True, outputs=EVERYTHING), inputs)
    for name, values in expected.items():
        torch.testing.assert_close(getattr(out, name), values.masked_fill(~mask, 0), rtol=1e-9, atol=1e-9, msg=name)
    g = torch.Generator().manual_seed(3)
    total = sum((expected[n] * mask * torch.randn(labels.shape, generator=g)).sum() for n in GRADED)
    total.backward()
    assert error(gradients, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}) < 1e-9


@pytest.mark.parametrize("asked", [("log_probs", "entropy"), ("log_probs", "entropy", "is_top1")], ids="+".join)
def test_gradients_are_sparse_but_for_the_entropy(asked):
    """Whoever only logs the entropy does not pay for its gradient, which is exact."""
    model, found = llama(vocab_size=9000, tie_word_embeddings=False).float(), {}
    model.lm_head.weight.data *= 10  # flat distributions have exact gradients
    for gradient in ("exact", "sparse"):
        own = copy.deepcopy(model).train()
        add_fused_lm_head(fl.patch(own, fl.CrossEntropyLoss(gradient=gradient)), outputs=asked)
        out = own(**batch(), fused_lm_head=True)
        weights = torch.randn(out.log_probs.shape, generator=torch.Generator().manual_seed(1))
        for name in GRADED:
            total = (getattr(out, name) * weights).sum()
            found[gradient, name] = torch.autograd.grad(total, own.lm_head.weight, retain_graph=True)[0]
    difference = {name: (found["sparse", name] - found["exact", name]).norm() for name in GRADED}
    assert difference["entropy"] < 1e-5 * found["exact", "entropy"].norm()
    assert 1e-5 < difference["log_probs"] / found["exact", "log_probs"].norm() < 0.05


@pytest.mark.parametrize("weights", ["same", "others", "none"])
def test_a_sum_of_log_probabilities_goes_through_the_loss(weights):
    """SFTTrainer's way costs no other pass; any other way has the same gradients."""
    found = []
    for patched in (True, False):
        model = with_head(llama(), patched, outputs=("log_probs", "entropy", "is_top1"))
        out = model(**batch(), fused_lm_head=True)
        given = {"same": 0.3, "none": 0.0, "others": torch.linspace(0, 1, out.log_probs.numel())}[weights]
        (given * out.log_probs.flatten()).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    if weights == "none":
        assert not any(g.any() for g in found[0].values())
    else:
        assert error(*found) < TOLERANCE


def test_other_objectives_have_a_sum_and_say_so():
    model = with_head(fl.patch(llama(), fl.TALRLoss()), False)
    log_probs = model(**batch(), fused_lm_head=True).log_probs
    assert log_probs.sum().requires_grad
    with pytest.raises(TypeError, match=r"cross-entropy, fused_losses.patch\(model\)"):
        log_probs[:, -2:]


def test_another_release_s_head_is_refused():
    """Without its temperature the numbers would be others, and nobody would see it."""
    model = fl.patch(llama()).train()
    original, divided_by = model.forward, 0.7

    def forward(*args, fused_lm_head=False, **kwargs):
        assert divided_by
        return original(*args, **kwargs)

    model.forward = forward
    assert model(**batch()).loss.requires_grad
    with pytest.raises(TypeError, match=r"does not say its temperature and outputs as TRL 1.16's does"):
        model(**batch(), fused_lm_head=True)


def test_a_backward_in_evaluation_is_refused():
    model = fl.patch(llama().train(), fl.TALRLoss()).train()
    model(**batch())
    out = model.eval()(**batch(), fused_lm_head=True)
    with pytest.raises(RuntimeError, match="is the mean nll and not TALRLoss's"):
        out.log_probs[:, -3:].sum().backward()


# --- the trainers


def preferences():
    made = []
    for chosen, rejected in zip(rows(8), rows(8, seed=1), strict=True):
        prompt = " ".join(f"w{i}" for i in chosen["input_ids"][:3])
        texts = (" " + " ".join(f"w{i}" for i in row["input_ids"][3:]) for row in (chosen, rejected))
        made.append(dict(zip(("prompt", "chosen", "rejected"), (prompt, *texts), strict=True)))
    return made


def labelled():
    return [
        {"prompt": r["prompt"], "completion": r[kind], "label": kind == "chosen"}
        for r in preferences() for kind in ("chosen", "rejected")
    ]  # fmt: skip


def reward(completions, **_):
    return [float(len(set(text.split()))) for text in completions]


def reference(model):
    """Of DPO and KTO; with PEFT it is the model without its adapter."""
    return None if hasattr(model, "peft_config") else llama(seed=1)


def dpo(model, **options):
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(**{**DESCENT, **PLAIN, "beta": 0.5, **options})
    return DPOTrainer(
        model, reference(model), args=arguments, train_dataset=Dataset.from_list(preferences()),
        processing_class=tokenizer(),
    )  # fmt: skip


def kto(model, **options):
    from trl import KTOConfig, KTOTrainer

    arguments = KTOConfig(**{**DESCENT, **PLAIN, **options})
    return KTOTrainer(
        model, reference(model), args=arguments, train_dataset=Dataset.from_list(labelled()),
        processing_class=tokenizer(),
    )  # fmt: skip


def _online(trainer, config, model, **options):
    torch.manual_seed(5)
    sizes = dict(num_generations=4, max_completion_length=6, temperature=0.8, steps_per_generation=1)
    arguments = config(**{**DESCENT, **PLAIN, **sizes, **options})
    prompts = [{"prompt": r["prompt"]} for r in preferences()]
    return trainer(
        model, reward_funcs=reward, args=arguments, train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer(),
    )  # fmt: skip


def grpo(model, **options):
    from trl import GRPOConfig, GRPOTrainer

    return _online(GRPOTrainer, GRPOConfig, model, **options)


def rloo(model, **options):
    from trl import RLOOConfig, RLOOTrainer

    return _online(RLOOTrainer, RLOOConfig, model, **options)


PLAIN = dict(bf16=False, gradient_checkpointing=False)
CASES = {
    "dpo": (dpo, llama, {}),
    "dpo-peft": (dpo, with_lora, {}),
    "dpo-weighted": (dpo, llama, dict(use_weighting=True)),
    "dpo-ld": (dpo, llama, dict(ld_alpha=0.5)),
    "dpo-sft": (dpo, llama, dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])),
    "dpo-precomputed": (dpo, llama, dict(precompute_ref_log_probs=True)),
    "kto": (kto, llama, {}),
    "kto-peft": (kto, with_lora, {}),
    "grpo": (grpo, llama, {}),
    "grpo-kl-entropy": (grpo, with_lora, dict(beta=0.1, entropy_coef=0.05)),
    "grpo-top-entropy": (grpo, llama, dict(top_entropy_quantile=0.5)),
    "rloo": (rloo, with_lora, dict(beta=0.1)),
}
UNLIKE = ("time", "runtime", "per_second", "total_flos")


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_a_trainer(case):
    """Gradients, and all that is logged."""
    make, new, options = CASES[case]
    found = []
    for patched in (True, False):
        model = new()
        run = make(fl.patch(model) if patched else model, **options)
        torch.manual_seed(7)
        gradients = step(run)
        logged = {k: v for k, v in run.state.log_history[0].items() if not any(u in k for u in UNLIKE)}
        found.append((gradients, logged))
    (mine, ours), (other, theirs) = found
    assert error(mine, other) < 1e-5
    assert ours.keys() == theirs.keys() and len(ours) >= 8
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("tied", "before"), [(True, True), (False, False)])
def test_a_head_that_the_trainer_runs_in_float32(tied, before):
    """`cast_lm_head_to_fp32` of GRPOTrainer puts a forward of its own on the head; labels count with it too."""
    found = []
    for patched in (True, False):
        model = llama(tie_word_embeddings=tied).bfloat16()
        run = grpo(fl.patch(model) if patched and before else model, cast_lm_head_to_fp32=True)
        if patched and not before:
            fl.patch(run.model)
        gradients, train = {}, run.training_step

        def training_step(*args, run=run, gradients=gradients, train=train, **more):
            loss = train(*args, **more)
            gradients |= {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
            return loss

        run.training_step = training_step
        torch.manual_seed(7)
        run.train()
        found.append((gradients, run.model(**batch()).loss))
    (mine, loss), (other, expected) = found
    assert mine["lm_head.weight" if not tied else "model.embed_tokens.weight"].dtype == torch.float32
    assert error(mine, other) < 1e-6
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
