"""What is measured, in which order: cells, each a loss on one set of inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import devices
from . import inputs
from .contestants import Contestant
from .losses import CROSS_ENTROPY, LOSSES
from .ours import OURS

DECISION, TOKENS, VOCABULARY = "decision", "tokens", "vocabulary"
# Of each device the default shape: model, N, dtypes.
DEFAULTS = {
    "cpu": ("smollm2-135m", 2048, ("bfloat16", "float32")),
    "cuda": ("llama-3.1-8b", 8192, ("bfloat16",)),
}
# Of each device what the sweeps take: N at the plan's V, then V at a small N.
SWEEPS = {
    "cpu": ((256, 512, 1024, 2048, 4096), 512, (16384, 32768, 65536, 131072, 262144)),
    "cuda": ((1024, 2048, 4096, 8192, 16384), 2048, (32768, 65536, 131072, 262144)),
}
SWEPT = (f"{OURS}sparse", f"{OURS}sparse, int8", "eager, full logits", "F.linear_cross_entropy, chunked")
WIDE = 2048  # the other D of --all


@dataclass(frozen=True)
class Cell:
    """`purpose`: a decision, or a point of a sweep, whose contestants are timed alone and not checked."""

    loss: str
    distribution: str
    hidden: int
    vocabulary: int
    tokens: int
    dtype: str
    device: str
    seed: int = 0
    purpose: str = DECISION

    @property
    def inputs(self) -> str:
        """The name of the file with its inputs."""
        shape = f"D{self.hidden}-V{self.vocabulary}-N{self.tokens}"
        return f"{self.distribution}-{shape}-{self.dtype}-{self.device}-{self.seed}"

    @property
    def name(self) -> str:
        sweep = "" if self.purpose == DECISION else f"against {self.purpose}/"
        shape = f"D{self.hidden}-V{self.vocabulary}-N{self.tokens}"
        return f"{sweep}{self.loss}/{self.dtype}/{self.distribution}/{shape}"

    def row(self, contestant: str) -> str:
        return f"{self.name}/{contestant}"

    @staticmethod
    def of_settings(settings: dict[str, Any]) -> Cell:
        return Cell(**{name: settings[name] for name in Cell.__dataclass_fields__})

    def settings(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Plan:
    """`sweep`: None where there shall be one if time is left; `minutes`: None for no limit."""

    folder: Path
    cells: list[Cell]
    contestants: Sequence[Contestant]
    device: str
    rounds: int = 5
    minutes: float | None = 14
    limit: float = 120
    sweep: bool | None = None
    registry: Any = None  # where processes find the contestants by name
    notes: list[str] = field(default_factory=list)

    def sweep_cells(self) -> list[Cell]:
        """Cross-entropy on calibrated inputs: time against N, memory against V."""
        first = replace(self.cells[0], loss=CROSS_ENTROPY, distribution=inputs.CALIBRATED)
        counts, few, sizes = SWEEPS[self.device]
        return [
            *(replace(first, tokens=n, purpose=TOKENS) for n in counts),
            *(replace(first, tokens=few, vocabulary=v, purpose=VOCABULARY) for v in sizes),
        ]

    def swept(self) -> list[Contestant]:
        return [contestant for contestant in self.contestants if contestant.name in SWEPT]

    def rows_of(self, results: Any) -> dict[str, Any]:
        """{name: row} of this plan's, measured by this machine and these versions."""
        pairs = [(cell, each) for cell in self.cells for each in self.contestants]
        if self.sweep is not False:
            pairs += [(cell, each) for cell in self.sweep_cells() for each in self.swept()]
        found = {cell.row(each.name): results.known(cell, each) for cell, each in pairs}
        return {name: row for name, row in found.items() if row is not None}


def cells(
    device: str,
    model: str | None = None,
    shape: tuple[int, int] | None = None,
    tokens: int | None = None,
    losses: Sequence[str] = LOSSES,
    dtypes: Sequence[str] | None = None,
    distribution: str | None = None,
    everything: bool = False,
) -> tuple[list[Cell], list[str]]:
    """In order of priority, and notes on what was chosen in place of what.

    `shape`: D and V, else those of the model. Without a distribution it is the real one where it can be had.
    """
    default_model, default_tokens, default_dtypes = DEFAULTS[device]
    dim, vocabulary = shape or inputs.MODELS[model or default_model]
    tokens = tokens or default_tokens
    notes = []
    if dtypes is None and device == "cpu" and not everything and not devices.multiplies_bfloat16():
        dtypes = ("float32",)
        notes.append("float32 alone: this CPU has no instructions for bfloat16; --dtypes bfloat16 measures it too")
    dtypes = dtypes or (DEFAULTS["cpu"][2] if everything else default_dtypes)
    dims = (dim, WIDE) if everything and dim != WIDE else (dim,)
    found = []
    for d in dims:
        reason = inputs.real_is_not(tokens, d, vocabulary)
        if reason and distribution == inputs.REAL:
            raise ValueError(f"--distribution: real hidden states cannot be had: {reason}; give calibrated, or flat")
        chosen = distribution or (inputs.CALIBRATED if reason or device != "cpu" else inputs.REAL)
        if reason and distribution is None:
            chosen = inputs.CALIBRATED
            notes.append(f"calibrated inputs in place of real hidden states: {reason}")
        found += [Cell(loss, chosen, d, vocabulary, tokens, dtype, device) for loss in losses for dtype in dtypes]
    return found, list(dict.fromkeys(notes))
