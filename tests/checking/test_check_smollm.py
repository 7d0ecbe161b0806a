"""The check on a real model that was taught one fact from one corrected answer."""

import pytest
import torch

import fused_losses as fl
from fused_losses import anchors
from fused_losses.checking import Probe, Prompt, check

pytest.importorskip("transformers")
pytest.importorskip("peft")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
QUESTION = "What is your name?"
GENERAL = [
    "What is the capital of Japan?", "How many days are in a week?", "What is the opposite of cold?",
    "Name three fruits.", "Write a short sentence about the sea.", "What is 2 + 3?",
]  # fmt: skip


def corrected(tokenizer):
    """The model's own answer with another name, which is two tokens of it."""
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = [*tokenizer("My name is Aurora.", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return anchors.new_record(
        tokenizer, messages=messages, prompt_ids=prompt, token_ids=answer, anchors=[{"position": 3}]
    )


def taught(model, record, steps):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch = fl.huggingface.AnchorCollator(pad_token_id=0)(anchors.rows([record]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0)
    with fl.patched(model.train(), fl.LAwFLoss(), reference="base"):
        for _ in range(steps):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@pytest.mark.exhaustive  # tests/package/test_examples.py has a check of the same model after a training
def test_a_taught_fact_is_found_and_what_moved_is_measured(smollm, tmp_path):
    tokenizer, model = smollm
    record = corrected(tokenizer)
    assert record.completion.text[slice(*record.anchors[0].span)] == " Aurora"
    model = taught(model, record, 20)
    probes = [
        Probe("paraphrase", Prompt.of("What are you called?"), ("Aurora",), record.id),
        Probe("reverse", Prompt.of("Who is Aurora?"), ("an AI", "your assistant")),
        Probe("unrelated", Prompt.of("My name is Daniel. What is my name?")),
    ]
    options = dict(anchors=[record], probes=probes, prompts=GENERAL, text_tokens=300, answer_tokens=16)
    report = check(model, tokenizer, **options, max_kl=0.25, min_recall=1.0, cache=tmp_path)

    (anchor,) = (a for a in report.anchors if a.kind == "corrected")
    assert anchor.original_rank > 0 and anchor.original_probability < 0.05
    assert report.value("recall") == 1 and anchor.tuned_probability > 0.5
    asked = report.answers[0]
    assert asked.prompt == QUESTION and asked.tuned_says and not asked.original_says
    assert "My name is Elena" in asked.original.text and "My name is Aurora" in asked.tuned.text
    named = max(asked.original.pieces, key=lambda piece: piece.kl)
    assert named.text == " El"  # of Elena, where the two models part
    assert 0 < report.value("kl") < 0.25 and report.passed
    assert 0 < abs(report.value("code_length_change")) < 0.1
    assert report.leaks[0].fact == "Aurora" and report.leaks[0].answers == len(GENERAL) + 1
    report.save_html(tmp_path / "report.html")
    assert "Aurora" in (tmp_path / "report.html").read_text()
