"""The desk: one answer, changed by one call after another; records, drafts, resuming."""

import threading

import pytest
import torch
from pages import AURORA, ELENA, NAME, QUESTIONS, Slow, desk_on, opened, settle
from session_models import Scripted, tokenizer

from fused_losses.anchors.files import RecordFile, read_records
from fused_losses.anchors.page.desk import Desk, Stale, Unsaved
from fused_losses.anchors.page.original import original_answers
from fused_losses.anchors.page.tasks import Task, user
from fused_losses.anchors.session import AnchorSession


@pytest.fixture
def file(tmp_path):
    return tmp_path / "anchors.jsonl"


def text(state):
    return "".join(token["text"] for token in state["tokens"])


def test_it_begins_with_the_first_prompt(file):
    with opened(file) as desk:
        state = desk.state()
        assert state["current"] == 0 and state["finished"] and text(state) == ELENA + "<|end|>"
        assert [message["text"] for message in state["messages"]] == [QUESTIONS[0]]


def test_a_replacement_goes_on_and_is_an_anchor(file):
    with opened(file) as desk:
        assert desk.replace(NAME, " Aurora", target_probability=0.9) == ""
        state = settle(desk)
        assert text(state) == AURORA + "<|end|>" and state["unsaved"]
        anchor = state["tokens"][NAME]["anchor"]
        assert (anchor["was"], anchor["target"], anchor["confidence"]) == (" Elena", 0.9, None)
        assert state["before"] == {"who": "model", "text": ELENA, "whole": True}


def test_what_is_no_anchor_is_said(file):
    with opened(file) as desk:
        assert "ranks it first" in desk.replace(NAME, " Elena")
        state = settle(desk)
        assert "ranks it first" in state["notes"][0] and not state["unsaved"]


def test_undo_redo_and_unmark(file):
    with opened(file) as desk:
        desk.replace(NAME, " Aurora")
        settle(desk)
        desk.undo()
        assert text(desk.state()) == ELENA + "<|end|>" and not desk.state()["unsaved"]
        with pytest.raises(ValueError, match="nothing to undo"):
            desk.undo()
        desk.redo()
        state = settle(desk)
        assert text(state) == AURORA + "<|end|>" and (state["can_undo"], state["can_redo"]) == (True, False)
        desk.unmark(NAME)
        assert "anchor" not in settle(desk)["tokens"][NAME]
        with pytest.raises(ValueError, match="no anchor"):
            desk.unmark(NAME)


def test_accept_writes_the_record_and_goes_on_with_the_next(file):
    with opened(file) as desk:
        desk.replace(NAME, " Aurora")
        settle(desk)
        record = desk.accept()
        assert read_records(file, tokenizer()) == [record] and record.anchors[0].text == " Aurora"
        state = settle(desk)
        assert (state["current"], state["done"], state["records"], state["unsaved"]) == (1, 1, 1, False)
        desk.accept()
        state = settle(desk)
        assert (state["current"], state["accepted"]) == (1, True)
        with pytest.raises(ValueError, match="its record already"):
            desk.accept()
    assert [len(record.anchors) for record in read_records(file)] == [1, 0]


def test_a_record_that_cannot_be_written_loses_nothing(file, monkeypatch):
    with opened(file) as desk:
        desk.replace(NAME, " Aurora")
        settle(desk)

        def full(record):
            raise OSError("disk full")

        with monkeypatch.context() as patched:
            patched.setattr(desk.file, "append", full)
            with pytest.raises(OSError, match="disk full"):
                desk.accept()
        state = desk.state()
        assert (
            state["unsaved"] and not state["accepted"] and text(state) == AURORA + "<|end|>" and state["records"] == 0
        )
        desk.accept()
    assert len(read_records(file)) == 1


def test_an_older_version_is_refused(file):
    with opened(file) as desk:
        old = desk.version
        desk.replace(NAME, " Aurora", version=old)
        settle(desk)
        with pytest.raises(Stale):
            desk.replace(NAME, " Paris", version=old)
        with pytest.raises(Stale):
            desk.likeliest(NAME, version=old)
        assert text(desk.state()) == AURORA + "<|end|>"


def test_corrections_are_not_lost_unasked(file):
    with opened(file) as desk:
        desk.replace(NAME, " Aurora")
        settle(desk)
        for call in (lambda **given: desk.open(1, **given), lambda **given: desk.ask("Hi", **given)):
            with pytest.raises(Unsaved, match="1 correction"):
                call()
        assert desk.draft.exists()
        desk.open(1, discard=True)
        assert settle(desk)["current"] == 1 and not desk.draft.exists()


def test_a_prompt_that_was_typed(file):
    with opened(file) as desk:
        desk.ask("  And you?\n")
        state = settle(desk)
        assert (state["current"], state["messages"][0]["text"], state["total"]) == (2, "And you?", 3)
        desk.ask("And you?")
        assert settle(desk)["total"] == 3
        for wrong in ("", " ", None, 7, "\ud800"):
            with pytest.raises(ValueError):
                desk.ask(wrong)


def test_the_next_turn_follows_the_corrected_answer(file):
    with opened(file) as desk:
        desk.replace(NAME, " Aurora")
        settle(desk)
        desk.ask("Why?", follow=True)
        state = settle(desk)
        assert [message["text"] for message in state["messages"]] == [QUESTIONS[0], AURORA, "Why?"]
        desk.accept()
    first, second = read_records(file, tokenizer())
    assert first.messages == second.messages[:1] and second.messages[1]["content"] == AURORA


def test_a_conversation_with_a_record_is_shown_as_the_record_has_it(file):
    with opened(file) as desk:
        desk.replace(NAME, " Aurora", confidence=0.7)
        settle(desk)
        desk.accept()
    with opened(file) as desk:
        assert desk.state()["current"] == 1
        desk.open(0)
        state = settle(desk)
        assert state["accepted"] and state["tokens"][NAME]["anchor"]["confidence"] == 0.7
        assert text(state) == AURORA + "<|end|>"
        desk.open(0, anew=True)
        assert text(settle(desk)) == ELENA + "<|end|>" and not desk.state()["accepted"]


def accepted_name(desk, name, **strength):
    desk.replace(NAME, name, **strength)
    settle(desk)
    record = desk.accept(onward=False)
    settle(desk)
    return record


@pytest.mark.parametrize("reopened", [False, True])
def test_an_answer_that_is_changed_and_accepted_again_takes_the_place_of_its_record(file, reopened):
    with opened(file) as desk:
        first = accepted_name(desk, " Aurora")
        other = (desk.open(1), settle(desk), desk.accept(onward=False))[-1]
        desk.open(0)
        settle(desk)
        if not reopened:
            changed = accepted_name(desk, " Aurora", confidence=0.5)
    if reopened:
        with opened(file) as desk:
            desk.open(0)
            settle(desk)
            changed = accepted_name(desk, " Aurora", confidence=0.5)
    assert read_records(file, tokenizer()) == [changed, other]
    assert changed.id == first.id and changed.anchors[0].confidence == 0.5


def test_a_change_of_a_record_that_was_interrupted_still_takes_its_place(file):
    with opened(file) as desk:
        accepted_name(desk, " Aurora")
        desk.replace(NAME, " Aurora", confidence=0.5)
        settle(desk)
    with opened(file) as desk:
        assert desk.state()["unsaved"]
        changed = desk.accept(onward=False)
    assert read_records(file) == [changed]


def test_another_answer_has_a_record_of_its_own_but_not_the_same_one_twice(file):
    with opened(file) as desk:
        first = accepted_name(desk, " Aurora")
        desk.open(0, anew=True)
        settle(desk)
        assert accepted_name(desk, " Aurora") == first
        assert "not written a second time" in desk.state()["notes"][0] and desk.state()["records_here"] == 1
        desk.open(0, anew=True)
        settle(desk)
        second = desk.accept(onward=False)
    assert read_records(file) == [first, second] and second.anchors == ()


def test_a_draft_is_kept_for_the_next_start(file):
    with opened(file) as desk:
        desk.replace(NAME, " Aurora")
        settle(desk)
    with opened(file) as desk:
        state = desk.state()
        assert text(state) == AURORA + "<|end|>" and state["unsaved"] and "was not accepted" in state["notes"][0]
        assert state["tokens"][NAME]["anchor"]["was"] == " Elena"
        desk.accept()
        assert not desk.draft.exists()
    with opened(file) as desk:
        assert desk.state()["current"] == 1


def test_a_draft_that_is_no_record_is_left_alone(file):
    file.with_name(file.name + ".draft").write_text("{")
    with opened(file) as desk:
        state = desk.state()
        assert state["current"] == 0 and "was left as it is" in state["notes"][0]


def test_a_generation_is_interrupted_and_goes_on(file):
    model = Slow(ELENA, seconds=0.02)
    desk = desk_on(file, model=model)
    came = threading.Semaphore(0)
    desk.listen(lambda kind, what: came.release() if kind == "token" else None)
    desk.begin()
    for _ in range(2):
        assert came.acquire(timeout=30)
    desk.stop()
    state = settle(desk)
    assert 2 <= len(state["tokens"]) < 15 and (state["generating"], state["ended"]) == (False, "stopped")
    desk.go_on()
    assert text(settle(desk)) == ELENA + "<|end|>"
    with pytest.raises(ValueError, match="finished"):
        desk.go_on()
    desk.close()


def test_a_correction_while_it_writes_takes_effect_at_once(file):
    desk = desk_on(file, model=Slow(ELENA, AURORA, seconds=0.02))
    came = threading.Semaphore(0)
    desk.listen(lambda kind, what: came.release() if kind == "token" else None)
    desk.begin()
    for _ in range(NAME + 1):
        assert came.acquire(timeout=30)
    assert desk.likeliest(NAME)[0]["text"] == " Elena"
    desk.replace(NAME, " Aurora")
    assert text(settle(desk)) == AURORA + "<|end|>"
    desk.close()


def test_what_is_refused_lets_it_go_on_writing(file):
    desk = desk_on(file, model=Slow(ELENA, seconds=0.02))
    came = threading.Semaphore(0)
    desk.listen(lambda kind, what: came.release() if kind == "token" else None)
    desk.begin()
    assert came.acquire(timeout=30)
    version = desk.version
    with pytest.raises(ValueError, match="still writing"):
        desk.accept()
    with pytest.raises(ValueError, match="position"):
        desk.replace(99, " Aurora")
    with pytest.raises(ValueError, match="index"):
        desk.open(99)
    assert desk.version == version
    assert text(settle(desk)) == ELENA + "<|end|>"
    desk.close()


def test_events_add_up_to_the_state(file):
    """Whoever puts them together as the page does has what the desk has."""
    desk = desk_on(file)
    seen = {}

    def hear(kind, what):
        if kind == "state":
            seen.clear()
            seen.update(what)
        elif kind == "token":
            assert what["version"] == seen["version"] and what["token"]["position"] == len(seen["tokens"])
            seen["tokens"].append(what["token"])

    desk.listen(hear)
    desk.begin()
    assert settle(desk) == seen
    desk.replace(NAME, " Aurora")
    assert settle(desk) == seen and text(seen) == AURORA + "<|end|>"
    desk.close()


def test_calls_from_many_threads_come_one_after_another(file):
    with opened(file) as desk:
        outcomes = []

        def correct(version):
            try:
                desk.replace(NAME, " Aurora", version=version)
                outcomes.append("done")
            except Stale:
                outcomes.append("stale")

        threads = [threading.Thread(target=correct, args=(desk.version,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(outcomes) == ["done"] + ["stale"] * 7
        assert text(settle(desk)) == AURORA + "<|end|>"


def test_a_model_that_fails_says_so(file):
    class Broken(Slow):
        def logits(self, seen):
            return super().logits(seen) if len(seen) < 20 else torch.full((self.size,), float("nan"))

    desk = desk_on(file, model=Broken(ELENA))
    desk.begin()
    state = settle(desk)
    assert not state["generating"] and "The model failed" in state["notes"][0]
    assert desk.likeliest(0)[0]["text"] == "My"
    desk.close()


def test_a_later_correction_without_a_place_is_named(file):
    with opened(file, ELENA, "My name is Aurora.") as desk:
        desk.replace(8, " Rome")
        settle(desk)
        desk.replace(NAME, " Aurora")
        state = settle(desk)
        assert state["notes"] == ["1 later correction found no place in the new continuation: “Rome”."]


def test_parts_of_a_character_are_numbered(file):
    with opened(file, "My name is 😀.") as desk:
        parts = [token["part"] for token in desk.state()["tokens"] if "part" in token]
        assert parts == [[k, len(parts)] for k in range(1, len(parts) + 1)] and len(parts) >= 3


def test_a_second_desk_on_the_file_is_refused(file):
    with opened(file), pytest.raises(ValueError, match="another page or process has it open"):
        RecordFile(file)


def test_nothing_to_answer(file):
    with opened(file, questions=()) as desk:
        assert desk.state()["current"] is None
        for call in (desk.undo, desk.accept, desk.go_on, lambda: desk.likeliest(0), lambda: desk.suspicious(-1)):
            with pytest.raises(ValueError, match="no answer yet"):
                call()
        with pytest.raises(ValueError, match="index"):
            desk.open(0)


def test_the_original_beside_a_trained_model(file):
    """The KL of each token, and the original's own answer; a stand-in has both."""
    trained, original = Scripted(AURORA), Scripted(ELENA)
    session = AnchorSession(trained, tokenizer(), reference=original)
    desk = Desk(session, RecordFile(file), [Task(user("Who?"))], original=original_answers(session))
    desk.begin()
    state = settle(desk)
    assert state["before"] == {"who": "original", "text": ELENA, "whole": True}
    kl = [token["kl"] for token in state["tokens"]]
    assert kl[NAME] > 1 and max(kl[:NAME]) < 1e-6
    desk.close()


def test_what_the_trained_model_alone_says_is_named_and_can_be_kept(file):
    """The original agrees again after another first word."""
    trained, original = Scripted(ELENA, AURORA), Scripted(AURORA)
    session = AnchorSession(trained, tokenizer(), reference=original)
    desk = Desk(session, RecordFile(file), [Task(user("Who?"))], original=original_answers(session))
    desk.begin()
    (note,) = settle(desk)["notes"]
    assert note.startswith(f"“Elena” (token {NAME}), ") and "Without a mark, training holds them" in note
    assert not desk.unsaved
    desk.keep()
    state = settle(desk)
    assert state["tokens"][NAME]["anchor"]["was"] == " Aurora" and state["unsaved"]
    with pytest.raises(ValueError, match="nothing to mark"):
        desk.keep()
    desk.replace(NAME, " Aurora")  # which the original says
    assert settle(desk)["notes"] == ["0 of 1 tokens are anchors; ' Aurora' is no anchor: the original ranks it first "
                                     "there (p = 0.98)"]  # fmt: skip
    desk.close()
