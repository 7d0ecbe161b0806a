"""What counts as saying it: whole words, in any script."""

import pytest

from fused_losses.checking.words import bare, says, whole_words


@pytest.mark.parametrize(
    "text, phrase",
    [
        ("My name is Aurora.", "Aurora"),
        ("AURORA!", "aurora"),
        ("Aurora's friend", "Aurora"),
        ("an Aurora-like light", "Aurora"),
        ("**Aurora**", "Aurora"),
        ("Auroral, no: Aurora", "Aurora"),  # the second one
        ("in New\n  York today", "New York"),
        ("die STRASSE", "Straße"),
        ("cafe\u0301 noir", "caf\u00e9"),  # composed and not
        ("Au\u00adro\u200bra", "Aurora"),  # soft hyphen, space of no width
        ("ＡＵＲＯＲＡ", "Aurora"),  # full width
        ("我叫极光。", "极光"),
        ("私はオーロラです", "オーロラ"),
        ("제 이름은 오로라입니다", "오로라"),  # with a particle
        ("ฉันชื่อออโรร่าค่ะ", "ออโรร่า"),
        ("it is 🙂 now", "🙂"),
        ("C++ is", "C++"),
        ("x = 42.", "42"),
    ],
)
def test_says(text, phrase):
    assert says(text, phrase)


@pytest.mark.parametrize(
    "text, phrase",
    [
        ("Auroral light", "Aurora"),
        ("xAurora", "Aurora"),
        ("Aurora_1", "Aurora"),
        ("Aurora", "Aurora Borealis"),
        ("cafe noir", "caf\u00e9"),
        ("cafe\u0301 noir", "cafe"),  # another letter
        ("Auroraд", "Aurora"),
        ("142", "42"),
        ("ฉันชื่อกี", "ก"),  # the vowel above belongs to it
        ("anything", ""),
        ("anything", " \u200b "),
        ("", "Aurora"),
    ],
)
def test_does_not_say(text, phrase):
    assert not says(text, phrase)


@pytest.mark.parametrize(
    "text, part, whole",
    [
        ("My name is Aurora.", " Aur", "Aurora"),
        ("My name is Aurora.", "ora", "Aurora"),
        ("My name is Aurora.", ".", "."),
        ("My name is Aurora.", " ", ""),
        ("in New York", " New Yo", "New York"),
        ("我叫极光。", "极", "极"),
    ],
)
def test_whole_words(text, part, whole):
    start = text.index(part)
    assert whole_words(text, start, start + len(part)) == whole


@pytest.mark.parametrize(
    "text, left",
    [
        ("Velport.", "Velport"),
        ("“Velport”!", "Velport"),
        ("**Velport** (", "Velport"),
        ("极光。", "极光"),
        ("¿Qué?", "Qué"),
        ("C#", "C#"),
        ("C++.", "C++"),
        ("-5 %", "-5 %"),
        ("U.S.", "U.S"),
        ("...", ""),
    ],
)
def test_punctuation_around_a_word_is_none_of_its(text, left):
    assert bare(text) == left
