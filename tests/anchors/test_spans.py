"""Token ids → text, and the characters of each token: against the tokens' own bytes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import KINDS, SPECIAL, small_tokenizer
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from fused_losses.anchors import spell, tokenizer_digest
from fused_losses.anchors.spans import text_after, tokens_within

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PIECES = st.sampled_from(["Aurora", " name is", "中文", "😀", "👩‍👩‍👧", "é", "  ", "中\ufffd中", "a\ufffdb", *SPECIAL])
MIXED = st.lists(TEXT | PIECES, max_size=5).map("".join)


def ids_of(kind, text):
    return small_tokenizer(kind)(text, add_special_tokens=False)["input_ids"]


def characters_of_bytes():
    """The character that ByteLevel writes for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    found = {chr(byte): byte for byte in plain} | {chr(256 + k): byte for k, byte in enumerate(others)}
    assert set(found) == set(pre_tokenizers.ByteLevel.alphabet())
    return found


ALPHABET = characters_of_bytes()


def token_bytes(kind, ids):
    for token in small_tokenizer(kind).convert_ids_to_tokens(ids):
        if token in SPECIAL:
            yield token.encode()
        elif kind == "byte-level":
            yield bytes(ALPHABET[character] for character in token)
        elif token.startswith("<0x"):
            yield bytes([int(token[3:5], 16)])
        else:
            yield token.replace("▁", " ").encode()


def spans_of_bytes(parts):
    """Of whole text: a token has each character that one of its bytes is of."""
    begins = [at for at, byte in enumerate(b"".join(parts)) if byte & 0xC0 != 0x80]
    spans, done = [], 0
    for part in parts:
        start = sum(at <= done for at in begins) - 1 if part else sum(at < done for at in begins)
        done += len(part)
        spans.append((start, sum(at < done for at in begins)))
    return spans


@pytest.mark.parametrize("kind", KINDS)
@given(text=MIXED)
@settings(deadline=None, max_examples=30)
def test_spans_are_those_of_the_tokens_bytes(kind, text):
    if kind == "metaspace":
        text = text.replace("\ufffd", "")  # its decoder writes as much for a byte of any character
    ids = ids_of(kind, text)
    parts = list(token_bytes(kind, ids))
    if kind == "metaspace" and parts and parts[0].startswith(b" "):  # which its decoder takes off
        parts[0] = parts[0][1:]
    spelling = spell(small_tokenizer(kind), ids)
    assert spelling.text == b"".join(parts).decode()
    assert spelling.spans == spans_of_bytes(parts)


@pytest.mark.parametrize("kind", KINDS)
@given(ids=st.lists(st.integers(0, 380), max_size=12))
@settings(deadline=None, max_examples=30)
def test_any_ids_have_spans_that_rise_and_cover_the_text(kind, ids):
    text, spans = spell(small_tokenizer(kind), ids)
    assert len(spans) == len(ids) and all(start <= end for start, end in spans)
    assert sorted(spans) == spans and (spans[-1][1] if spans else 0) == len(text)
    assert {at for start, end in spans for at in range(start, end)} == set(range(len(text)))


def test_parts_of_a_character_share_its_span():
    for kind in KINDS:
        ids = ids_of(kind, "a😀b")
        spelling = spell(small_tokenizer(kind), ids)
        assert spelling.text == "a😀b" and spelling.spans.count((1, 2)) == 4
        assert [spelling.spans[at] for at in tokens_within(spelling.spans, 1, 2)] == [(1, 2)] * 4


def test_text_after_depends_on_what_stands_before():
    for kind in KINDS:
        tokenizer = small_tokenizer(kind)
        ids = ids_of(kind, "我叫中文" * 3 + "é")  # more than a context, whose first is in the middle of a character
        assert text_after(tokenizer, ids[:-1], ids[-1]) == "é"
        assert text_after(tokenizer, [], ids_of(kind, "name")[0]) == spell(tokenizer, ids_of(kind, "name")[:1]).text


def test_a_long_text_takes_few_decodings(monkeypatch):
    tokenizer = small_tokenizer("byte-level")
    ids, decoded = ids_of("byte-level", "My name is 😀 Aurora. " * 100), []
    decode = tokenizer.decode

    def counted(some, **options):
        decoded.append(len(some))
        return decode(some, **options)

    monkeypatch.setattr(tokenizer, "decode", counted)
    assert spell(tokenizer, ids).spans[-1][1] == len("My name is 😀 Aurora. ") * 100
    assert sum(decoded) < 10 * len(ids)


def test_a_decoder_that_needs_the_whole_text_is_given_it():
    class Capital:
        """The first letter of what is decoded is a capital, so no later window reads as the text does."""

        def get_vocab(self):
            return {"a": 0, "b": 1}

        def decode(self, ids, **_):
            return "".join("ab"[token] for token in ids).capitalize()

    assert spell(Capital(), [0, 1, 1, 0, 1]) == ("Abbab", [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)])


def test_digest_is_of_ids_and_what_they_stand_for(tmp_path):
    one, other = (small_tokenizer(kind) for kind in KINDS)
    assert tokenizer_digest(one) != tokenizer_digest(other) and len(tokenizer_digest(one)) == 64
    one.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.chat_template, loaded.pad_token = None, "My"
    loaded(["a", "bc"], padding=True)
    assert tokenizer_digest(loaded) == tokenizer_digest(one)
    loaded.add_tokens(["Zoë"])
    assert tokenizer_digest(loaded) != tokenizer_digest(one)


def test_what_is_no_tokenizer():
    with pytest.raises(TypeError, match=r"tokenizer: expected one of transformers, got str"):
        spell("SmolLM2", [1])
