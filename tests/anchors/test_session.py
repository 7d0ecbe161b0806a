"""AnchorSession with a model that follows a script: corrections, history, later edits, text."""

import threading

import pytest
import torch
from session_models import Scripted, answered, ids_of, tokenizer

from fused_losses.anchors import AnchorSession, read_records, rows, write_records
from fused_losses.huggingface import AnchorCollator

ELENA, AURORA = "My name is Elena. I live in Paris.", "My name is Aurora. I live in Paris."
NAME = 3  # where the name stands in both


def words(session):
    return [token.text for token in session.tokens]


def test_an_answer_is_streamed_to_its_end_of_turn():
    session = AnchorSession(Scripted(ELENA), tokenizer())
    session.start("Who are you?")
    streamed = list(session.generate())
    assert "".join(token.text for token in streamed) == session.text == ELENA + "<|end|>"
    assert streamed == session.tokens
    assert session.finished and session.ended == "end of turn" and list(session.generate()) == []


def test_a_long_answer_is_streamed_with_the_spans_of_the_whole():
    session = AnchorSession(Scripted(" and ".join([ELENA] * 4)), tokenizer())
    session.start("Who are you?")
    assert list(session.generate()) == session.tokens and len(session.tokens) > 40


def test_a_conversation_of_several_turns():
    session, _ = answered(ELENA)
    session.start([*session.conversation, {"role": "user", "content": "Thanks"}])
    assert tokenizer().decode(session.prompt_ids) == (
        f"<|user|>Who are you?<|end|><|assistant|>{ELENA}<|end|><|user|>Thanks<|end|><|assistant|>"
    )


def test_statistics_of_a_token():
    session, model = answered(ELENA, second=" Aurora")
    p = model.logits([*session.prompt_ids, *session.token_ids[:NAME]]).double().softmax(0)
    token = session.tokens[NAME]
    assert token.probability == pytest.approx(float(p.max()), rel=3e-7) and token.rank == 1
    assert token.entropy == pytest.approx(float(-(p * p.log()).sum()), rel=6e-7)
    assert token.margin == pytest.approx(float(p.max() - p[ids_of(" Aurora")[0]]), rel=3e-7)
    assert [choice.text for choice in session.likeliest(NAME, 2)] == [" Elena", " Aurora"]


def test_a_replacement_is_an_anchor_and_the_answer_goes_on_from_it():
    session, model = answered(ELENA, AURORA, second=" Aurora")
    p = model.logits([*session.prompt_ids, *session.token_ids[:NAME]]).double().softmax(0)
    done = session.replace(NAME, " Aurora", confidence=0.9)
    assert words(session) == ["My", " name", " is", " Aurora"] and not session.finished
    list(session.generate())
    assert session.text == AURORA + "<|end|>"
    (anchor,) = session.anchors
    assert (anchor.position, anchor.text, anchor.original_text) == (NAME, " Aurora", " Elena")
    assert session.text[slice(*anchor.span)] == " Aurora" and anchor.confidence == 0.9
    assert anchor.probability == pytest.approx(float(p[ids_of(" Aurora")[0]]), rel=3e-7)
    assert anchor.original_probability == pytest.approx(float(p.max()), rel=3e-7)
    assert [choice.text for choice in anchor.alternatives[:2]] == [" Elena", " Aurora"]
    assert done.anchors == session.anchors and done.changed and done.text == " Aurora"


def test_a_replacement_costs_its_own_tokens_and_the_one_before():
    session, model = answered(ELENA, AURORA)
    model.fed.clear()
    session.replace(NAME, " Aurora")
    next(session.generate())
    assert model.fed == [1, 1]  # the last token that stays, then the replacement


def test_a_token_that_the_model_ranks_first_is_no_anchor():
    session, _ = answered(ELENA)
    done = session.replace(NAME, " Elena")
    assert not done.changed and done.anchors == () and session.anchors == ()
    assert "ranks it first" in done.message and session.finished and not session.undo()


def test_a_replacement_of_several_tokens_has_an_anchor_for_each_that_is_not_said_anyway():
    session, _ = answered(ELENA, "My name is Aurora Smith.")
    done = session.replace(NAME, " Aurora Smith and")
    assert done.text == " Aurora Smith and"
    assert [anchor.text for anchor in done.anchors] == [" Aurora", " and"]
    assert [anchor.original_text for anchor in done.anchors] == [" Elena", "."]
    assert "' Smith' is no anchor" in done.message


def test_a_target_probability_that_is_reached_makes_no_anchor():
    session, _ = answered(ELENA, AURORA, second=" Aurora", unsure=(" is",))
    p = next(choice.probability for choice in session.likeliest(NAME) if choice.text == " Aurora")
    assert session.replace(NAME, " Aurora", target_probability=p + 0.01).anchors[0].target_probability == p + 0.01
    session.undo()
    done = session.replace(NAME, " Aurora", target_probability=p - 0.01)
    assert done.anchors == () and done.changed and "p* is" in done.message


def test_the_strength_of_an_anchor_can_be_set_anew():
    session, _ = answered(ELENA, AURORA)
    session.replace(NAME, " Aurora")
    list(session.generate())
    done = session.replace(NAME, " Aurora", target_probability=0.8)
    (anchor,) = session.anchors
    assert done.changed and (anchor.confidence, anchor.target_probability) == (None, 0.8)
    assert anchor.original_text == " Elena" and session.text == AURORA + "<|end|>"
    session.undo()
    assert session.anchors[0].confidence == 1.0


def test_unmark_takes_the_anchor_off_and_leaves_the_token():
    session, _ = answered(ELENA, AURORA)
    session.replace(NAME, " Aurora")
    assert session.unmark(NAME) and session.anchors == () and session.text.endswith(" Aurora")
    assert not session.unmark(NAME)
    session.undo()
    assert len(session.anchors) == 1


def test_unmark_takes_the_anchors_off_a_whole_character():
    session, _ = answered(ELENA)
    session.replace(NAME, " 🎉!")
    whole = [anchor.position for anchor in session.anchors]
    assert len(whole) == 6  # a blank, four bytes of one character, and another
    assert session.unmark(whole[2]) and [anchor.position for anchor in session.anchors] == [whole[0], whole[5]]
    assert not session.unmark(whole[4]) and not session.unmark(99) and not session.unmark(-1)


def test_undo_and_redo_bring_back_the_whole_answer_without_a_forward():
    session, model = answered(ELENA, AURORA, "My name is Aurora. I live in Rome.")
    session.replace(NAME, " Aurora")
    list(session.generate())
    session.replace(8, " Rome")
    list(session.generate())
    states = [session.tokens]
    model.fed.clear()
    while session.undo():
        states.append(session.tokens)
    assert ["".join(t.text for t in tokens) for tokens in states] == [
        "My name is Aurora. I live in Rome.<|end|>", AURORA + "<|end|>", ELENA + "<|end|>"
    ]  # fmt: skip
    assert [len([t for t in tokens if t.anchor]) for tokens in states] == [2, 1, 0]
    for tokens in states[1::-1]:
        assert session.redo() and session.tokens == tokens
    assert not session.redo() and model.fed == []


def test_a_replacement_after_undo_begins_another_history():
    session, _ = answered(ELENA, AURORA)
    session.replace(NAME, " Aurora")
    session.undo()
    session.replace(NAME, " London")
    assert not session.redo() and session.undo() and session.text == ELENA + "<|end|>"


def test_generation_goes_on_after_undo():
    session, _ = answered(ELENA, AURORA, max_new_tokens=5)
    session.replace(NAME, " Aurora")
    list(session.generate())
    session.undo()
    assert session.text == "My name is Elena."
    list(session.generate())
    assert session.text == ELENA and session.ended == "max_new_tokens"


# Later edits. The city, at 8, is corrected first, then what stands before it.

CITY = 8
ROME = "My name is Elena. I live in Rome."


def edited_later(*more, agreement=4):
    session, _ = answered(ELENA, ROME, *more, agreement=agreement)
    session.replace(CITY, " Rome")
    list(session.generate())
    return session


def places(session):
    return [(edit.old_position, edit.text, edit.position) for edit in session.later_edits]


@pytest.mark.parametrize(
    "replacement, continuation, place",
    [
        (" Aurora", "My name is Aurora. I live in Paris and I like tea.", CITY),
        (" Aurora Smith", "My name is Aurora Smith. I live in Paris.", CITY + 1),
        (" Aurora Smith and", "My name is Aurora Smith and. I live in Paris.", CITY + 2),
    ],
)
def test_a_later_edit_is_kept_where_the_new_continuation_agrees(replacement, continuation, place):
    session = edited_later(continuation)
    session.replace(NAME, replacement)
    assert places(session) == [(CITY, " Rome", None)]
    streamed = [token.text for token in session.generate()]
    assert places(session) == [(CITY, " Rome", place)] and " Rome" in streamed
    assert session.tokens[place].text == " Rome" and "Paris" not in session.text
    assert [anchor.position for anchor in session.anchors if anchor.text == " Rome"] == [place]


def test_a_later_edit_moves_back_by_one():
    session = edited_later("My name is. I live in Paris.")
    session.replace(NAME, ".")
    list(session.generate())
    assert session.text.startswith("My name is. I live in Rome") and places(session) == [(CITY, " Rome", CITY - 1)]


@pytest.mark.parametrize(
    "continuation",
    [
        "My name is Aurora. I like tea.",  # no such place
        "My name is Aurora. I live in London.",  # the model says something else there
        "My name is Aurora. The river of Paris.",  # the same token in another context
    ],
)
def test_a_later_edit_is_dropped_where_it_does_not_agree(continuation):
    session = edited_later(continuation)
    session.replace(NAME, " Aurora")
    list(session.generate())
    assert session.text == continuation + "<|end|>" and places(session) == [(CITY, " Rome", None)]
    assert [anchor.text for anchor in session.anchors] == [" Aurora"]
    session.undo()
    assert [anchor.text for anchor in session.anchors] == [" Rome"]


def test_a_later_edit_that_the_model_makes_by_itself_is_kept_and_no_anchor():
    session = edited_later("My name is Aurora. I live in Rome.")
    session.replace(NAME, " Aurora")
    list(session.generate())
    assert places(session) == [(CITY, " Rome", CITY)] and [a.text for a in session.anchors] == [" Aurora"]


def test_an_edit_right_after_the_replacement_needs_the_same_tokens_between():
    near, far = "My name is Aurora. I like Paris.", "My name is Aurora. I live in Paris."
    session, _ = answered("My name is Elena. I like Paris.", "My name is Elena. I like Rome.", near)
    session.replace(7, " Rome")
    list(session.generate())
    session.replace(5, " live in Paris and I like")  # two tokens lay between 5 and 7
    list(session.generate())
    assert places(session) == [(7, " Rome", None)]
    session.undo()
    session.replace(NAME, " Aurora")
    list(session.generate())
    assert session.text == "My name is Aurora. I like Rome<|end|>" and far not in session.text


def test_of_equal_places_the_same_one_is_edited():
    before, after = "I like tea. I like tea and I like tea.", "I like coffee. I like tea and I like tea and I like tea."
    session, _ = answered(before, "I like tea. I like tea and I like coffee.", after, agreement=2)
    last = len(ids_of("I like tea. I like tea and I like"))
    session.replace(last, " coffee")
    session.replace(2, " coffee")
    list(session.generate())
    assert session.text == "I like coffee. I like tea and I like coffee<|end|>"


def test_a_later_edit_of_several_tokens_is_kept_whole():
    session, _ = answered(ELENA, "My name is Aurora. I live in Paris.")
    session.replace(CITY, " the city of Rome")
    session.replace(NAME, " Aurora")
    list(session.generate())
    assert session.text.startswith("My name is Aurora. I live in the city of Rome")
    assert places(session) == [(CITY, " the city of Rome", CITY)]


def test_an_edit_waits_when_generation_was_stopped_before_its_place():
    session = edited_later("My name is Aurora. I live in Paris.")
    session.replace(NAME, " Aurora")
    next(session.generate())
    session.replace(4, ".")  # what stands there anyway
    list(session.generate())
    assert places(session) == [(CITY, " Rome", CITY)]


# Streaming.


def test_stop_ends_before_the_next_token_and_generation_goes_on_later():
    session = AnchorSession(Scripted(ELENA), tokenizer())
    session.start("Who are you?")
    for token in session.generate():
        if token.position == 2:
            thread = threading.Thread(target=session.stop)
            thread.start()
            thread.join()
    assert session.text == "My name is" and session.ended == "stopped"
    list(session.generate())
    assert session.text == ELENA + "<|end|>"


def test_a_replacement_ends_the_generation_under_way():
    session = AnchorSession(Scripted(ELENA, AURORA), tokenizer())
    session.start("Who are you?")
    running = session.generate()
    for _ in range(6):
        next(running)
    session.replace(NAME, " Aurora")
    assert list(running) == [] and session.text == "My name is Aurora"


def test_what_changes_nothing_leaves_the_generation_under_way():
    session = AnchorSession(Scripted(ELENA), tokenizer())
    session.start("Who are you?")
    running = session.generate()
    next(running)
    session.replace(0, "My")
    list(running)
    assert session.text == ELENA + "<|end|>"


def test_generation_ends_where_the_context_is_full():
    model = Scripted(ELENA)
    session = AnchorSession(model, tokenizer())
    session.start("Who are you?")
    session._answerer.most = len(session.prompt_ids) + 3
    list(session.generate())
    assert session.text == "My name is" and session.ended == "context"
    with pytest.raises(ValueError, match="do not fit"):
        session.replace(3, " Aurora")


# Text.


@pytest.mark.parametrize(
    "position, text, exact, expected",
    [
        (NAME, "Aurora", False, "My name is Aurora"),
        (NAME, "Aurora", True, "My name isAurora"),
        (NAME, ", Aurora", False, "My name is, Aurora"),
        (0, "The", False, "The"),
        (0, " The", False, " The"),
        (NAME, " 😀", False, "My name is 😀"),
        (NAME, "极光", False, "My name is 极光"),
        (NAME, "e\u0301", True, "My name ise\u0301"),
        (NAME, "\n\n", False, "My name is\n\n"),
        (9, " and tea", False, "My name is Elena. I live in Paris and tea"),
        (NAME, "<|end|>", False, "My name is<|end|>"),
    ],
)
def test_text_becomes_tokens_of_its_own_after_tokens_that_stay(position, text, exact, expected):
    session, _ = answered(ELENA)
    before = session.token_ids[:position]
    session.replace(position, text, exact=exact)
    assert session.text == expected and session.token_ids[:position] == before


def test_text_within_a_word_and_within_a_character():
    session, _ = answered(ELENA)
    session.replace(NAME, " Xy😀")
    ids = session.token_ids
    assert len(ids) == NAME + 7
    session.replace(NAME + 2, "z")  # " X" stays, which the tokenizer joins with nothing
    assert session.text == "My name is Xz"
    session.undo()
    session.replace(NAME + 4, "z")  # after the first byte of the emoji
    assert session.token_ids == [*ids[: NAME + 4], *ids_of("z")] and session.tokens[-1].text == "z"


def test_within_a_replacement_the_original_is_what_the_model_would_have_said():
    session, _ = answered(ELENA, "My name is Aurora Smith.")
    session.replace(NAME, " Aurora and")
    (anchor,) = session.replace(NAME + 1, " tea").anchors
    assert anchor.original_text == " Smith" and [a.text for a in session.anchors] == [" Aurora", " tea"]
    session.replace(NAME, " London")
    assert [(a.text, a.original_text) for a in session.anchors] == [(" London", " Elena")]


def test_characters_of_several_tokens_are_streamed():
    session = AnchorSession(Scripted("Tea 😀 极 tea"), tokenizer())
    session.start("x")
    streamed = list(session.generate())
    assert [token.span[0] for token in streamed] == [token.span[0] for token in session.tokens]
    assert session.text == "Tea 😀 极 tea<|end|>" and streamed[-2] == session.tokens[-2]
    assert {"😀", "极"} <= {token.text for token in session.tokens}


def test_a_word_is_not_joined_with_what_stands_before():
    session, _ = answered(ELENA)
    session.replace(NAME, ids_of(" Par"))
    before = session.token_ids
    session.replace(len(before), "is", exact=True)
    assert session.token_ids[: len(before)] == before and session.text == "My name is Paris"
    assert session.token_ids != ids_of("My name is Paris")


def test_an_end_of_turn_ends_the_answer():
    session, _ = answered(ELENA)
    session.replace(NAME + 1, tokenizer().eos_token_id)
    assert session.finished and list(session.generate()) == [] and session.text == "My name is Elena<|end|>"
    assert session.anchors[0].text == "<|end|>"


def test_an_answer_can_begin_with_a_replacement():
    session = AnchorSession(Scripted(ELENA, "The name of the city is Rome."), tokenizer())
    session.start("Where?")
    done = session.replace(0, "The")
    assert done.anchors[0].original_text == "My"
    list(session.generate())
    assert session.text == "The name of the city is Rome.<|end|>"


# Records.


def test_a_record_goes_through_a_file_to_the_collator(tmp_path):
    session, _ = answered(ELENA, AURORA)
    session.replace(NAME, "Aurora", confidence=0.75)
    list(session.generate())
    record = session.record()
    write_records(tmp_path / "anchors.jsonl", [record])
    assert read_records(tmp_path / "anchors.jsonl", tokenizer()) == [record]
    batch = AnchorCollator(0)(rows([record], tokenizer()))
    at = len(session.prompt_ids) + NAME
    assert batch["input_ids"][0].tolist() == session.prompt_ids + session.token_ids
    assert batch["confidence"][0].nonzero().tolist() == [[at]] and batch["confidence"][0, at] == 0.75


def test_records_have_ids_of_their_own_and_one_digest():
    session, model = answered(ELENA)
    one, other = session.record(), session.record()
    assert one.id != other.id and one.model == other.model
    with torch.no_grad():
        model.head.weight.add_(1)
    assert session.record().model.digest != one.model.digest


def test_a_record_is_opened_and_corrected_further():
    first, _ = answered(ELENA, AURORA)
    first.replace(NAME, " Aurora", target_probability=0.9)
    list(first.generate())
    session = AnchorSession(Scripted(ELENA, AURORA), tokenizer(), round=2)
    session.open(first.record())
    assert session.anchors == first.anchors and session.finished
    assert [vars(a) for a in session.tokens] == [vars(b) for b in first.tokens]
    session.replace(CITY, " Rome")
    assert [(anchor.text, anchor.round) for anchor in session.anchors] == [(" Aurora", 1), (" Rome", 2)]


def test_anchors_of_an_earlier_round_are_kept_in_a_new_answer():
    first, _ = answered(ELENA, AURORA)
    first.replace(NAME, " Aurora")
    list(first.generate())
    session = AnchorSession(Scripted(ELENA, AURORA), tokenizer(), round=2)
    session.start("Who are you?", earlier=first.record())
    list(session.generate())
    assert session.text == AURORA + "<|end|>" and session.anchors == first.anchors


def test_suspicious_visits_each_unsure_position_once():
    session, _ = answered(ELENA, AURORA, second=" Aurora", unsure=(" is", " in"))
    found, at = [], -1
    while (at := session.suspicious(at)) is not None:
        found.append(at)
    assert found == [NAME, CITY]
    session.replace(NAME, " Aurora")
    list(session.generate())
    assert session.suspicious() == CITY and session.suspicious(CITY) is None
    assert session.suspicious(least=10) is None and session.suspicious(share=0) is None


def test_suspicious_are_the_least_sure_of_the_answer():
    session, _ = answered(ELENA, second=" Aurora", unsure=(" is", " in", " live"))
    doubts = {t.position: t.entropy * (1 - t.margin) for t in session.tokens}
    assert session.suspicious(share=1 / 11, least=0) == max(doubts, key=doubts.get)
    found, at = [], -1
    while (at := session.suspicious(at, share=1, least=0)) is not None:
        found.append(at)
    assert found == list(range(11))
