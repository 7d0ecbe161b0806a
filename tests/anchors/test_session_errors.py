"""What an AnchorSession refuses: one line that says what was expected, and nothing changed."""

import copy
import math

import pytest
from session_models import Scripted, answered, ids_of, tokenizer

from fused_losses.anchors import AnchorSession

ELENA = "My name is Elena. I live in Paris."


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: s.replace(12, "x"), "position: expected 0 … 10 in an answer of 11 tokens, got 12"),
        (lambda s: s.replace(-1, "x"), "position: expected 0 … 10"),
        (lambda s: s.replace(11, "x"), "nothing follows an end of turn"),
        (lambda s: s.replace(True, "x"), "position: expected"),
        (lambda s: s.replace(3, ""), "replacement: is empty"),
        (lambda s: s.replace(3, []), "replacement: expected at least one token"),
        (lambda s: s.replace(3, 10**6), r"replacement\[0\]: expected a token id"),
        (lambda s: s.replace(3, -1), r"replacement\[0\]: expected a token id"),
        (lambda s: s.replace(3, True), r"replacement\[0\]: expected a token id"),
        (lambda s: s.replace(3, "<|end|> and"), "an end of turn can only be its last token"),
        (lambda s: s.replace(3, "x", confidence=0.0), r"confidence: expected a number in \(0, 1\]"),
        (lambda s: s.replace(3, "x", confidence=math.nan), "confidence: expected"),
        (lambda s: s.replace(3, "x", target_probability=1.0), r"target_probability: expected a number in \(0, 1\)"),
        (lambda s: s.replace(3, "x", confidence=1.0, target_probability=0.5), "got both"),
        (lambda s: s.likeliest(11), "position: expected 0 … 10"),
        (lambda s: s.likeliest(3, 0), "k: expected an integer ≥ 1"),
        (lambda s: s.suspicious(share=2), r"share: expected a number in \[0, 1\]"),
        (lambda s: s.suspicious(least=math.nan), "least: expected a number"),
        (lambda s: s.generate(0), "max_new_tokens: expected an integer ≥ 1"),
        (lambda s: s.start([]), "messages: expected a string or a list"),
        (lambda s: s.start([{"content": "x"}]), r"messages\[0\]: expected"),
        (lambda s: s.start([{"role": "assistant", "content": "x"}]), "nothing to answer"),
        (lambda s: s.start([{"role": "judge", "content": "x"}]), r"refuses them \(TemplateError: unknown role judge\)"),
        (lambda s: s.start("long " * 100), "leave no room in the context of 200"),
        (lambda s: s.start("x", prompt_ids=[]), "prompt_ids: expected at least one token"),
        (lambda s: s.start("x", prompt_ids=[10**6]), r"prompt_ids\[0\]: expected a token id"),
        (lambda s: s.kl_to_original(), "the session's model is the original"),
    ],
)
def test_an_error_says_what_was_expected_and_changes_nothing(call, message):
    session, _ = answered(ELENA)
    with pytest.raises(ValueError, match=message):
        call(session)
    assert session.text == ELENA + "<|end|>" and not session.undo()


def test_errors_of_kind():
    session, model = answered(ELENA)
    with pytest.raises(TypeError, match="record: expected a Record, got dict"):
        session.open({})
    with pytest.raises(TypeError, match="replacement: expected text or token ids, got float"):
        session.replace(3, 1.5)
    with pytest.raises(TypeError, match="tokenizer: expected one of transformers"):
        AnchorSession(model, None)
    with pytest.raises(TypeError, match="model: expected a causal language model"):
        AnchorSession(None, tokenizer())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=-1.0), "temperature: expected a finite number ≥ 0"),
        (dict(temperature=math.nan), "temperature: expected"),
        (dict(top_p=0.0), r"top_p: expected a number in \(0, 1\]"),
        (dict(seed=0.5), "seed: expected an integer"),
        (dict(agreement=0), "agreement: expected an integer ≥ 1"),
        (dict(reference="adapter"), "reference: expected None, 'base' or a model"),
        (dict(reference="base"), "the model has no PEFT adapter"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        AnchorSession(Scripted(ELENA), tokenizer(), **options)


def test_without_a_conversation_or_an_answer():
    session = AnchorSession(Scripted(ELENA), tokenizer())
    with pytest.raises(ValueError, match=r"call start\(messages\) first"):
        session.generate()
    session.start("x")
    with pytest.raises(ValueError, match="there is no answer yet"):
        session.record()
    assert session.tokens == [] and session.suspicious() is None


def test_a_tokenizer_without_a_template_takes_ids():
    plain = copy.deepcopy(tokenizer())
    plain.chat_template = None
    session = AnchorSession(Scripted(ELENA), plain)
    with pytest.raises(ValueError, match="has no chat template to write them with; take that of an instruct model"):
        session.start("x")
    session.start([], prompt_ids=ids_of("My name"))
    assert session.prompt_ids == ids_of("My name")
