"""The Trainer of a training: its arguments, what is measured meanwhile, when it stops, and what a kill leaves."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import report as reports
from .folder import Folder
from .measure import Measurement, where_is
from .settings import MEASUREMENTS, OF_HELDOUT


def pass_order(rows: int, replayed: int, share: float, total: int, seed: int) -> list[int]:
    """Which row is which of all that a training sees: shuffled passes, with rows to replay spread evenly among them.

    Rows to replay have the numbers from `rows` on.
    """
    generator = random.Random(seed)

    def passes(first: int, count: int):
        while True:
            yield from generator.sample(range(first, first + count), count)

    ours, others = passes(0, rows), passes(rows, replayed)
    return [next(others if int((i + 1) * share) > int(i * share) else ours) for i in range(total)]


class Rows(torch.utils.data.Dataset):
    """Rows in the order in which they come."""

    def __init__(self, rows: list[dict], order: list[int]) -> None:
        self.rows, self.order = rows, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, at: int) -> dict:
        return self.rows[self.order[at]]


class Loop:
    """One training of a patched model. `reference`: of the measurements; `begun`: of time.perf_counter."""

    def __init__(
        self, plan: Any, model: nn.Module, tokenizer: Any, collate: Callable, plain: Callable, reference: str,
        folder: Folder, begun: float,
    ) -> None:  # fmt: skip
        self.plan, self.model, self.tokenizer, self.folder, self.begun = plan, model, tokenizer, folder, begun
        self.collate = collate if plan.kind.anchors else plain
        self.measure = Measurement(model, plan.data.rows, plan.text, collate, plain, reference)
        self.every = max(1, plan.steps // MEASUREMENTS)
        self.every_heldout = self.every * max(1, MEASUREMENTS // OF_HELDOUT)
        self.stopped: str | None = None  # why, before the last step
        self.first_step: float | None = None  # seconds until it was done

    def run(self) -> dict[str, Any]:
        """The report, not yet marked as finished; checkpoints and a report of each measurement are in the folder."""
        from transformers import PrinterCallback, Trainer

        from ..huggingface import Callback

        plan = self.plan
        events = _events(self)
        data = Rows([*plan.passed, *plan.replayed], plan.order)
        trainer = Trainer(
            self.model, self._arguments(), train_dataset=data, data_collator=self.collate,
            callbacks=[Callback(), events],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        checkpoint = self.folder.last_checkpoint()
        if checkpoint is not None and plan.progress:
            step = checkpoint.name.rpartition("-")[2]
            print(f"goes on from step {step} of {plan.steps}, the last checkpoint", file=sys.stderr)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            events.close()
        last = self.measured(trainer.state)[-1]
        if last["step"] == trainer.state.global_step and (plan.text and "nll_heldout" not in last[reports.MEASURED]):
            trainer.state.log_history.remove(last)
        if self.measured(trainer.state)[-1]["step"] != trainer.state.global_step:
            self.measure_now(trainer.state)
        found = self.report(trainer.state)
        try:
            self.folder.write("curves.png", lambda path: reports.draw(found, path))
        except ImportError:
            print("curves.png needs matplotlib; install with: pip install 'fused_losses[train]'", file=sys.stderr)
        return found

    def _arguments(self) -> Any:
        from transformers import TrainingArguments

        plan = self.plan
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        arguments = TrainingArguments(
            output_dir=str(self.folder.path), max_steps=plan.steps, per_device_train_batch_size=plan.batch_size,
            gradient_accumulation_steps=plan.accumulate, learning_rate=plan.learning_rate, lr_scheduler_type="linear",
            weight_decay=0.0, seed=plan.seed, use_cpu=on_cpu, dataloader_pin_memory=not on_cpu,
            train_sampling_strategy="sequential", remove_unused_columns=False, logging_steps=max(1, plan.steps // 200),
            save_strategy="steps", save_steps=plan.save_every, save_total_limit=2, report_to=[], disable_tqdm=True,
            log_level="error",
        )  # fmt: skip
        arguments._n_gpu = min(arguments.n_gpu, 1)  # else several GPUs become nn.DataParallel
        return arguments

    # --- what is known

    @staticmethod
    def measured(state: Any) -> list[dict]:
        return [entry for entry in state.log_history if reports.MEASURED in entry]

    def measure_now(self, state: Any, heldout: bool = True) -> dict[str, float]:
        """Notes it in the log, which is in the checkpoints, and writes the report."""
        found = self.measure(heldout)
        entry: dict[str, Any] = {"step": state.global_step, reports.MEASURED: found}
        if self.measure.least is not None:
            least = where_is(*self.measure.least, self.tokenizer)
            entry[reports.LEAST] = {**least, "part": reports.number_of(found["least_anchor"])}
        state.log_history.append(entry)
        self.folder.write_json("report.json", self.report(state))
        return found

    def is_reached(self, found: dict[str, float]) -> bool:
        plan = self.plan
        if not plan.stop or "least_anchor" not in found or found["least_anchor"] < plan.stop_probability:
            return False
        return not plan.kind.needs_reference or found.get("kl_retained", 0.0) <= plan.stop_kl

    def report(self, state: Any) -> dict[str, Any]:
        steps, at = self.plan.steps, state.global_step
        why = self.stopped or (f"all {steps} steps" if at >= steps else f"not finished: step {at} of {steps}")
        entries = self.measured(state)
        measured = [entry[reports.MEASURED] for entry in entries]
        return reports.of(
            self.plan, state.log_history, measured[0] if measured else {}, measured[-1] if measured else {},
            steps=at, stopped=why, seconds=round(time.perf_counter() - self.begun, 2),
            seconds_to_first_step=self.first_step, least_anchor=entries[-1].get(reports.LEAST) if entries else None,
            trained_parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
        )  # fmt: skip


def _events(loop: Loop) -> Any:
    """A callback of a Trainer: measures, stops, shows the progress and marks checkpoints as finished."""
    from transformers import TrainerCallback

    class Events(TrainerCallback):
        bar: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                loop.measure_now(state)
            if loop.plan.progress:
                from tqdm import tqdm

                self.bar = tqdm(
                    total=state.max_steps, initial=state.global_step, desc=loop.plan.method, unit="step",
                    dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 10,
                )  # fmt: skip

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if loop.first_step is None:
                loop.first_step = round(time.perf_counter() - loop.begun, 2)
            if self.bar is not None:
                self.bar.update(1)
            if state.global_step % loop.every:
                return
            found = loop.measure_now(state, heldout=state.global_step % loop.every_heldout == 0)
            if self.bar is not None:
                shown = {"p(anchors)": "anchor_probability", "KL": "kl_retained", "held-out nll": "nll_heldout"}
                self.bar.set_postfix({label: f"{found[name]:.3g}" for label, name in shown.items() if name in found})
            if loop.is_reached(found) and state.global_step < state.max_steps:
                loop.stopped = "the anchors have their probability"
                loop.stopped += " and the KL is small" if loop.plan.kind.needs_reference else ""
                control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loop.folder.mark(state.global_step)

        def close(self) -> None:
            """The bar's line has an end, whatever ended the training."""
            if self.bar is not None:
                self.bar.close()

    return Events()
