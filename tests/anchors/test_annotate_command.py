"""`fused-losses annotate` as a process: on a folder's model, served and in the terminal, with an adapter."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs the extra annotate")
import peft
import torch
from session_models import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from fused_losses.anchors.files import read_records

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with random weights, its tokenizer, and an adapter that changes it."""
    path = tmp_path_factory.mktemp("model")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ends = dict(eos_token_id=tokenizer().eos_token_id, pad_token_id=tokenizer().pad_token_id, bos_token_id=None)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer()), initializer_range=0.3, **sizes, **ends)
    model = LlamaForCausalLM(config)
    model.save_pretrained(path / "model")
    tokenizer().save_pretrained(path / "model")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(path / "adapter")
    (path / "prompts.txt").write_text("What is your name?\nWhere do you live?\n")
    return path


def command(folder, output, *options):
    base = [sys.executable, "-m", "fused_losses", "annotate", "--model", "model", "--prompts", "prompts.txt"]
    inherited = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [*base, "--output", str(output), "--max-new-tokens", "8", *options],
        cwd=folder, env=os.environ | {"PYTHONPATH": inherited, "PYTHONUNBUFFERED": "1"}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


class Client:
    def __init__(self, process):
        self.seen = ""
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/\?token=(\S+)", self.seen)):
            line = process.stdout.readline()
            assert line, self.seen
            self.seen += line
        self.port, secret = int(found[1]), found[2]
        self.headers = {"Cookie": f"fused-losses-{self.port}={secret}", "Content-Type": "application/json"}

    def ask(self, method, path, **body):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, json.dumps(body) if method == "POST" else None, self.headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def settled(self):
        while True:
            status, state = self.ask("GET", "/api/state")
            assert status == 200
            if not state["generating"] and (not state["adapter"] or (state["before"] or {}).get("whole")):
                return state


@pytest.mark.slow
def test_served_accepted_killed_and_resumed_on_a_trained_adapter(folder, tmp_path):
    output = tmp_path / "round2.jsonl"
    options = ("--adapter", "adapter", "--no-browser")
    process = command(folder, output, *options)
    try:
        client = Client(process)
        state = client.settled()
        assert state["model"] == "model + adapter" and state["before"]["who"] == "original" and state["total"] == 2
        assert all(token["kl"] >= 0 for token in state["tokens"]) and max(token["kl"] for token in state["tokens"]) > 0
        _, found = client.ask("GET", "/api/likeliest?position=0")
        other = next(choice for choice in found["candidates"][3:] if "special" not in choice)
        assert client.ask("POST", "/api/replace", position=0, token_id=other["id"])[0] == 200
        client.settled()
        assert client.ask("POST", "/api/accept")[0] == 200
        second = command(folder, output, *options)
        refused, _ = second.communicate(timeout=300)
        assert second.returncode == 2 and "another page or process has it open" in refused
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    (record,) = read_records(output, tokenizer())
    assert record.anchors[0].round == 2
    process = command(folder, output, *options)
    try:
        state = Client(process).settled()
        assert (state["done"], state["current"]) == (1, 1)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and "Traceback" not in said
    finally:
        process.kill()


@pytest.mark.slow
def test_in_the_terminal(folder, tmp_path):
    output = tmp_path / "anchors.jsonl"
    process = command(folder, output, "--terminal")
    said, _ = process.communicate("0\n0 6\na\nq\n", timeout=300)
    assert process.returncode == 0 and "Traceback" not in said and "Written to" in said
    (record,) = read_records(output, tokenizer())
    assert len(record.anchors) == 1 and record.model is not None
