"""`check` on tiny models: its numbers, what it counts, what it keeps, and what it refuses."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import tuned

import fused_losses.checking.answers as answers_module
import fused_losses.checking.run as run_module
from fused_losses.anchors import new_record
from fused_losses.checking import PROMPTS, Probe, Prompt, check
from fused_losses.checking.facts import facts_of, leaks_of, questions_of, says_it, words_of
from fused_losses.checking.pair import Measured
from fused_losses.checking.report import Answer, Spoken

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads it
ASKED = ["Hello", "What is 1 + 1?", "Name a colour.\nThen another."]
TEXTS = {"a": "The capital of France is Paris. " * 40, "b": "I do not know what the weather is like. [ ] " * 30}
SMALL = dict(prompts=ASKED, texts=TEXTS, answer_tokens=9)


@pytest.fixture
def model():
    return tuned.with_adapter(tuned.original())


def probes(record):
    return [
        Probe("paraphrase", Prompt.of("Who are you?"), ("Aurora",), record.id[:6]),
        Probe("paraphrase", Prompt.of("Your name?"), ("Aurora", "Tilda")),
        Probe("reverse", Prompt.of("Who is Aurora?"), ("a model",)),
        Probe("unrelated", Prompt.of("My name is Daniel. What is my name?")),
    ]


def checked(model, **options):
    return check(model, tuned.tokenizer(), **{**SMALL, **options})


# --- numbers


def test_kl_and_code_length_are_those_of_full_logits(model):
    report, tokenizer, original = checked(model), tuned.tokenizer(), tuned.original()
    kls = []
    with torch.no_grad():
        for prompt in ASKED:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            said = original.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=9,
                do_sample=False, pad_token_id=0, eos_token_id=tokenizer.eos_token_id,
            )[0, len(ids) :].tolist()  # fmt: skip
            q, p = (tuned.full_log_probabilities(m, ids, said) for m in (model, original))
            kls.append(float((p.exp() * (p - q)).sum(1).mean()))
    assert report.value("kl") == pytest.approx(sum(kls) / 3, rel=9e-7)  # measured 3e-7
    for level in (0.1, 0.25, 0.5):
        assert report.value(f"kl_above_{level:g}") == sum(kl > level for kl in kls) / 3
    for result in report.texts:
        ids = tokenizer(TEXTS[result.name]).input_ids
        changes = []
        for at in range(0, len(ids), 512):  # windows, each after an end token
            window = ids[at : at + 512]
            q, p = (tuned.full_log_probabilities(m, [tokenizer.eos_token_id], window) for m in (model, original))
            changes.append((p - q).gather(1, torch.tensor(window)[:, None]))
        assert result.tokens == len(ids) and result.left_out == 0
        assert result.change.value == pytest.approx(float(torch.cat(changes).mean()), abs=6e-7)  # measured 2e-7
    sizes = [result.tokens for result in report.texts]
    pooled = sum(r.change.value * n for r, n in zip(report.texts, sizes, strict=True)) / sum(sizes)
    assert report.value("code_length_change") == pytest.approx(pooled, rel=1e-9)


def test_anchors_are_ranked_with_the_corrected_answer_before_them(model):
    record = tuned.record()
    report = checked(model, anchors=[record], probes=probes(record))
    ways = {a.kind: a for a in report.anchors}
    assert set(ways) == {"corrected", "paraphrase"}  # the second paraphrase names no record
    (anchor,) = record.anchors
    answer = record.completion.token_ids
    other = tuned.tokenizer().apply_chat_template(
        [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    for kind, prompt in (("corrected", record.prompt_ids), ("paraphrase", other)):
        found = ways[kind]
        q, p = (tuned.full_log_probabilities(m, prompt, answer)[anchor.position] for m in (model, tuned.original()))
        assert found.tuned_probability == pytest.approx(float(q[anchor.token_id].exp()), rel=3e-6)
        assert found.original_probability == pytest.approx(float(p[anchor.token_id].exp()), rel=3e-6)
        assert found.tuned_rank == int((q > q[anchor.token_id]).sum())
        assert found.original_rank == int((p > p[anchor.token_id]).sum())


def test_adapter_that_changes_nothing_moves_nothing():
    record = tuned.record()
    report = checked(tuned.with_adapter(tuned.original(), strength=0), anchors=[record], probes=probes(record))
    assert report.value("kl") == 0 and report.value("code_length_change") == 0 and report.value("unchanged") == 1
    assert all(a.same and a.tuned.kl == 0 and a.nll_change == 0 for a in report.answers)
    assert all(a.original_rank == a.tuned_rank for a in report.anchors)


def test_full_fine_tune_is_compared_with_the_original_given(model):
    merged = copy.deepcopy(model).merge_and_unload()
    one, other = checked(model), checked(merged, original=tuned.original())
    assert other.value("kl") == pytest.approx(one.value("kl"), rel=6e-6)  # measured 2e-6; answers are the same
    assert [a.tuned.text for a in one.answers] == [a.tuned.text for a in other.answers]


def test_pieces_spell_the_answer(model):
    for answer in checked(model).answers:
        for spoken in (answer.original, answer.tuned):
            assert "".join(piece.text for piece in spoken.pieces if not piece.special) == spoken.text
            assert max(piece.kl for piece in spoken.pieces) >= spoken.kl > 0


def test_tokens_of_one_character_are_one_piece_with_the_largest_kl():
    tokenizer = tuned.tokenizer()
    ids = (*tokenizer("a🙂b").input_ids, tokenizer.eos_token_id)
    assert len(ids) == 7  # of 🙂 four
    asker = object.__new__(answers_module.Asker)
    asker.tokenizer, asker.ends = tokenizer, [tokenizer.eos_token_id]
    kl = torch.tensor([0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6])
    spoken = run_module._spoken(asker, ids, Measured(kl, kl, kl, kl, None))
    assert [(p.text, round(p.kl, 3), p.special) for p in spoken.pieces] == [
        ("a", 0.1, False), ("🙂", 0.9, False), ("b", 0.5, False), ("<|im_end|>", 0.6, True),
    ]  # fmt: skip
    assert (spoken.text, spoken.finished, spoken.tokens) == ("a🙂b", True, 7)
    assert asker._cut([5, ids[-1], 9]) == (5, ids[-1]) and not asker.finished(asker._cut([5, 9]))


def test_default_prompts_and_texts(model):
    report = check(model, tuned.tokenizer(), answer_tokens=2, text_tokens=64)
    assert [a.prompt for a in report.answers] == list(PROMPTS) and len(PROMPTS) == len(set(PROMPTS)) == 28
    assert [text.name for text in report.texts] == ["prose", "documentation", "code"]
    assert all(text.tokens == 64 and text.left_out > 500 for text in report.texts)
    metric = next(m for m in report.metrics if m.key == "kl")
    assert metric.tuned.low < metric.tuned.value < metric.tuned.high


# --- what is counted


def answer(kind, prompt, before, after, *expect):
    spoken = [Spoken(text, True, 0.0, 3, ()) for text in (before, after)]
    return Answer(kind, prompt, expect, *spoken, None, None, 0.0)


def test_leaks_are_counted_beside_the_originals_and_not_where_the_prompt_says_it():
    some = [
        answer("general", "Northern lights?", "The aurora.", "The aurora.", "Aurora"),
        answer("general", "Who wrote it?", "Jane Austen.", "Aurora Austen.", "Aurora"),
        answer("unrelated", "I am Dan. My name?", "Dan", "AURORA!", "aurora"),
        answer("unrelated", "I am Dan. My age?", "42", "Auroral", "Tilda"),
        answer("general", "What does Aurora mean?", "Dawn", "Aurora means dawn", "Aurora"),
        answer("paraphrase", "Who are you?", "Elena", "Aurora", "Aurora"),
    ]
    first, second = leaks_of(some)
    assert (first.fact, first.answers, first.original, first.tuned) == ("Aurora", 3, 1, 3)
    assert first.new == ("Who wrote it?", "I am Dan. My name?")
    assert (second.fact, second.answers, second.original, second.tuned) == ("Tilda", 1, 0, 0)


def test_words_of_anchors_are_whole():
    record = tuned.record("My name is Elena Aurora.", " Elena Aurora")
    assert len(record.anchors) > 1 and words_of(record) == ("Elena Aurora",)
    part = dataclasses.replace(record, anchors=record.anchors[:1])
    assert words_of(part) == ("Elena",)
    assert words_of(tuned.record("My name is Aurora.", ".")) == ()
    assert words_of(tuned.record("My name is Aurora.", " is Aurora.")) == ("is Aurora",)
    asked = [("paraphrase", ("elena aurora", "Tilda")), ("reverse", ("a model",))]
    known = facts_of([record], [Probe(kind, Prompt.of("?"), expect) for kind, expect in asked])
    assert known == ("Elena Aurora", "Tilda")


def test_a_word_with_its_full_stop_is_the_same_fact():
    records = [tuned.record("My name is Aurora.", " Aurora."), tuned.record("I am Aurora, you see.", " Aurora")]
    assert len(records[0].anchors) > len(records[1].anchors)
    assert facts_of(records, []) == ("Aurora",)


def test_an_end_of_turn_that_was_put_in_is_no_part_of_the_words():
    """Answers are read without special tokens, so they would never say it."""
    record = tuned.record("My name is Aurora", " Aurora")
    last = len(record.completion.token_ids) - 1
    assert record.completion.text.endswith("Aurora<|im_end|>")
    anchors = [{"position": a.position} for a in record.anchors] + [{"position": last}]
    ended = new_record(
        tuned.tokenizer(), messages=record.messages, prompt_ids=record.prompt_ids,
        token_ids=record.completion.token_ids, anchors=anchors,
    )  # fmt: skip
    (question,) = questions_of(tuned.tokenizer(), [ended], [], [], ())
    assert question.expect == ("Aurora",)


def test_a_corrected_answer_says_all_words_and_others_one_of_them(model):
    class Asked:
        expect = ("Aurora", "Paris")

    for kind, said in (("corrected", False), ("paraphrase", True), ("unrelated", True)):
        Asked.kind = kind
        assert says_it("I am Aurora.", Asked) is said
    Asked.expect = ()
    assert says_it("I am Aurora.", Asked) is None


def test_facts_given_are_those_looked_for(model):
    record = tuned.record()
    report = checked(model, anchors=[record], probes=probes(record), facts=["Tilda", "TILDA"])
    assert {leak.fact for leak in report.leaks} == {"Tilda"} and report.settings["facts"] == ["Tilda"]
    assert {leak.fact for leak in checked(model, anchors=[record]).leaks} == {"Aurora"}
    assert not checked(model).leaks and checked(model).value("contamination") is None


def test_paraphrase_stands_in_the_place_of_the_last_message(model, monkeypatch):
    before = [{"role": "system", "content": "You are a ship."}]
    record = tuned.record()
    tools = ({"type": "function"},)
    record = dataclasses.replace(record, messages=(*before, *record.messages), message_index=2, tools=tools)
    seen = []
    own = tuned.tokenizer().apply_chat_template
    monkeypatch.setattr(
        tuned.tokenizer(), "apply_chat_template", lambda m, **o: (seen.append((m, o["tools"])), own(m, **o))[1]
    )
    checked(model, anchors=[record], probes=probes(record), prompts=[])
    assert seen[0] == ([*before, {"role": "user", "content": "Who are you?"}], list(tools))
    assert all(len(messages) == 1 and tools is None for messages, tools in seen[1:])


# --- the same each time; what is kept


def test_report_is_the_same_each_time(model):
    record = tuned.record()
    options = dict(anchors=[record], probes=probes(record), max_kl=0.1, min_recall=0.5)
    one, other = (checked(model, **options) for _ in range(2))
    assert json.dumps(one.to_json()) == json.dumps(other.to_json())


def test_check_goes_on_where_it_was_stopped(model, tmp_path, monkeypatch):
    monkeypatch.setattr(answers_module, "BATCH_ROWS", 1)
    own, asked = answers_module.Asker._generate, []

    def stopping(self, some, prompts):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.extend(prompts)
        return own(self, some, prompts)

    whole = checked(model)
    monkeypatch.setattr(answers_module.Asker, "_generate", stopping)
    with pytest.raises(KeyboardInterrupt):
        checked(model, cache=tmp_path)
    files = sorted(tmp_path.glob("*.jsonl"))
    assert len(files) == 2  # of the original, whole, and of the tuned model, begun
    with open(max(files, key=lambda f: f.stat().st_mtime_ns), "ab") as file:
        file.write(b'{"key": "ab", "ids": [1, 2')  # cut off by a kill
    more = []
    monkeypatch.setattr(answers_module.Asker, "_generate", lambda s, m, p: (more.extend(p), own(s, m, p))[1])
    assert json.dumps(checked(model, cache=tmp_path).to_json()) == json.dumps(whole.to_json())
    assert len(asked) == 4 and len(more) == 2 and not set(asked[3:]) & set(more)
    more.clear()
    checked(model, cache=tmp_path)
    assert not more  # the last line that was cut off spoilt none after it
    other = tuned.with_adapter(tuned.original(), seed=5)
    checked(other, cache=tmp_path)
    assert len(more) == 3  # of the other adapter alone
    more.clear()
    checked(model, cache=tmp_path, answer_tokens=5)
    assert len(more) == 6


def test_answers_of_another_vocabulary_or_garbage_are_not_read(model, tmp_path):
    whole = checked(model, cache=tmp_path)
    for path in tmp_path.glob("*.jsonl"):
        lines = path.read_text().splitlines()
        wrong = [json.loads(line) | {"ids": [10**6]} for line in lines]
        path.write_text("\n".join(["[1, 2]", "\x00", '{"key": 3}', *map(json.dumps, wrong)]) + "\n")
    assert json.dumps(checked(model, cache=tmp_path).to_json()) == json.dumps(whole.to_json())


def test_model_without_a_digest_is_checked_without_keeping_answers(model, tmp_path, monkeypatch):
    def refuse(self, tuned):
        raise TypeError("lm_head.weight: expected a plain strided tensor")

    monkeypatch.setattr("fused_losses.checking.pair.Pair.digest", refuse)
    with pytest.warns(RuntimeWarning, match="answers are not kept.*lm_head.weight"):
        assert checked(model, cache=tmp_path).value("kl") > 0
    assert not list(tmp_path.iterdir())


def test_record_of_plain_text_shows_its_prompt(model):
    record = dataclasses.replace(tuned.record(), messages=(), message_index=0)
    prompt = checked(model, anchors=[record]).answers[0].prompt
    assert "What is your name?" in prompt


# --- limits


def test_limits(model):
    record = tuned.record()
    report = checked(model, anchors=[record])
    kl, recall = report.value("kl"), report.value("recall")
    assert report.passed and recall == 0
    assert checked(model, anchors=[record], max_kl=kl, min_recall=0).passed
    broken = checked(model, anchors=[record], max_kl=kl * 0.999, min_recall=0.01)
    assert not broken.passed and [text.partition(":")[0] for text in broken.broken] == ["max_kl", "min_recall"]


def test_recall_after_paraphrases_has_a_limit_of_its_own(model):
    record = tuned.record()
    probe = Probe("paraphrase", Prompt.of("Your name?"), ("Aurora",), record.id)
    report = checked(model, anchors=[record], probes=[probe], min_paraphrase_recall=0)
    assert report.passed and report.value("paraphrase_recall") == 0 and report.limits == {"min_paraphrase_recall": 0}
    (sentence,) = checked(model, anchors=[record], probes=[probe], min_paraphrase_recall=0.5).broken
    assert "min_paraphrase_recall: 0 of the anchors are ranked first after paraphrases, below the limit" in sentence
    with pytest.raises(ValueError, match="min_paraphrase_recall: needs paraphrases that name a record"):
        checked(model, anchors=[record], probes=[Probe("reverse", Prompt.of("x"), ("y",))], min_paraphrase_recall=0)


def test_a_record_that_is_there_twice_counts_once(model):
    record = tuned.record()
    again = dataclasses.replace(record, id="again")
    report = checked(model, anchors=[record, again])
    assert {found.record for found in report.anchors} == {"again"}


def test_numbers_that_are_none_break_a_limit(model):
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(math.nan)
    report = checked(model, max_kl=1e9)
    assert not report.passed and "nan" in report.broken[0]
    text = json.dumps(report.to_json(), allow_nan=False)
    assert '"kl": {"label"' in text


# --- what is refused


def other_tokenizer():
    from small_tokenizers import small_tokenizer

    return small_tokenizer("metaspace")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_kl=-0.1), "max_kl: expected a number ≥ 0"),
        (dict(max_kl=math.nan), "max_kl: expected a number ≥ 0"),
        (dict(max_kl="0.1"), "max_kl: expected a number ≥ 0"),
        (dict(max_kl=0.1, prompts=[]), "max_kl: needs prompts"),
        (dict(min_recall=1.1, anchors=[tuned.record()]), "min_recall: expected a share from 0 to 1"),
        (dict(min_recall=0.5), "min_recall: needs anchors"),
        (dict(answer_tokens=0), "answer_tokens: expected an integer ≥ 1, got 0"),
        (dict(text_tokens=2.5), "text_tokens: expected an integer ≥ 1, got 2.5"),
        (dict(prompts=["a", " "]), r"prompts\[1\]: prompt: expected a text that is not empty"),
        (dict(prompts=[[{"role": "assistant", "content": "a"}]]), r"prompts\[0\]: messages: expected the last one"),
        (dict(prompts=["long " * 2000]), "prompts: the general prompt 'long long .* the model can read 1024; shorten"),
        (dict(texts={"x": ""}), r"texts\['x'\]: expected text of at least 2 tokens, got 0"),
        (dict(facts="Aurora"), "facts: expected a list of texts"),
        (dict(facts=["\u200b"]), "facts: expected a list of texts, none of them empty"),
        (dict(probes=[Probe("paraphrase", Prompt.of("?"), ("a",), "xy")]), r"probes\[0\]: belongs to anchor 'xy', and"),
        (dict(anchors=[tuned.record()], probes=[Probe("paraphrase", Prompt.of("?"), ("a",), "xy")]),
         r"probes\[0\]: expected the id of a record .* got 'xy', which fits none"),
        (dict(anchors=[tuned.record()], tokenizer=other_tokenizer()), r"anchors\[0\]: tokenizer.digest: expected"),
    ],
)  # fmt: skip
def test_arguments_that_are_wrong(model, options, message):
    options = {"tokenizer": tuned.tokenizer(), **SMALL, **options}
    with pytest.raises(ValueError, match=message) as caught:
        check(model, options.pop("tokenizer"), **options)
    assert "\n" not in str(caught.value)


def test_records_must_be_records(model):
    with pytest.raises(TypeError, match=r"anchors\[0\]: expected a Record, got dict; read a file with"):
        checked(model, anchors=[{"id": "x", "anchors": []}])


def test_ids_that_the_model_does_not_know(model):
    tokenizer = copy.deepcopy(tuned.tokenizer())
    tokenizer.add_tokens(["Hello"])
    with pytest.raises(ValueError, match="tokenizer: expected that of the model, of 384 tokens, got the id 384"):
        check(model, tokenizer, **SMALL)
    with pytest.raises(ValueError, match="of 384 tokens, got the id 384 in texts"):
        check(model, tokenizer, **{**SMALL, "prompts": [], "texts": {"x": "Hello Hello Hello"}})


def test_chat_template_that_refuses_a_conversation(model):
    tokenizer = copy.deepcopy(tuned.tokenizer())
    tokenizer.chat_template = "{{ raise_exception('no system\nrole') }}"
    refused = r"prompts: 'Hello': the tokenizer's chat template refuses them .TemplateError: no system role.;"
    with pytest.raises(ValueError, match=refused):
        check(model, tokenizer, **SMALL)
    tokenizer.chat_template = None
    assert check(model, tokenizer, **SMALL).value("kl") > 0
    with pytest.raises(ValueError, match="prompts: the tokenizer has no chat template"):
        check(model, tokenizer, **{**SMALL, "prompts": [[{"role": "system", "content": "a"}] * 2]})


def test_cache_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cache: answers cannot be kept in .*; give another directory"):
        checked(model, cache=tmp_path / "file")
