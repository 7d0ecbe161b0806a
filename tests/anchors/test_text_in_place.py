"""A text's tokens after tokens that stay, where the tokenizer puts a space before every text, as sentencepiece does."""

import functools

import pytest
from session_models import CORPUS, ids_of
from session_models import tokenizer as byte_level
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from fused_losses.anchors.prompts import ids_after
from fused_losses.anchors.spans import text_of


@functools.cache
def spaced():
    raw = Tokenizer(BPE(unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = dict(special_tokens=["<unk>"], initial_alphabet=["\n"])
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, **special)
    raw.train_from_iterator([*CORPUS, *["I\n\nlike"] * 40], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def ids(text):
    return spaced().encode(text, add_special_tokens=False)


@pytest.mark.parametrize("before, text", [
    ("My name is", " Aurora"), ("My name is", "Aurora"), ("My", "name"), ("My name", "s"), ("I like", "\ntea"),
    ("I like tea", " and tea."), ("I live in", " in"),
    ("I like tea", "\n"),  # alone with a space before it, and after a line break one token with that
])  # fmt: skip
def test_a_space_stands_where_the_text_has_one(before, text):
    found = ids_after(spaced(), ids(before), text)
    assert text_of(spaced(), [*ids(before), *found]) == before + text


def test_within_a_word_that_the_tokenizer_would_join():
    part = [spaced().convert_tokens_to_ids("▁"), spaced().convert_tokens_to_ids("P")]
    before = [*ids("I live in"), *part]
    found = ids_after(spaced(), before, "aris")
    assert text_of(spaced(), [*before, *found]) == "I live in Paris" and ids("Paris") != [*part, *found]


def test_the_tokens_are_those_of_the_whole_text_where_these_begin_as_what_stays():
    whole = ids("My name is Aurora Smith. I like tea.")
    for cut in range(1, len(whole)):
        text = text_of(spaced(), whole)[len(text_of(spaced(), whole[:cut])) :]
        assert ids_after(spaced(), whole[:cut], text) == whole[cut:]


def test_a_mark_is_joined_with_what_follows_it_only_as_the_tokenizer_does():
    before = ids_of("I like tea. ")
    assert ids_after(byte_level(), before, " tea") == ids_of("I like tea.  tea")[len(before) :]
    assert text_of(byte_level(), [*before, *ids_after(byte_level(), before, "tea")]) == "I like tea. tea"


def test_what_the_tokenizer_cannot_write_is_refused():
    with pytest.raises(ValueError, match="text: '極' cannot be written as tokens after 'My name'"):
        ids_after(spaced(), ids("My name"), "極")
