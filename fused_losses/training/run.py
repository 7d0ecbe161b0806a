"""`train`: from files and a model to a folder with an adapter, a report and curves; resumed where it was killed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

import fused_losses as fl

from ..huggingface import AnchorCollator
from .data import Paths, read, read_text
from .folder import Folder
from .loop import Loop
from .model import add_lora, has_adapter, merged, save_model, without_gguf_mark, without_lookup
from .objective import objective_of
from .plan import Plan
from .settings import MAX_LENGTH, RANK, REPLAY_SHARE, STOP_KL, STOP_PROBABILITY, method_of

CACHED_BYTES = 1 << 30  # most of the original's hidden states that are kept on the disk


def train(
    model: nn.Module | Callable[[], nn.Module],
    tokenizer: Any,
    data: Paths,
    output: str | os.PathLike,
    *,
    method: str = "lawf",
    lora: int | None = RANK,
    targets: list[str] | None = None,
    retain: Paths = (),
    replay: Paths = (),
    replay_share: float = REPLAY_SHARE,
    heldout: str | os.PathLike | None = None,
    learning_rate: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    max_length: int = MAX_LENGTH,
    options: Mapping[str, float] | None = None,
    stop: bool = True,
    stop_probability: float = STOP_PROBABILITY,
    stop_kl: float = STOP_KL,
    seed: int = 0,
    save_every: int | None = None,
    merge: bool = False,
    progress: bool = True,
    name: str | None = None,
) -> dict[str, Any]:
    """Fine-tune a model on corrected answers, on chats, or on both; returns what is in report.json.

        from transformers import AutoModelForCausalLM, AutoTokenizer
        import fused_losses.training

        tokenizer = AutoTokenizer.from_pretrained(name)
        load = lambda: AutoModelForCausalLM.from_pretrained(name)
        report = fused_losses.training.train(load, tokenizer, "anchors.jsonl", "out", method="lawf")

    Files are read and checked first, then the folder, and only then the model is loaded. A training that was killed
    goes on from its last finished checkpoint when it is called again with the same settings; one that is done is
    returned at once. What each method needs of the data is checked: see `read` for the files and METHODS for the
    methods.

    Of records with anchors lawf learns the anchors and holds all other tokens, prompts too, to the original; the other
    methods learn the corrected answer. Of chats all methods learn the answers; lawf holds the prompts. The original is
    the model without adapter, also where training goes on from one; without LoRA the model as it is at the start.

    Args:
        model: a causal language model of transformers, also a PEFT model whose adapter is trained further; or a
            function that loads it. LoRA is put into a model that is given.
        tokenizer: that of the model, with a chat template where there are chats.
        data, retain, replay: files; `read` says of what. Rows to retain are held by methods with a reference, and by
            the others only measured; rows to replay are learned, `replay_share` of each step's rows.
        output: folder, new or empty, or of this training: adapter/ (or model/), merged/, report.json, curves.png.
        method: one of METHODS.
        lora: rank; None trains all weights.
        targets: names of the layers that get LoRA; q_proj and v_proj by default.
        heldout: file of text whose nll is measured: chats as .jsonl, or plain text.
        learning_rate: the method's by default; it falls linearly to 0.
        steps: most of them; by default 3 passes over the rows, and with anchors, which stop it, at least 40.
        batch_size: rows of a forward; 8 by default, or all rows where there are fewer. accumulate: forwards of a step.
        max_length: most tokens of a row; a longer one is an error.
        options: of the objective: kl_weight, anchor_weight, retain_weight, alpha, threshold.
        stop: whether to stop early, where each anchor has `stop_probability` of what it is to get, and, for methods
            that hold the other tokens, their mean KL is at most `stop_kl`.
        seed: of LoRA's start and of the order of rows.
        save_every: steps between two checkpoints; by default a quarter of all.
        merge: whether to save a merged model as well.
        progress: whether to show a bar with the time left.
        name: of the model, for the report; its name_or_path by default.

    Raises:
        ValueError, TypeError: naming the file and line, or the argument, and the remedy.
        OSError: a file cannot be read, or the folder written.

    Cost: that of the loss in each step; besides, forwards without gradients: some 20 of at most 8,192 corrected and as
    many retained tokens, six of at most 8,192 tokens of held-out text. Where all weights are trained, a frozen copy of
    the model is kept for methods with a reference, and where rows are measured. The optimizer takes 8 bytes a trained
    weight.
    """
    method_of(method)
    plan = Plan(
        method=method, options=dict(options or {}), lora=lora, targets=targets, replay_share=replay_share,
        learning_rate=learning_rate, steps=steps, batch_size=batch_size, accumulate=accumulate, max_length=max_length,
        stop=stop, stop_probability=stop_probability, stop_kl=stop_kl, seed=seed, save_every=save_every,
        progress=progress, name=name,
    )  # fmt: skip
    plan.take(
        read(tokenizer, data, retain, replay, max_length), [] if heldout is None else read_text(tokenizer, heldout)
    )
    if merge and lora is None:
        raise ValueError("merge: all weights are trained, so there is no adapter to merge; leave merge out")
    with Folder(output, plan.settings) as folder:
        done, trained = folder.report, None
        if done is None:
            done, trained = _run(plan, model, tokenizer, folder)
        if merge and not (folder.path / "merged").exists():
            if trained is None:
                trained = model if isinstance(model, nn.Module) else model()
                trained = merged(without_gguf_mark(trained), folder.path / "adapter")
            else:
                trained = trained.merge_and_unload()
            _save(trained, tokenizer, folder, "merged")
        return done


def _run(plan: Plan, load: Any, tokenizer: Any, folder: Folder) -> tuple[dict[str, Any], Any]:
    """The report, and the trained model."""
    from transformers import set_seed

    begun = time.perf_counter()
    model = without_gguf_mark(load if isinstance(load, nn.Module) else load())
    set_seed(plan.seed)
    full = plan.lora is None
    if full and has_adapter(model):
        raise ValueError("lora: None trains all weights, but the model has an adapter; give a rank, or the model alone")
    if full:
        model.requires_grad_(True)
    elif not has_adapter(model):
        model = add_lora(model, plan.lora, plan.targets)
    if not full:
        without_lookup(model)
    plain, collate = (AnchorCollator(_pad(tokenizer), needs_anchors=anchored) for anchored in (False, True))
    initial = _initial(plan, model, plain, folder)
    reference = "start" if full else "base"
    own = {"reference": reference, "reference_cache": _cache(plan, model, folder)} if plan.kind.needs_reference else {}
    fl.patch(model, objective_of(plan.data, plan.kind, plan.options, initial), **own)
    try:
        found = Loop(plan, model, tokenizer, collate, plain, "own" if own else reference, folder, begun).run()
    finally:
        fl.unpatch(model)
    _save(model, tokenizer, folder, "model" if full else "adapter")
    found["finished"] = True
    folder.write_json("report.json", found)
    folder.finish()
    return found, model


def _initial(plan: Plan, model: Any, collate: AnchorCollator, folder: Folder) -> Any:
    """The losses before training, where the method weighs by them, which then are in the rows."""
    if plan.kind.initial is None:
        return None
    rows = [*plan.passed, *plan.replayed]
    found = fl.initial_losses(
        model, rows, folder.path / "initial.pt", per=plan.kind.initial, data_collator=collate, progress=plan.progress
    )
    column = {"sequence": "initial_nll", "token": "initial_token_nll"}[plan.kind.initial]
    rows = [{**row, column: known[column]} for row, known in zip(rows, found.added_to(rows), strict=True)]
    plan.passed, plan.replayed = rows[: len(plan.passed)], rows[len(plan.passed) :]
    return found


def _save(model: Any, tokenizer: Any, folder: Folder, name: str) -> None:
    def write(path: Path) -> None:
        save_model(model, path)
        tokenizer.save_pretrained(path)

    folder.write(name, write)


def _pad(tokenizer: Any) -> int:
    """Any valid id will do: what is padded is masked and has no label."""
    ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((i for i in ids if i is not None), 0)


def _cache(plan: Plan, model: Any, folder: Folder) -> str | None:
    """Where rows come more than once, and the original's hidden states of all of them are not large."""
    rows = [*plan.passed, *plan.replayed]
    width = getattr(model.config.get_text_config(), "hidden_size", 0)
    size = sum(len(row["input_ids"]) for row in rows) * width * 4
    return str(folder.path / "reference-cache") if len(plan.order) > len(rows) and size <= CACHED_BYTES else None
