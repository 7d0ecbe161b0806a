"""The runs, the ones that matter most first: any beginning of the list is a study."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .methods import LARGE, LORA_FACTOR, METHODS, MIDDLE, SMALL, WISE

RATES = (5e-6, SMALL, 5e-5, MIDDLE, 2e-4, LARGE)


@dataclass(frozen=True)
class Size:
    """How much of each a run has. `rows`: of the training set; `steps` of `batch` rows; `tested`: rows of a test set;
    `count`: of general texts of a kind; `own`: questions answered by the start model, in `own_tokens`."""

    rows: int = 120
    steps: int = 60
    batch: int = 2
    tested: int = 16
    count: int = 12
    own: int = 6
    own_tokens: int = 40
    checkpoint_seconds: float = 60.0


FULL = Size()
QUICK = Size(rows=24, steps=12, batch=2, tested=6, count=4, own=3, own_tokens=16)


START = "start"  # the method of a run without training: the start model, measured


@dataclass(frozen=True)
class Run:
    """`stretch`: of the number of steps; `wise`: parts of the way at which the weights are measured as well."""

    method: str
    rate: float
    domain: str = "reasoning"
    seed: int = 0
    stretch: float = 1.0
    wise: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        longer = "" if self.stretch == 1 else f"-x{self.stretch:g}"
        return f"{self.domain}-{self.method}-{self.rate:g}{longer}-{self.seed}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "wise": list(self.wise)}


def grid(quick: bool = False) -> list[Run]:
    if quick:
        pairs = [("sft", r) for r in (SMALL, LARGE)] + [("talr", r) for r in (SMALL, LARGE)]
        found = [
            *(Run(method, rate, wise=WISE[1:] if (method, rate) == ("sft", LARGE) else ()) for method, rate in pairs),
            Run("lawf", SMALL), Run("sft+kl", LARGE), Run("sft", LARGE, "label"), Run("sft", LARGE, "facts"),
        ]  # fmt: skip
        return _with_starts(found)
    return _with_starts([
        *_headline(0), *_other_domains(0), *_headline(1), *_other_domains(1), *_headline(2), *_methods(LARGE),
        *_curves(), *_other_domains(2), *_methods(MIDDLE, SMALL), *_others(),
    ])  # fmt: skip


def _with_starts(runs: list[Run]) -> list[Run]:
    """Each run once, and before the first of a domain the start model."""
    found: dict[Run, None] = {}
    for run in runs:
        found[Run(START, 0.0, run.domain)] = None
        found[run] = None
    return list(found)


def _of(method: str, rate: float, **more: Any) -> Run:
    """Seed 0 of SFT is measured between start and end too, for Wise-FT."""
    factor = LORA_FACTOR if METHODS[method].lora else 1
    wise = WISE if (method, more) == ("sft", {}) and rate >= SMALL else ()
    return Run(method, rate * factor, wise=wise, **more)


def _headline(seed: int) -> list[Run]:
    more = {"seed": seed} if seed else {}
    return [
        *(_of(method, rate, **more) for rate in (SMALL, LARGE) for method in ("sft", "talr")),
        *(_of(method, rate, **more) for method in ("sft+kl", "lawf") for rate in (SMALL, LARGE)),
    ]


def _other_domains(seed: int) -> list[Run]:
    more = {"seed": seed} if seed else {}
    return [_of(method, LARGE, domain=domain, **more) for domain in ("label", "facts") for method in ("sft", "talr")]


def _curves() -> list[Run]:
    """What tells the explanations apart: rates, steps, and text without templates."""
    return [
        *(_of(method, rate) for rate in RATES for method in ("sft", "talr")),
        Run("talr", SMALL, stretch=3.0),
        *(_of(method, rate, domain="docs") for rate in (SMALL, LARGE) for method in ("sft", "talr")),
    ]  # fmt: skip


def _methods(*rates: float) -> list[Run]:
    return [_of(method, rate) for rate in rates for method in METHODS]


def _others() -> list[Run]:
    return [
        *(_of("finch", LARGE, seed=seed) for seed in (1, 2)),
        *(_of(method, rate, domain="label") for rate in (SMALL, 2e-4) for method in ("sft", "talr")),
        *(_of(m, r, domain="facts") for r in (LARGE, SMALL) for m in ("sft", "talr", "lawf", "sft+kl")),
        *(_of(method, MIDDLE, seed=seed) for seed in (1, 2) for method in ("sft", "talr", "lora")),
        _of("lora", 5e-5),
    ]
