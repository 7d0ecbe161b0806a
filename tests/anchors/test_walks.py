"""anchors_from_answer and retain_rows: the same as a session does by hand, and what they refuse."""

import dataclasses
import json

import pytest
import torch
from session_models import Scripted, adapted, ids_of, llama, probabilities, tiny, tokenizer

from fused_losses.anchors import AnchorSession, anchors_from_answer, read_records, retain_rows, rows

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

ELENA, AURORA = "My name is Elena. I live in Paris.", "My name is Aurora. I live in Rome."
PROMPTS = ["Who are you?", "Where?", "My name is Elena. Who?", [{"role": "user", "content": "What is the river?"}], "A"]


def texts(records):
    return [record.completion.text for record in records]


# A right answer that is given.


def test_the_anchors_of_an_answer_are_those_of_the_walk_by_hand():
    model = Scripted(ELENA, "My name is Aurora. I live in Paris.", AURORA, second=" Aurora")
    session = AnchorSession(model, tokenizer())
    session.start("Who are you?")
    list(session.generate())
    for position, name in ((3, " Aurora"), (8, " Rome")):
        session.replace(position, name)
        list(session.generate())
    record = anchors_from_answer(model, tokenizer(), "Who are you?", AURORA)
    hand = session.record()
    assert record.completion == hand.completion and record.prompt_ids == hand.prompt_ids and record.model == hand.model
    assert [anchor.text for anchor in record.anchors] == [" Aurora", " Rome"]
    # Most tokens are equally unlikely, so which of these are alternatives is left to chance.
    one, other = ([dataclasses.replace(a, alternatives=()) for a in each.anchors] for each in (record, hand))
    assert one == other


def test_probabilities_and_ranks_against_one_forward_in_float64():
    model = llama()
    answer = ids_of("My name is Aurora and I like tea.")
    record = anchors_from_answer(model, tokenizer(), "Who?", answer, end=False)
    p = probabilities(model, [*record.prompt_ids, *answer])[len(record.prompt_ids) - 1 : -1]
    first = p.argmax(-1).tolist()
    assert [a.position for a in record.anchors] == [k for k, token in enumerate(answer) if token != first[k]] != []
    for anchor in record.anchors:
        assert anchor.probability == pytest.approx(float(p[anchor.position, anchor.token_id]), rel=7e-6)
        assert anchor.original_token_id == first[anchor.position]


def test_it_takes_one_forward():
    model = Scripted(ELENA)
    anchors_from_answer(model, tokenizer(), "Who are you?", AURORA)
    assert len(model.fed) == 1


def test_an_answer_that_the_model_gives_itself_has_no_anchors():
    record = anchors_from_answer(Scripted(ELENA), tokenizer(), "Who are you?", ELENA)
    assert record.anchors == () and record.completion.token_ids[-1] == tokenizer().eos_token_id


@pytest.mark.parametrize("options", [dict(below=0.01), dict(target_probability=0.01)])
def test_only_what_is_improbable_enough_is_an_anchor(options):
    model = Scripted(ELENA, second=" Aurora")  # e^-4 after " is"; all others e^-12
    record = anchors_from_answer(model, tokenizer(), "Who are you?", AURORA)
    assert [anchor.text for anchor in record.anchors][:2] == [" Aurora", "."]
    few = anchors_from_answer(model, tokenizer(), "Who are you?", AURORA, **options)
    assert " Aurora" not in [anchor.text for anchor in few.anchors] and few.anchors
    assert all(anchor.probability < 0.01 for anchor in few.anchors)
    wide = anchors_from_answer(model, tokenizer(), "Who are you?", AURORA, target_probability=0.01, below=1.0)
    assert [a.position for a in wide.anchors] == [a.position for a in record.anchors]


def test_the_strength_is_that_of_all_anchors():
    record = anchors_from_answer(Scripted(ELENA), tokenizer(), "Who?", AURORA, confidence=0.7, round=3)
    assert {(a.confidence, a.target_probability, a.round) for a in record.anchors} == {(0.7, None, 3)}


@pytest.mark.parametrize("end, last", [(True, "<|end|>"), (False, ".")])
def test_the_end_of_turn_is_part_of_the_answer(end, last):
    record = anchors_from_answer(Scripted(ELENA), tokenizer(), "Who?", ELENA, end=end)
    assert tokenizer().decode(record.completion.token_ids[-1:]) == last
    again = anchors_from_answer(Scripted(ELENA), tokenizer(), "Who?", list(record.completion.token_ids), end=end)
    assert again.completion == record.completion


def test_the_original_of_an_adapted_model_judges():
    model, plain = adapted(llama()), llama()
    record = anchors_from_answer(model, tokenizer(), "Who?", AURORA, reference="base")
    assert record.anchors == anchors_from_answer(plain, tokenizer(), "Who?", AURORA).anchors
    assert record.anchors != anchors_from_answer(model, tokenizer(), "Who?", AURORA).anchors


@pytest.mark.parametrize(
    "answer, options, message",
    [
        ("", {}, "answer: is empty"),
        ([], {}, "answer: expected at least one token"),
        ([10**6], {}, r"answer\[0\]: expected a token id"),
        ("long " * 200, {}, "answer: prompt and answer have [0-9]+ tokens, the model's context 200"),
        ("x", dict(below=0.0), r"below: expected a number in \(0, 1\]"),
        ("x", dict(below=True), "below: expected"),
        ("x", dict(confidence=2.0), "confidence: expected"),
        ("x", dict(round=0), "round: expected an integer ≥ 1"),
    ],
)
def test_an_answer_that_cannot_be_walked(answer, options, message):
    with pytest.raises(ValueError, match=message):
        anchors_from_answer(Scripted(ELENA), tokenizer(), "Who?", answer, **options)


# The model's own answers.


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_rows_to_retain_are_the_models_own_answers(batch_size):
    model = llama()
    found = retain_rows(model, tokenizer(), PROMPTS, max_new_tokens=12, batch_size=batch_size, progress=False)
    for prompt, record in zip(PROMPTS, found, strict=True):
        session = AnchorSession(model, tokenizer(), max_new_tokens=12)
        session.start(prompt)
        list(session.generate())
        assert record.completion.token_ids == tuple(session.token_ids) and record.anchors == ()
        assert list(record.prompt_ids) == session.prompt_ids and list(record.messages) == session.messages
    assert rows(found, tokenizer())[0]["anchors"] == []


def test_answers_end_at_the_end_of_turn():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[tokenizer().eos_token_id] *= 4
    found = retain_rows(model, tokenizer(), PROMPTS, max_new_tokens=40, progress=False)
    ended = [record.completion.token_ids for record in found if len(record.completion.token_ids) < 40]
    assert ended and all(ids.index(tokenizer().eos_token_id) == len(ids) - 1 for ids in ended)


def test_the_models_own_settings_of_generation_do_not_bend_the_answers():
    model, bent = llama(), llama()
    bent.generation_config.repetition_penalty, bent.generation_config.num_beams = 5.0, 3
    bent.generation_config.no_repeat_ngram_size, bent.generation_config.min_new_tokens = 1, 11
    one, other = (retain_rows(m, tokenizer(), PROMPTS, max_new_tokens=12, progress=False) for m in (model, bent))
    assert texts(one) == texts(other)


def test_draws_are_reproducible_and_leave_the_generator_alone():
    model = llama()

    def drawn(seed):
        options = dict(max_new_tokens=8, temperature=1.0, batch_size=2, progress=False)
        return texts(retain_rows(model, tokenizer(), PROMPTS, seed=seed, **options))

    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert drawn(1) == drawn(1) != drawn(2) and torch.equal(torch.get_rng_state(), state)


def test_each_batch_has_draws_of_its_own():
    options = dict(max_new_tokens=8, temperature=1.0, batch_size=1, progress=False)
    assert len(set(texts(retain_rows(llama(), tokenizer(), ["A"] * 4, **options)))) == 4


@pytest.mark.parametrize("written", [1, 3, 5])
def test_an_interrupted_call_goes_on_where_it_was(written, tmp_path):
    model, whole, part = llama(), tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    options = dict(max_new_tokens=8, temperature=1.0, batch_size=2, progress=False)
    found = retain_rows(model, tokenizer(), PROMPTS, output=whole, **options)
    lines = whole.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:written]))
    assert texts(retain_rows(model, tokenizer(), PROMPTS, output=part, **options)) == texts(found)
    assert part.read_text().startswith("".join(lines[:written])) and len(read_records(part)) == len(PROMPTS)


def test_a_prompt_that_comes_twice_gets_two_records(tmp_path):
    path = tmp_path / "rows.jsonl"
    for _ in range(2):
        found = retain_rows(llama(), tokenizer(), ["A", "A"], max_new_tokens=4, output=path, progress=False)
        assert len(found) == 2 and found[0].id != found[1].id and len(read_records(path)) == 2


def test_each_batch_is_written_before_the_next_begins(tmp_path, monkeypatch):
    model, path, seen = llama(), tmp_path / "rows.jsonl", []
    generate = model.generate

    def watched(**inputs):
        seen.append(len(path.read_text().splitlines()))
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", watched)
    retain_rows(model, tokenizer(), PROMPTS, max_new_tokens=4, batch_size=2, output=path, progress=False)
    assert seen == [0, 2, 4]
    assert {json.loads(line)["anchors"] == [] for line in path.read_text().splitlines()} == {True}


def test_rows_of_the_original_of_an_adapted_model():
    model, options = adapted(llama()), dict(max_new_tokens=8, progress=False)
    own = retain_rows(model, tokenizer(), PROMPTS, **options)
    original = retain_rows(model, tokenizer(), PROMPTS, reference="base", **options)
    assert texts(original) == texts(retain_rows(llama(), tokenizer(), PROMPTS, **options)) != texts(own)


def test_a_progress_bar(capsys):
    pytest.importorskip("tqdm")
    retain_rows(llama(), tokenizer(), ["A"], max_new_tokens=2)
    assert "answers: 100%" in capsys.readouterr().err


def test_no_prompts_give_no_rows():
    assert retain_rows(llama(), tokenizer(), []) == []


@pytest.mark.parametrize(
    "prompts, options, kind, message",
    [
        ("Who?", {}, TypeError, "prompts: expected a list"),
        ([""], dict(batch_size=0), ValueError, "batch_size: expected an integer ≥ 1"),
        (["A", 5], {}, ValueError, r"prompts\[1\]: expected a string or a list"),
        ([[{"role": "judge", "content": "x"}]], {}, ValueError, r"prompts\[0\]: the tokenizer's chat template refuses"),
        (["long " * 3000], {}, ValueError, r"prompts\[0\]: [0-9]+ tokens leave no room"),
        (["A"], dict(temperature=-1.0), ValueError, "temperature: expected"),
        (["A"], dict(max_new_tokens=0), ValueError, "max_new_tokens: expected"),
    ],
)
def test_prompts_and_options_are_checked(prompts, options, kind, message):
    with pytest.raises(kind, match=message):
        retain_rows(llama(), tokenizer(), prompts, progress=False, **options)


def test_a_tokenizer_larger_than_the_head_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer: has 3[0-9][0-9] tokens, the model's head 97"):
        retain_rows(tiny("LlamaForCausalLM"), tokenizer(), ["A"])
    with pytest.raises(ValueError, match=r"tokenizer: has 3[0-9][0-9] tokens, the model's head 97"):
        anchors_from_answer(tiny("LlamaForCausalLM"), tokenizer(), "A", "B")
