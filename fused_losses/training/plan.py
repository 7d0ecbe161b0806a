"""All of a training that can be known and checked before the model is there."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

from .data import Data, Row
from .loop import pass_order
from .objective import check_fit, training_rows
from .settings import BATCH, CHECKPOINTS, EPOCHS, FULL_LEARNING_RATE, STEPS, Method, method_of

OF_A_TRAINING = (
    "method", "options", "lora", "targets", "learning_rate", "steps", "batch_size", "accumulate", "stop",
    "stop_probability", "stop_kl", "seed", "name",
)  # fmt: skip
WHOLE = {"lora": 1, "steps": 1, "batch_size": 1, "accumulate": 1, "max_length": 2, "save_every": 1}


@dataclass
class Plan:
    """Arguments as in `train`; None where the data decide, until `take`."""

    method: str
    options: dict[str, float]
    lora: int | None
    targets: list[str] | None
    replay_share: float
    learning_rate: Any
    steps: Any
    batch_size: Any
    accumulate: int
    max_length: int
    stop: bool
    stop_probability: float
    stop_kl: float
    seed: int
    save_every: Any
    progress: bool
    name: str | None
    data: Data = field(init=False)
    text: list[Row] = field(init=False)  # held out
    passed: list[dict] = field(init=False)  # rows of every pass, and
    replayed: list[dict] = field(init=False)
    order: list[int] = field(init=False)  # of all that is seen, numbers of passed + replayed

    def __post_init__(self) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "train runs in one process, and a launcher has started several; for several take fused_losses.patch "
                "in a Trainer of your own"
            )
        for name in self.options:
            if name not in self.kind.options:
                there = ", ".join(self.kind.options) or "none"
                raise ValueError(f"{name}: the method {self.method} has no such option; its options are: {there}")
        self.options = {**self.kind.options, **self.options}
        self._check_numbers()

    @property
    def kind(self) -> Method:
        return method_of(self.method)

    @property
    def settings(self) -> dict[str, Any]:
        """By which a training is known again."""
        found = {name: getattr(self, name) for name in OF_A_TRAINING}
        return found | {"data": self.data.digest, "heldout": Data(self.text).digest, "replayed": len(self.replayed)}

    def take(self, data: Data, text: list[Row]) -> None:
        """What is trained on, and held-out text; sets what the data decide."""
        check_fit(data, self.method, self.kind)
        self.data, self.text = data, text
        self.passed, self.replayed = training_rows(data, self.kind)
        share = self.replay_share if self.replayed else 0.0
        rows = len(self.passed) / (1 - share)
        if self.batch_size is None:
            self.batch_size = min(BATCH, math.ceil(rows))
        a_step = self.batch_size * self.accumulate
        if self.steps is None:
            least = STEPS if data.corrected else 1  # without anchors nothing stops a training, however small the data
            self.steps = max(least, math.ceil(EPOCHS * rows / a_step))
        if self.learning_rate is None:
            self.learning_rate = FULL_LEARNING_RATE if self.lora is None else self.kind.learning_rate
        self.order = pass_order(len(self.passed), len(self.replayed), share, self.steps * a_step, self.seed)
        self.save_every = self.save_every or max(1, self.steps // CHECKPOINTS)

    def _check_numbers(self) -> None:
        for name, least in WHOLE.items():
            value = getattr(self, name)
            optional = name not in ("accumulate", "max_length")
            if not (value is None and optional) and (type(value) is not int or value < least):
                raise ValueError(f"{name}: expected an integer ≥ {least}, got {value!r}")
        for name, most in (("replay_share", 1.0), ("stop_probability", 1.001), ("stop_kl", math.inf)):
            if not 0 < getattr(self, name) < most:
                raise ValueError(f"{name}: expected a number above 0 and below {most:g}, got {getattr(self, name)!r}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a number > 0, got {self.learning_rate!r}")
