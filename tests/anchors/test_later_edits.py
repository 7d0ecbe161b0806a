"""Which edits hold when the answer goes on differently: borders of the rule that AnchorSession states."""

from session_models import Scripted, tokenizer

from fused_losses.anchors import AnchorSession
from fused_losses.anchors.history import Edit, State, later_edits


def edited(answers, edits, agreement=4):
    """A session after these edits, (position, text) each, the later ones after generation has come there."""
    session = AnchorSession(Scripted(*answers), tokenizer(), agreement=agreement)
    session.start("Who are you?")
    list(session.generate())
    for position, text in edits:
        session.replace(position, text)
        list(session.generate())
    return session


def places(session):
    return [(edit.text, edit.position) for edit in session.later_edits]


def test_edits_keep_their_order():
    old = "I like tea. My name is Elena. I live in Paris."
    new = "The city. I live in Paris. My name is Elena."
    session = edited([old, old.replace("Elena", "Aurora"), new], [(8, " Aurora"), (13, " Rome")], agreement=2)
    assert session.text.startswith("I like tea. My name is Aurora. I live in Rome")
    session = edited(
        [old, old.replace("Elena", "Aurora"), new, new.replace("Paris", "Rome")],
        [(8, " Aurora"), (13, " Rome"), (0, "The")],
        agreement=2,
    )
    assert session.text == "The city. I live in Rome. My name is Elena.<|end|>"
    assert places(session) == [(" Aurora", None), (" Rome", 6)]


def test_an_edit_near_the_replacement_needs_the_same_distance():
    old, new = "My name is Elena. I like Paris.", "My name is Elena. live in Paris and I like Paris."
    session = edited([old, new], [(7, " Rome"), (5, " live in Paris and")])
    assert session.text == new + "<|end|>" and places(session) == [(" Rome", None)]


def test_what_follows_a_replacement_of_several_tokens_is_counted_from_its_end():
    smith, elena = "My name is Aurora Smith. I live in Paris.", "My name is Elena. I live in Paris."
    session = edited(["My name is Rome.", smith, elena], [(3, " Aurora Smith"), (7, " like"), (3, " Elena")])
    assert session.text.startswith("My name is Elena. I like") and places(session) == [(" like", 6)]


def test_an_edit_waits_through_another_replacement_while_its_place_has_not_come():
    old, new = "My name is Elena. I live in Paris.", "My name is Aurora, I live in Paris."
    session = edited([old, new], [(8, " Rome")], agreement=3)
    session.replace(3, " Aurora")
    session.replace(4, ",")
    list(session.generate())
    assert session.text.startswith("My name is Aurora, I live in Rome") and places(session) == [(" Rome", 8)]


def test_an_edit_that_was_dropped_when_the_turn_ended_does_not_come_back():
    old, without, new = (
        "My name is Elena. I live in Paris.", "My name is Aurora.", "My name is Aurora, I live in Paris."
    )  # fmt: skip
    session = edited([old, without, new], [(8, " Rome"), (3, " Aurora"), (4, ",")], agreement=3)
    assert session.text == new + "<|end|>" and places(session) == []


def test_of_an_edit_that_is_cut_only_its_first_tokens_stay_one():
    session = edited(["My name is Elena."], [(3, " the city of Rome"), (4, " river")])
    assert [token.replaced for token in session.tokens] == [False] * 3 + [True] * 2 + [False]
    session.undo()
    session.unmark(4)
    assert [anchor.position for anchor in session.anchors] == [3, 5, 6]
    assert [token.replaced for token in session.tokens[3:7]] == [True, False, True, True]


def test_tokens_inside_an_edit_are_no_places():
    ids = [5, 6, 7, 0, 5, 6, 7, 1, 5, 6, 9]
    inside, last = Edit(3, (0, 5, 6, 7), 2, 1.0, None, 1), Edit(10, (9,), 7, 1.0, None, 1)
    found = later_edits(State(ids, edits=[inside, last]), 0, 2)
    assert [(later.edit, later.ordinal) for later in found] == [(inside, 1), (last, 2)]
    assert later_edits(State(ids, edits=[last]), 0, 2)[0].ordinal == 3
