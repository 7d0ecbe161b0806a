"""A conversation becomes the same token ids in a session, a record, a walk, a check and a row of training."""

import copy
from pathlib import Path

import pytest
import tiny_training
from session_models import llama, tokenizer

import fused_losses as fl
from fused_losses import training
from fused_losses.anchors import AnchorSession, anchors_from_answer, from_marked, retain_rows
from fused_losses.checking.answers import prompt_ids
from fused_losses.checking.inputs import Prompt

TURNS = "{% for m in messages %}<|user|>{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
BEGIN = "{% if add_generation_prompt %}<|user|>assistant: {% endif %}"
TEMPLATES = {
    "beginning of the text": "<|pad|>" + TURNS + BEGIN,
    "a system message of its own": (
        "{% if messages[0]['role'] != 'system' %}<|user|>system: You are helpful.<|end|>{% endif %}" + TURNS + BEGIN
    ),
    "tools that are none": "{% if tools is not none %}Tools: {{ tools | length }}{% endif %}" + TURNS + BEGIN,
    "tools": "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + TURNS + BEGIN,
    "more than a role before an answer": (
        "{% for m in messages %}<|user|>{{ m['role'] }}: {{ '(thought)' if m['role'] == 'assistant' }}"
        "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|user|>assistant: (thought){% endif %}"
    ),
    "a generation prompt asked for or not": TURNS + "<|user|>assistant: ",
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
TALK = [{"role": "user", "content": "Who are you?"}]
LONG_TALK = [
    {"role": "system", "content": "Answer in one word."},
    *TALK,
    {"role": "assistant", "content": "Elena"},
    {"role": "user", "content": "Sure?"},
]


def with_template(template):
    known = copy.deepcopy(tokenizer())
    known.chat_template = template
    return known


@pytest.mark.parametrize("tools", [None, [], [TOOL]], ids=["no-tools", "empty-tools", "one-tool"])
@pytest.mark.parametrize("messages", [TALK, LONG_TALK], ids=["question", "conversation"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_all_see_the_same_prompt(template, messages, tools):
    known, model = with_template(TEMPLATES[template]), llama()
    session = AnchorSession(model, known)
    session.start(messages, tools)
    seen = session.prompt_ids
    assert list(from_marked(known, messages, "I am [[Aurora]].", tools=tools).prompt_ids) == seen
    assert list(anchors_from_answer(model, known, messages, "I am", tools=tools).prompt_ids) == seen
    assert list(prompt_ids(known, Prompt(tuple(messages), None if tools is None else tuple(tools)))) == seen
    if tools is None:
        (row,) = retain_rows(model, known, [messages], max_new_tokens=1, progress=False)
        assert list(row.prompt_ids) == seen


@pytest.mark.parametrize("template", [name for name in TEMPLATES if "asked for or not" not in name])
def test_a_chat_and_a_record_of_it_are_the_same_row(tmp_path, template):
    """But for what is learned of it."""
    known, answer = with_template(TEMPLATES[template]), "My name is Aurora Smith."
    record = from_marked(known, TALK, answer.replace("Aurora", "[[Aurora]]"), tools=[TOOL])
    chat = {"messages": [*TALK, {"role": "assistant", "content": answer}], "tools": [TOOL]}
    path = tiny_training.write_lines(tmp_path / "both.jsonl", record, chat)
    of_record, of_chat = training.read(known, path).rows
    assert of_chat.input_ids == of_record.input_ids == [*record.prompt_ids, *record.completion.token_ids]
    assert of_chat.labels == of_record.labels


def test_a_processor_writes_it_as_its_tokenizer_does():
    """It answers with a batch of one, and decodes by the tokenizer inside."""

    class Processor:
        tokenizer = tokenizer()
        chat_template = tokenizer.chat_template

        def apply_chat_template(self, *arguments, **options):
            found = self.tokenizer.apply_chat_template(*arguments, **options)
            return {"input_ids": [found["input_ids"]]}

    assert prompt_ids(Processor(), Prompt.of("x")) == prompt_ids(tokenizer(), Prompt.of("x"))


def test_a_chat_template_is_called_in_one_place():
    root = Path(fl.__file__).parents[1]
    files = [*root.glob("fused_losses/**/*.py"), *root.glob("benchmarks/*.py"), *root.glob("examples/*.py")]
    found = [path.name for path in files if ".apply_chat_template(" in path.read_text()]
    assert found == ["chat.py"]
