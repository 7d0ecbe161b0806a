"""One run: training, then what was learned and what was forgotten. Killed at any time, it goes on from where it was."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_losses as fl
from fused_losses.tokens import Observer
from fused_losses.training.loop import pass_order
from fused_losses.training.model import add_lora

from . import measure, store
from .grid import START, Run, Size
from .methods import METHODS, Method, finch_factor
from .prepare import Load, Start, description, start_of
from .results import size_entry
from .rows import IGNORED, batch

LORA_RANK = 8
SMOOTHING = 0.9  # of FINCH's mean loss


def results_file(output: Path, run: Run) -> Path:
    return output / "runs" / f"{run.name}.json"


def settings_of(run: Run, size: Size) -> dict[str, Any]:
    return {"run": run.to_json(), "size": size_entry(size)}


def run_one(
    run: Run, size: Size, output: Path, load: Load, progress: Callable[[float], Any] = lambda share: None
) -> dict:
    """The result, from its file where it is done."""
    file = results_file(output, run)
    settings = settings_of(run, size)
    if file.is_file():
        known = json.loads(file.read_text())
        if known["settings"] != settings:
            raise ValueError(f"--output: {file} was made with other settings; give another folder, or remove it")
        return known
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=4).hexdigest()
    scratch = output / "scratch" / f"{run.name}-{digest}"
    model, tokenizer = load()
    start = start_of(model, tokenizer, run, size, output / "shared" / measure.precision())
    tuned_model, log = model, {}
    if run.method != START:
        training = Training(run, size, model, start, scratch)
        tuned_model, log = training.model, training.go(progress)
    parts = evaluated(tuned_model, tokenizer, run, size, start, scratch / "tuned")
    wise = {}
    if run.wise:
        tuned = {name: value.clone() for name, value in model.state_dict().items()}
        initial, _ = load()
        for alpha in run.wise:
            model.load_state_dict(fl.wise_ft(initial, tuned, alpha))
            wise[f"{alpha:g}"] = evaluated(model, tokenizer, run, size, start, scratch / f"wise-{alpha:g}")
    found = {
        "settings": settings,
        "device": {"torch": torch.__version__, "fused_losses": fl.__version__, "products": measure.precision()},
        "before": description(start), "training": log, "after": parts, "wise": wise,
    }  # fmt: skip
    store.write_json(file, found)
    shutil.rmtree(scratch, ignore_errors=True)
    return found


def evaluated(model: nn.Module, tokenizer: Any, run: Run, size: Size, start: Start, folder: Path) -> dict[str, Any]:
    """Each part in a file as soon as it is known."""
    model.eval()
    begun = time.perf_counter()
    texts = {
        name: store.once(
            folder / f"{name}.json",
            functools.partial(measure.of_text, model, rows, start.hidden[name], start.head),
        )
        for name, rows in start.texts.items()
    }
    tasks: dict[str, Callable[[], Any]] = {
        "arithmetic": lambda: measure.of_arithmetic(model, tokenizer),
        "instructions": lambda: measure.of_instructions(model, tokenizer, size.count),
    }
    if run.domain in ("label", "facts"):  # no model of this size comes to the right end of a reasoning
        length = max(row.answer_tokens for row in start.texts["test"]) + 8
        some = start.texts["test"][: max(2, size.tested * 3 // 4)]
        tasks["domain"] = lambda: measure.of_domain(model, tokenizer, some, run.domain, length)
    right = {name: store.once(folder / f"task-{name}.json", task) for name, task in tasks.items()}
    return {"texts": texts, "tasks": right, "seconds": round(time.perf_counter() - begun, 1)}


class Training:
    """The steps of a run, with a checkpoint every few seconds."""

    def __init__(self, run: Run, size: Size, model: nn.Module, start: Start, scratch: Path) -> None:
        self.run, self.size, self.start, self.scratch = run, size, start, scratch
        self.method: Method = METHODS[run.method]
        self.steps = max(1, round(size.steps * run.stretch))
        torch.manual_seed(run.seed)
        model.requires_grad_(not self.method.lora)
        self.model = add_lora(model, LORA_RANK, None) if self.method.lora else model
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.initial = {name: p.detach().clone() for name, p in self.trained.items()} if self.method.l2 else {}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=run.rate, weight_decay=0.0, fused=True)
        self.rows = [*start.train, *(start.replayed if self.method.replay else [])]
        self.hidden = [*start.train_hidden, *(start.replayed_hidden if self.method.replay else [])]
        self.nll = start.nll(self.rows, self.hidden)
        means = torch.stack([nll.mean() for nll in self.nll[: len(start.train)]])
        self.objective = self.method.make(float(means.median()))
        total = self.steps * size.batch
        replayed = len(start.replayed) if self.method.replay else 0
        self.order = pass_order(len(start.train), replayed, self.method.replay, total, run.seed)
        self.log: dict[str, Any] = {"loss": [], "nll": [], "tokens": 0, "weight_hard": [], "weight_easy": [],
                                    "nll_hard": [], "nll_easy": [], "factor": [], "seconds": 0.0}  # fmt: skip
        self.step, self.average = 0, None

    @property
    def checkpoint(self) -> Path:
        return self.scratch / "checkpoint.pt"

    def go(self, progress: Callable[[float], Any]) -> dict[str, Any]:
        self.restore()
        last = time.monotonic()
        while self.step < self.steps:
            self.one_step()
            progress(self.step / self.steps)
            if time.monotonic() - last > self.size.checkpoint_seconds or self.step == self.steps:
                self.save()
                last = time.monotonic()
        return self.log

    def save(self) -> None:
        state = {
            "weights": {name: p.detach() for name, p in self.trained.items()}, "optimizer": self.optimizer.state_dict(),
            "step": self.step, "log": self.log, "average": self.average,
        }  # fmt: skip
        if self.step == self.steps:
            state.pop("optimizer")
        store.save(self.checkpoint, state)

    def restore(self) -> None:
        if not self.checkpoint.is_file():
            return
        state = store.load(self.checkpoint)
        with torch.no_grad():
            for name, value in state["weights"].items():
                self.trained[name].copy_(value)
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.log, self.average = state["step"], state["log"], state["average"]

    def one_step(self) -> None:
        begun = time.perf_counter()
        numbers = self.order[self.step * self.size.batch : (self.step + 1) * self.size.batch]
        ids, labels = batch([self.rows[i] for i in numbers])
        observer = Observer(weights=True)
        with self.objective.observed(observer):
            loss = self.objective(measure.states_of(self.model, ids), measure.head_of(self.model), labels,
                                  **self.fields(numbers, labels))  # fmt: skip
        loss.backward()
        if self.method.l2:
            self.pull_back()
        rate = self.run.rate * (1 - self.step / self.steps) * self.finch(observer, labels)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.note(numbers, labels, loss, observer)
        self.step += 1
        self.log["seconds"] = round(self.log["seconds"] + time.perf_counter() - begun, 3)

    def pull_back(self) -> None:
        """Adds the gradient of λ‖θ − θ₀‖² (fused_losses.l2_to_initial), in place and without a graph of its own."""
        with torch.no_grad():
            for name, p in self.trained.items():
                p.grad.add_(p - self.initial[name], alpha=2 * self.method.l2)

    def finch(self, observer: Observer, labels: Tensor) -> float:
        if not self.method.finch:
            return 1.0
        nll = float(observer.nll[labels != IGNORED].mean())
        self.average = nll if self.average is None else SMOOTHING * self.average + (1 - SMOOTHING) * nll
        return finch_factor(self.average)

    def fields(self, numbers: list[int], labels: Tensor) -> dict[str, Any]:
        """What the objective takes besides hidden states and labels."""
        there = labels != IGNORED
        found: dict[str, Any] = {}
        if self.objective.needs_reference:
            states = self.start.head.new_zeros(*labels.shape, self.start.head.shape[1])
            states[there] = torch.cat([self.hidden[i] for i in numbers])
            found["reference"] = fl.Reference(states, self.start.head)
        if self.method.initial == "sequence":
            found["initial_nll"] = torch.stack([self.nll[i].mean() for i in numbers])
        if self.method.initial == "token":
            found["initial_token_nll"] = self.start.head.new_zeros(labels.shape)
            found["initial_token_nll"][there] = torch.cat([self.nll[i] for i in numbers])
        if self.method.anchors:
            found["confidence"] = there.to(self.start.head.dtype)
        return found

    def note(self, numbers: list[int], labels: Tensor, loss: Tensor, observer: Observer) -> None:
        """The curriculum: weights (derivative of a token's loss by its nll) of tokens hard and easy at the start."""
        there = labels != IGNORED
        hard = torch.cat([self.nll[i] for i in numbers]) > -torch.tensor(measure.HARD).log()
        nll, weight = observer.nll[there], observer.weight[there]
        self.log["loss"].append(float(loss.detach()))
        self.log["nll"].append(float(nll.mean()))
        self.log["tokens"] += int(there.sum())
        for name, some in (("hard", hard), ("easy", ~hard)):
            with contextlib.suppress(ZeroDivisionError):
                count = int(some.sum())
                self.log[f"weight_{name}"].append(float(weight[some].sum()) / count)
                self.log[f"nll_{name}"].append(float(nll[some].sum()) / count)
