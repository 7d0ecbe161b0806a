"""The command on SmolLM2-135M-Instruct: its own answer corrected, learned, saved and merged."""

import json
import time

import pytest
import torch

from fused_losses import anchors, cli
from fused_losses.cli import models
from fused_losses.demo import facts

# Exhaustive, as tests/package/test_examples.py has a training, a check and a merge of the same model.
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short training by LAwF, and the model's answer before and after."""
    torch.use_deterministic_algorithms(False)
    folder = tmp_path_factory.mktemp("smollm")
    model, tokenizer = load("--demo")
    _, record = facts.corrected(model, tokenizer, facts.FACTS[0])
    anchors.write_records(folder / "anchors.jsonl", [record])
    begun = time.process_time()
    cli.main([
        "train", "--demo", "--data", str(folder / "anchors.jsonl"), "--output", str(folder / "out"), "--steps", "30",
        "--merge", "--quiet",
    ])  # fmt: skip
    return folder, record, time.process_time() - begun


def load(*words):
    from argparse import ArgumentParser

    parser = ArgumentParser()
    models.add_options(parser)
    return models.load(parser.parse_args([str(word) for word in words]))


def test_the_anchor_is_learned_and_little_else_moves(trained):
    report = json.loads((trained[0] / "out" / "report.json").read_text())
    # A first step within 60 s on two cores, even if all of the training were before it; other work may run beside it.
    assert report["finished"] and report["seconds_to_first_step"] > 0 and trained[2] < 120
    assert report["before"]["anchor_probability"] < 0.05 and report["after"]["anchor_probability"] > 0.5
    assert report["after"]["kl_retained"] < 0.2


def test_adapter_and_merged_model_say_the_same(trained):
    folder, record, _ = trained
    ids = torch.tensor([[*record.prompt_ids, *record.completion.token_ids]])
    adapted, _ = load("--demo", "--adapter", folder / "out")
    merged, tokenizer = load("--model", folder / "out" / "merged")
    with torch.no_grad():
        found = [model(ids).logits for model in (adapted, merged)]
    assert (found[0] - found[1]).abs().max() < 2e-3
    position = len(record.prompt_ids) + record.anchors[0].position
    assert tokenizer.decode([found[1][0, position - 1].argmax().item()]) == " Aurora"
