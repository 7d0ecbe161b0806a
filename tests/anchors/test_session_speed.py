"""A session with a real model on two cores: how long one waits, and that its statistics are those of one forward."""

import time

import pytest
import torch

from fused_losses.anchors import AnchorSession, anchors_from_answer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_page_does_not_have_to_wait(smollm, show_table):
    tokenizer, model = smollm
    session = AnchorSession(model, tokenizer, max_new_tokens=60)
    session.start("Tell me a long story about a river and the people who live beside it.")
    times = {}

    def timed(name, call):
        start = time.process_time()
        found = call()
        times[name] = time.process_time() - start
        return found

    timed("first token", lambda: next(session.generate()))
    timed("the answer", lambda: list(session.generate()))
    count = len(session.tokens)
    timed("statistics of all tokens", lambda: session.tokens)
    timed("replace in the middle", lambda: session.replace(count // 2, " Aurora"))
    timed("first token after it", lambda: next(session.generate()))
    timed("undo", session.undo)
    answer = session.token_ids
    prompt = session.prompt_ids
    timed("a given answer", lambda: anchors_from_answer(model, tokenizer, [], answer, prompt_ids=prompt, end=False))
    show_table("\n".join(f"{name:28} {seconds:8.3f} s of CPU" for name, seconds in times.items()))
    # Of both cores together, as other work may run beside it: by the clock on two cores alone 1 s, and 2 s for the
    # statistics of 200 tokens.
    assert times["replace in the middle"] + times["first token after it"] < 2
    assert times["statistics of all tokens"] < 0.02 * count and count > 50


def test_statistics_are_those_of_one_forward(smollm):
    tokenizer, model = smollm
    session = AnchorSession(model, tokenizer, max_new_tokens=24)
    session.start("What is your name?")
    list(session.generate())
    session.replace(4, " Aurora")
    list(session.generate())
    ids = [*session.prompt_ids, *session.token_ids]
    with torch.no_grad():
        p = model(input_ids=torch.tensor([ids])).logits[0, len(session.prompt_ids) - 1 : -1].double().softmax(-1)
    for row, token in zip(p, session.tokens, strict=True):
        assert token.probability == pytest.approx(float(row[token.token_id]), rel=1e-3)
        assert token.entropy == pytest.approx(float(torch.special.entr(row).sum()), abs=1e-3)
    record = anchors_from_answer(model, tokenizer, [], session.token_ids, prompt_ids=session.prompt_ids, end=False)
    assert [a.position for a in record.anchors] == [a.position for a in session.anchors] == [4]
