"""AnchorSession with tiny random models: every kind of cache, statistics against float64, sampling, adapters."""

import math
import subprocess
import sys

import cache_names
import pytest
import torch
from session_models import adapted, llama, numbers, probabilities, tiny, tokenizer
from transformers import T5Config, T5ForConditionalGeneration

import fused_losses as fl
from fused_losses.anchors import AnchorSession
from fused_losses.anchors.forwards import Forward
from fused_losses.anchors.predictions import choose, predictions

# PEFT asks transformers for what it calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

# Which of a full cache's layers can be cropped: all; none once the window of 8 is full; none, as they are recurrent.
CROPPED, REMADE = ("LlamaForCausalLM", "GPT2LMHeadModel"), (
    "MistralForCausalLM", "Gemma2ForCausalLM", "MambaForCausalLM", "JambaForCausalLM", "Qwen3NextForCausalLM",
    "FalconH1ForCausalLM", "RwkvForCausalLM", "BambaForCausalLM",
)  # fmt: skip
PROMPT = list(range(10, 20))


def started(model, **options):
    session = AnchorSession(model, numbers(), max_new_tokens=20, **options)
    session.start([], prompt_ids=PROMPT)
    return session


def least_likely(session, position):
    return session.likeliest(position, 97)[-20].token_id


@pytest.mark.parametrize("name", [*CROPPED, *REMADE])
def test_a_continuation_is_what_the_model_says_of_the_same_text_anew(name):
    model = tiny(name)
    session = started(model)
    list(session.generate())
    token = least_likely(session, 12)
    session.replace(12, token)
    list(session.generate())
    session.undo()
    session.replace(5, least_likely(session, 5))
    list(session.generate())
    ids = [*PROMPT, *session.token_ids]
    p = probabilities(model, ids)[len(PROMPT) - 1 : -1]
    assert len(session.token_ids) == 26
    for row, token in zip(p, session.tokens, strict=True):
        assert token.probability == pytest.approx(float(row[token.token_id]), abs=1.5e-6)
        assert token.entropy == pytest.approx(float(torch.special.entr(row).sum()), abs=8e-6)
        assert token.replaced or row[token.token_id] > row.max() - 1e-5


@pytest.mark.parametrize("name, cropped", [(n, True) for n in CROPPED] + [(n, False) for n in REMADE])
def test_only_what_is_new_goes_through_the_model_where_the_cache_can_be_cropped(name, cropped):
    model = tiny(name)
    session = started(model)
    list(session.generate())
    token, fed = least_likely(session, 12), []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, out: fed.append(args[0].shape[-1]))
    session.replace(12, token)
    next(session.generate())
    hook.remove()
    assert fed == ([1, 1] if cropped else [len(PROMPT) + 12, 1])


@pytest.mark.parametrize("name", ["MistralForCausalLM", "MambaForCausalLM", "LlamaForCausalLM"])
def test_logits_after_several_more_tokens_than_the_cache_holds(name):
    model = tiny(name)
    forward, ids = Forward(model), [*range(3, 40)]
    p = probabilities(model, ids)
    for length in (12, 20, 19, 37, 3):
        assert torch.allclose(forward.row(ids[:length]).double().softmax(-1), p[length - 1], atol=2e-5), length
        assert torch.allclose(forward.peek(ids[:9]).double().softmax(-1), p[8], atol=2e-5), length


@pytest.mark.parametrize("name", cache_names.NAMES)
def test_the_cache_is_used_by_whatever_name(name):
    model, ids = cache_names.llama_class(name)(llama().config).eval(), [*range(3, 40)]
    forward, p = Forward(model), probabilities(model, ids)
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: fed.append(args[0].shape[-1]))
    for length, new in ((12, 12), (20, 8), (19, 1), (37, 18)):
        fed = []
        assert torch.allclose(forward.row(ids[:length]).double().softmax(-1), p[length - 1], atol=2e-5), length
        assert fed == [new]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "MambaForCausalLM"])
def test_long_answers_come_in_pieces(name, monkeypatch):
    monkeypatch.setattr("fused_losses.anchors.forwards.PIECE", 7)
    model, ids = tiny(name), [*range(3, 40)]
    pieces = list(Forward(model).pieces(ids, 5))
    assert [len(rows) for rows in pieces] == [7, 7, 7, 7, 5]
    assert torch.allclose(torch.cat(pieces).double().softmax(-1), probabilities(model, ids)[4:], atol=2e-5)


def test_an_interrupted_forward_leaves_nothing_behind(monkeypatch):
    model, ids = tiny("LlamaForCausalLM"), [*range(3, 20)]
    forward = Forward(model)
    forward.row(ids[:10])

    def interrupted(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        forward.row(ids)
    hook.remove()
    assert torch.allclose(forward.row(ids).double().softmax(-1), probabilities(model, ids)[-1], atol=2e-5)


def test_of_equal_logits_the_lower_id_comes_first():
    (said,) = predictions(torch.zeros(1, 97), [3])
    assert said.ids[0] == 0 and said.rank == 4 and choose(torch.zeros(97), 0, 1.0, (0, 0)) == 0
    assert said.entropy == pytest.approx(math.log(97)) and said.margin == pytest.approx(0, abs=1e-9)


def test_the_likeliest_tokens_beyond_those_that_are_kept():
    model = tiny("LlamaForCausalLM")
    session = started(model)
    list(session.generate())
    before = session.tokens
    for position in (0, 7, 20):
        row = probabilities(model, [*PROMPT, *session.token_ids])[len(PROMPT) - 1 + position]
        found = session.likeliest(position, 200)
        assert [c.token_id for c in found[:5]] == row.topk(5).indices.tolist() and len(found) == 97
        assert sum(c.probability for c in found) == pytest.approx(1, abs=2e-7)
        assert [c.probability for c in found[:5]] == pytest.approx(row.topk(5).values.tolist(), abs=3e-7)
    assert session.tokens == before and len(list(session.generate(3))) == 3


def test_a_model_in_training_mode_answers_without_dropout_and_stays_in_it():
    model = llama(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    answers = set()
    for _ in range(2):
        session = AnchorSession(model, tokenizer(), max_new_tokens=12)
        session.start("Who are you?")
        list(session.generate())
        answers.add(tuple(session.token_ids))
    assert len(answers) == 1 and [module.training for module in model.modules()] == modes


def test_a_patched_model_answers_as_before():
    def answer(model):
        session = AnchorSession(model, tokenizer(), max_new_tokens=12)
        session.start("Who are you?")
        list(session.generate())
        return session.tokens

    model = llama()
    before = answer(model)
    fl.patch(model, fl.TALRLoss())
    assert answer(model) == before


# Sampling.


def drawn(seed, model=None, **options):
    session = started(model or tiny("LlamaForCausalLM"), seed=seed, **{"temperature": 1.0, **options})
    list(session.generate())
    return session


def test_draws_depend_on_the_seed_alone():
    assert drawn(0).token_ids == drawn(0).token_ids != drawn(1).token_ids
    torch.manual_seed(5)
    state = torch.get_rng_state()
    stopped = started(tiny("LlamaForCausalLM"), temperature=1.0)
    for _ in range(4):
        list(stopped.generate(5))
    assert stopped.token_ids == drawn(0).token_ids and torch.equal(torch.get_rng_state(), state)


def test_draws_follow_the_probabilities():
    row, count = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0]), 4000
    drawn = torch.tensor([choose(row, 0.5, 1.0, (seed, 7)) for seed in range(count)])
    expected = (row / 0.5).softmax(0) * count
    # χ² of 4 degrees of freedom: above 18.5 in one of 1000 sets of draws; these are fixed.
    assert (((drawn.bincount(minlength=5) - expected) ** 2) / expected).sum() < 18.5


def test_top_p_leaves_the_likeliest_tokens():
    model = tiny("LlamaForCausalLM")
    row, order = probabilities(model, PROMPT)[-1].sort(descending=True)
    kept = set(order[: int((row.cumsum(0) < 0.5).sum()) + 1].tolist())
    first = {next(started(model, temperature=1.0, top_p=0.5, seed=seed).generate()).token_id for seed in range(60)}
    assert first <= kept and len(first) > 1


def test_a_drawn_token_that_is_not_the_likeliest_can_be_confirmed_as_an_anchor():
    session = drawn(0)
    at = next(token.position for token in session.tokens if token.rank > 1)
    assert session.tokens[at].margin < 0 and session.suspicious(at - 1, share=1) == at
    text = session.token_ids
    done = session.replace(at, text[at], confidence=0.5)
    assert session.token_ids == text and [anchor.position for anchor in done.anchors] == [at]
    assert done.anchors[0].original_token_id == session.likeliest(at, 1)[0].token_id


# Adapters: the tuned model answers, the original judges.


def tuned_session(**options):
    model = adapted(llama())
    session = AnchorSession(model, tokenizer(), max_new_tokens=12, reference="base", round=2, **options)
    session.start("Who are you?")
    list(session.generate())
    return session, model


def both(session, model):
    """Probabilities [T, V] of the answer under the original and under the tuned model."""
    ids, start = [*session.prompt_ids, *session.token_ids], len(session.prompt_ids)
    with model.disable_adapter():
        original = probabilities(model, ids)
    return original[start - 1 : -1], probabilities(model, ids)[start - 1 : -1]


def test_the_tuned_model_answers_and_the_original_judges():
    session, model = tuned_session()
    position = 6
    original, tuned = (p[position] for p in both(session, model))
    session.replace(position, token := int(tuned.argsort()[len(tuned) // 2]))
    (anchor,) = session.anchors
    assert anchor.probability == pytest.approx(float(original[token]), rel=8e-7)
    assert anchor.original_probability == pytest.approx(float(original[anchor.original_token_id]), rel=3e-6)
    assert session.tokens[position].probability == pytest.approx(float(tuned[token]), rel=1e-6)
    assert anchor.round == 2


def test_what_the_original_ranks_first_is_no_anchor_though_the_tuned_model_does_not_say_it():
    session, model = tuned_session()
    original, tuned = both(session, model)
    at = next(k for k in range(len(tuned)) if original[k].argmax() != tuned[k].argmax())
    done = session.replace(at, int(original[at].argmax()))
    assert done.changed and done.anchors == () and "the original ranks it first" in done.message


def test_what_only_the_tuned_model_says_can_be_confirmed():
    session, model = tuned_session()
    original, tuned = both(session, model)
    at = next(k for k in range(len(tuned)) if original[k].argmax() != tuned[k].argmax())
    text = session.token_ids
    (anchor,) = session.replace(at, text[at]).anchors
    assert session.token_ids == text and anchor.original_token_id == int(original[at].argmax())


def test_what_only_the_tuned_model_says_is_held_to_the_original_until_it_is_kept():
    session, model = tuned_session()
    original, _ = both(session, model)
    held = [k for k, token in enumerate(session.token_ids) if original[k].argmax() != token]
    assert session.held_to_original() == held and len(held) > 1
    ids = session.token_ids
    anchors = session.keep()
    assert [anchor.position for anchor in anchors] == held and session.token_ids == ids
    assert [anchor.probability for anchor in anchors] == pytest.approx(
        [float(original[k][ids[k]]) for k in held], rel=5e-6
    )
    assert {anchor.confidence for anchor in anchors} == {1.0} and session.held_to_original() == []
    session.undo()  # one step
    assert session.anchors == () and session.keep() == anchors


def test_kl_to_the_original_of_each_token(monkeypatch):
    monkeypatch.setattr("fused_losses.anchors.forwards.PIECE", 5)
    session, model = tuned_session()
    p, q = both(session, model)
    kl = (p * (p.log() - q.log())).sum(-1)
    assert session.kl_to_original() == pytest.approx(kl.tolist(), rel=5e-6, abs=3e-9) and kl.max() > 0.01


def test_another_model_as_the_original():
    original, model = llama(0), llama(1)
    session = AnchorSession(model, tokenizer(), max_new_tokens=8, reference=original)
    session.start("Who are you?")
    list(session.generate())
    p = probabilities(original, [*session.prompt_ids, *session.token_ids])[len(session.prompt_ids) - 1 + 4]
    (anchor,) = session.replace(4, int(p.argsort()[0])).anchors
    assert anchor.probability == pytest.approx(float(p.min()), rel=2e-6)  # AVX2: 8e-7
    plain = AnchorSession(original, tokenizer(), max_new_tokens=8)
    plain.start("Who are you?")
    list(plain.generate())
    assert session.record().model == plain.record().model


def test_the_digest_is_the_originals_before_and_after_an_adapter_is_put_on():
    plain = AnchorSession(llama(), tokenizer(), max_new_tokens=3)
    plain.start("x")
    list(plain.generate())
    session, model = tuned_session()
    digest = session.record().model.digest
    assert digest == plain.record().model.digest
    alone = AnchorSession(model, tokenizer(), max_new_tokens=3)
    alone.start("x")
    list(alone.generate())
    assert alone.record().model.digest != digest  # there the adapter is part of the original


# Refused.


@pytest.mark.parametrize("name", ["OpenAIGPTLMHeadModel", "XLNetLMHeadModel"])
def test_a_model_without_a_cache_is_refused(name):
    with pytest.raises(ValueError, match=f"model: {name} takes none of cache, past_key_values"):
        AnchorSession(tiny(name), numbers())


def test_a_model_that_returns_no_cache_is_refused():
    with pytest.raises(ValueError, match="model: RecurrentGemmaForCausalLM returns none of"):
        next(started(tiny("RecurrentGemmaForCausalLM")).generate())


def test_a_model_with_an_encoder_is_refused():
    config = T5Config(vocab_size=97, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="has an encoder"):
        AnchorSession(T5ForConditionalGeneration(config), numbers())


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="its adapter is prompt learning"):
        AnchorSession(model, tokenizer())


def test_a_tokenizer_larger_than_the_head_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer: has 3[0-9][0-9] tokens, the model's head 97"):
        AnchorSession(tiny("LlamaForCausalLM"), tokenizer())


def test_another_vocabulary_of_the_reference_is_refused():
    with pytest.raises(ValueError, match="reference: its head has 97 tokens"):
        AnchorSession(llama(), tokenizer(), reference=tiny("LlamaForCausalLM"))


def test_logits_that_are_not_finite_are_an_error():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    session = AnchorSession(model, tokenizer())
    session.start("x")
    with pytest.raises(ValueError, match="its logits are not finite"):
        next(session.generate())
    assert session.token_ids == []


def test_importing_the_anchors_needs_no_transformers():
    code = "import sys, fused_losses.anchors; assert not {'transformers', 'peft', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
