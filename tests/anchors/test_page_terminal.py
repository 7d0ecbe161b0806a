"""The same in a terminal with plain input."""

import io

import pytest

pytest.importorskip("rich", reason="needs the extra cli")

from pages import AURORA, ELENA, NAME, QUESTIONS, desk_on, opened
from rich.console import Console
from session_models import tokenizer

from fused_losses.anchors.files import read_records
from fused_losses.anchors.page.terminal import Terminal


@pytest.fixture
def file(tmp_path):
    return tmp_path / "anchors.jsonl"


def typed(file, *lines, answers=(), colour=False, **options):
    """What the terminal writes when these lines are typed, and then the input ends."""
    desk = desk_on(file, *answers, **options)
    waiting, out = list(lines), io.StringIO()

    def read(prompt):
        out.write(prompt)
        if not waiting:
            raise EOFError
        out.write(waiting[0] + "\n")
        return waiting.pop(0)

    try:
        Terminal(desk, Console(file=out, width=300, highlight=False, force_terminal=colour), read).run()
    finally:
        desk.close()
    assert not waiting
    return out.getvalue()


def test_from_the_first_answer_to_the_record(file):
    said = typed(file, "3", "3 2", "u", "r", "a", "l")
    assert "1  ·Elena" in said and "3:Elena→Aurora" in said and f"✓   1  {QUESTIONS[0]}" in said
    (record,) = read_records(file, tokenizer())
    assert record.completion.text == AURORA + "<|end|>" and record.anchors[0].original_text == " Elena"


def test_words_of_ones_own_and_how_firmly(file):
    typed(file, "3 = Aurora Smith c=0.8", "a", '3 = " Aurora" p=0.9', "a")
    first, second = read_records(file, tokenizer())
    assert first.completion.text.startswith("My name is Aurora Smith") and first.anchors[0].confidence == 0.8
    assert second.anchors[0].target_probability == 0.9


def test_corrections_are_discarded_only_when_asked(file):
    said = typed(file, "3 2", "s", "n", "s", "y")
    assert "1 correction of this answer would be lost" in said and f"user: {QUESTIONS[1]}" in said
    assert said.count(f"user: {QUESTIONS[1]}") == 1


def test_prompts_of_ones_own(file):
    typed(file, "ask And you?", "a", "then Why?", "a", questions=())
    first, second = read_records(file, tokenizer())
    assert first.messages[0]["content"] == "And you?"
    assert [message["content"] for message in second.messages] == ["And you?", ELENA, "Why?"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("zzz", "No such command: zzz"),
        ("99", "position: expected 0"),
        ("3 11", "Expected a number from 1 to 10, got 11."),
        ("3 =", "replacement"),
        ("-1", "position: expected 0"),
        ("-1 = x", "position: expected 0"),
        ("3 -2", "Expected a number from 1 to 10, got -2."),
        ("3 2 c=2", "c: expected a number above 0 and up to 1, as in c=0.9, got c=2."),
        ("3 2 c=x", "c: expected a number above 0 and up to 1, as in c=0.9, got c=x."),
        ("3 = Aurora p=-1", "p: expected a number above 0 and below 1, as in p=0.9, got p=-1."),
        ("3 2 p=1", "p: expected a number above 0 and below 1"),
        ('3 = "', "Expected one text between two quotes, got \"; a quote itself is '\"'."),
        ('3 = "a" "b"', 'Expected one text between two quotes, got "a" "b"'),
        ('3 = " Aurora', "Expected one text between two quotes"),
        ("u", "nothing to undo"),
        ("x 3", "no anchor"),
        ("x 99", "Expected a token from 0 to "),
        ("x -1", "Expected a token from 0 to "),
        ("o 9", "Expected a prompt from 1 to 2, got 9; l lists them."),
        ("o 0", "Expected a prompt from 1 to 2, got 0; l lists them."),
        ("g", "The answer is finished."),
        ("\x1b[2J", "No such command: ␛[2J"),
    ],
)
def test_what_is_wrong_is_said(file, line, said):
    assert said in typed(file, line).partition(line)[2]
    assert not file.exists()


@pytest.mark.parametrize("text, put", [("'\"'", '"'), ("'s", "'s"), ("'", "'"), ('"  z"', "  z")])
def test_quotes_keep_what_they_enclose(file, text, put):
    typed(file, f"3 = {text}", "a")
    assert read_records(file, tokenizer())[0].completion.text == f"My name is{put}<|end|>"


def test_the_new_answer_is_printed_from_its_start(file):
    said = typed(file, "3 2")
    assert f"\n{AURORA}<|end|>\n" in said.partition("3 2")[2]


def test_help_explains_the_bar(file):
    assert "a | where no blank stands between two" in typed(file, "h")


def test_the_next_doubtful_token(file):
    said = typed(file, "n", "n")
    assert "token  3:Elena" in said and "No doubtful token after this one." in said


def test_what_steers_a_terminal_is_shown(file):
    said = typed(file, "n", "l", answers=("My \x1b[2J\x07 name\u202e.",), questions=("a\x1b]0;b", "[red]c[/red]"))
    assert "\x1b" not in said and "\x07" not in said and "\u202e" not in said
    assert "␛" in said and "‹U+202E›" in said and "[red]c[/red]" in said


def test_colours_are_those_of_the_probability(file):
    said = typed(file, "3 2", colour=True)
    assert "\x1b[1;30;43mAurora" in said and "\x1b[33mElena" in said  # replaced, and 52 % likely


def test_an_interrupt_while_waiting_for_a_line_ends_it(file):
    def read(prompt):
        raise KeyboardInterrupt

    with opened(file) as desk:
        Terminal(desk, Console(file=io.StringIO()), read).run()
        assert desk.state()["tokens"][NAME]["text"] == " Elena"
