"""The models, tokenizers and data sets that TRL's tests take from a model hub, made on this machine.

TRL has scripts that make them, in its repository. They run here, with three things in the hub's place: tokenizers
(small byte-level ones with the same special tokens, and TRL's own chat templates), the folder that they write to, and
the configurations that they begin with. The folder has the layout of Hugging Face's cache, so that `from_pretrained`
finds everything by its name. Vision-language models are left out: their processors come from the hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import re
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

DATA = ("zen", "toolcall", "harmony")
ORGANISATION = "trl-internal-testing"
CHATML = dict(eos="<|im_end|>", pad="<|endoftext|>", others=["<|im_start|>", "<think>", "</think>"])
CHATML["others"] += ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "<|python_tag|>", "<|eom_id|>"]
TURNS = ["<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"]
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %} [INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
# Part of a model's name -> the special tokens of its tokenizer, and the template: TRL's of that name, or itself.
TOKENIZERS: list[tuple[str, dict[str, Any]]] = [
    ("Qwen2.5", dict(CHATML, template="qwen2_5")),
    ("Instruct-2507", dict(CHATML, template="qwen3_instruct_2507")),
    ("Qwen3", dict(CHATML, template="qwen3")),
    ("Llama-3.2", dict(bos="<|begin_of_text|>", eos="<|eot_id|>", others=HEADERS, template="llama3_2")),
    ("Llama-3.1", dict(bos="<|begin_of_text|>", eos="<|eot_id|>", others=HEADERS, template="llama3_1")),
    ("Llama-3", dict(bos="<|begin_of_text|>", eos="<|eot_id|>", others=HEADERS, template="llama3")),
    (
        "gemma",
        dict(bos="<bos>", eos="<eos>", pad="<pad>", others=["<start_of_turn>", "<end_of_turn>"], template="gemma"),
    ),
    ("Mistral", dict(bos="<s>", eos="</s>", others=["[INST]", "[/INST]"], template=MISTRAL)),
    (
        "gpt-oss",
        dict(
            bos="<|startoftext|>", eos="<|return|>", pad="<|endoftext|>", template="gptoss",
            others=["<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|call|>", "<|constrain|>"],
        ),
    ),
    (
        "tiny-aya",
        dict(bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", pad="<PAD>", others=TURNS, template="cohere2"),
    ),
    ("aya", dict(bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", pad="<PAD>", others=TURNS, template="cohere")),
    (
        "GLM",
        dict(
            eos="<|endoftext|>", pad="<|endoftext|>", template="glm4moe",
            others=["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<think>"],
        ),
    ),
    (
        "DeepSeek",
        dict(
            bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>", pad="<｜end▁of▁sentence｜>",
            others=["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"], template="deepseekv3",
        ),
    ),
    ("Phi-3", dict(bos="<s>", eos="<|endoftext|>", others=["<|user|>", "<|assistant|>", "<|end|>"], template="phi3")),
    ("Nemotron", dict(CHATML, template="nemotron_3_nano")),
    ("LFM2", dict(CHATML, bos="<|startoftext|>", template="lfm2")),
    ("Olmo-3", dict(CHATML, template="qwen3")),
    ("SmolLM3", dict(CHATML, template="qwen3")),
    ("", dict(eos="<|endoftext|>", pad="<|padding|>", others=[])),
]  # fmt: skip
SIZE = "vocab_size=len(tokenizer)"
SEQ2SEQ = [("conditional_generation", "t5_*.py")]
ONLY_TOKENIZERS = ("Qwen/Qwen2.5-0.5B-Instruct", "HuggingFaceTB/SmolLM3-3B")


def repository(home: Path, name: str) -> Path:
    """Of a model, in the layout of the hub's cache; nothing is in it yet."""
    commit = hashlib.sha1(name.encode()).hexdigest()
    folder = home / "hub" / ("models--" + name.replace("/", "--"))
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    return snapshot


def template(name: str) -> str:
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def tokenizer(name: str, texts: list[str]) -> Any:
    """With the special tokens of the model of that name, and merges learnt from `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    about = next(options for part, options in TOKENIZERS if part in name)
    bos, special = about.get("bos"), [about[key] for key in ("pad", "bos", "eos") if key in about]
    special = list(dict.fromkeys([*special, *about["others"]]))
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    learn = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, learn)
    if bos is not None:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, made.token_to_id(bos))]
        )
    named = {f"{key}_token": about[key] for key in ("bos", "eos", "pad") if key in about}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        **named,
        model_max_length=32768,
        extra_special_tokens=[t for t in about["others"] if "think" not in t and "tool" not in t],
    )
    written = about.get("template")
    if written is not None:
        fast.chat_template = written if "{" in written else template(written)
    return fast


# --- data sets


def make_data(home: Path, scripts: Path) -> None:
    """By TRL's scripts, which would send what they have made to the hub."""
    from datasets import DatasetDict

    def write(self: Any, repo_id: str, config_name: str = "default", **_: Any) -> None:
        folder = home / "data" / repo_id.replace("/", "--")
        (folder / config_name).mkdir(parents=True, exist_ok=True)
        for split, rows in self.items():
            rows.to_parquet(folder / config_name / f"{split}.parquet")

    DatasetDict.push_to_hub = write
    for name in DATA:
        module = importlib.import_module(f"{scripts.name}.generate_{name}_dataset")
        module.main(test_size=0.1, push_to_hub=True, repo_id=f"{ORGANISATION}/{name}")


def texts_of(home: Path) -> list[str]:
    """All strings of the data sets."""
    import pyarrow.parquet

    found: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, (list, dict)):
            for inner in value.values() if isinstance(value, dict) else value:
                walk(inner)

    for path in sorted((home / "data").rglob("*.parquet")):
        walk(pyarrow.parquet.read_table(path).to_pylist())
    return found


# --- models


@contextlib.contextmanager
def in_the_hub_s_place(home: Path, texts: list[str]) -> Any:
    """What TRL's scripts load from the hub is made; what they send to it is kept."""
    import transformers

    common = importlib.import_module("scripts.generate_tiny_models._common")

    def push(model: Any, tokens: Any, generation: Any, prefix: Any = None, suffix: Any = None, **_: Any) -> None:
        name = "-".join(part for part in (prefix, type(model).__name__, suffix) if part)
        folder = repository(home, f"{ORGANISATION}/{name}")
        if tokens is not None:
            for config in (model.config.get_text_config(), generation):
                for key in ("bos", "eos", "pad"):
                    setattr(config, f"{key}_token_id", getattr(tokens, f"{key}_token_id"))
            tokens.save_pretrained(folder)
        model.save_pretrained(folder)
        if generation is not None:
            generation.save_pretrained(folder)

    def config(name: str, **options: Any) -> Any:
        if "t5" in name:
            sizes = dict(d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
            return transformers.T5Config(vocab_size=len(tokenizer(name, texts)), **sizes, **options)
        kinds = {"Qwen2": "Qwen2Config", "Qwen3": "Qwen3Config", "Llama": "LlamaConfig", "pythia": "GPTNeoXConfig"}
        kind = next(kind for part, kind in kinds.items() if part in name)
        kind = "Qwen3MoeConfig" if "A3B" in name else kind
        return getattr(transformers, kind)(vocab_size=len(tokenizer(name, texts)), **options)

    common.push_to_hub = push
    common.check_transformers_version = common.check_dtype_pattern = lambda *_, **__: None
    common.print_config_diff = lambda *_, **__: None
    replaced = {
        "AutoTokenizer": lambda name, **_: tokenizer(name, texts),
        "GenerationConfig": lambda name, **_: transformers.GenerationConfig(),
        "AutoConfig": config,
    }
    own = {name: vars(getattr(transformers, name))["from_pretrained"] for name in replaced}
    for name, function in replaced.items():
        getattr(transformers, name).from_pretrained = staticmethod(function)
    try:
        yield
    finally:
        for name, method in own.items():
            getattr(transformers, name).from_pretrained = method


def fit(script: Path) -> None:
    """A model of the tokenizer's size, where the script names the size and special tokens of the original."""
    code = re.sub(r"^ *(bos|eos|pad)_token_id=.*,\n", "", script.read_text(), flags=re.MULTILINE)
    special = "".join(f", {key}_token_id=tokenizer.{key}_token_id" for key in ("bos", "eos", "pad"))
    script.write_text(re.sub(r"(?<=[( ])vocab_size=(\d+|len\(tokenizer.vocab\))(?=,)", SIZE + special, code))


def make_models(home: Path, scripts: Path, texts: list[str]) -> list[str]:
    """By TRL's scripts, which are changed; those that cannot be made, with the reason."""
    import torch

    missing = []
    with in_the_hub_s_place(home, texts):
        for kind, files in (("causal_lm", "[!_]*.py"), ("sequence_classification", "[!_]*.py"), *SEQ2SEQ):
            for path in sorted((scripts / "generate_tiny_models" / f"for_{kind}").glob(files)):
                if path.stem.startswith("peft_"):
                    continue
                fit(path)
                torch.manual_seed(0)
                try:
                    importlib.import_module(f"scripts.generate_tiny_models.for_{kind}.{path.stem}")
                except Exception as error:
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    missing.append(f"{path.stem}: {type(error).__name__}: {error} ({where.name})"[:200])
    for name in ONLY_TOKENIZERS:
        tokenizer(name, texts).save_pretrained(repository(home, name))
    return missing


def main() -> None:
    """home trl: all that TRL's tests take from the hub, into `home`. `trl` is a copy of its sources; scripts change."""
    home, trl = (Path(word).resolve() for word in sys.argv[1:])
    sys.path.insert(0, str(trl))
    scripts = trl / "scripts"
    unfinished = home.with_name(home.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    make_data(unfinished, scripts)
    missing = make_models(unfinished, scripts, texts_of(unfinished))
    (unfinished / "missing.json").write_text(json.dumps(missing))
    os.replace(unfinished, home)


if __name__ == "__main__":
    main()
