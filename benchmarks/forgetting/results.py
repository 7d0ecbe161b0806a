"""What is kept of the runs, in one file; and the study's quantities: gain, loss, curves over rates, intervals."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import store
from .grid import START, Run, Size

GENERAL = ("code", "instructions", "arithmetic", "english", "french", "german", "spanish", "italian")
POINTS = 20  # that are kept of a curve over steps
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}  # Student's t for two-sided 95 %, by the number of values
Entry = dict[str, Any]


def entries(file: Path, size: Size) -> list[Entry]:
    """The merged runs of `file`: none where it is missing, an error where they are of another size."""
    if not file.is_file():
        return []
    found = json.loads(file.read_text())
    if found["size"] != size_entry(size):
        raise SystemExit(
            f"{file} holds runs of another size, {found['size']}, than this grid's, {size_entry(size)}; "
            "remove it to begin anew"
        )
    return found["runs"]


def size_entry(size: Size) -> Entry:
    """What of a size changes a result."""
    found = asdict(size)
    found.pop("checkpoint_seconds")
    return found


def merge(output: Path, runs: Sequence[Run], size: Size, file: Path) -> int:
    """Adds the runs that are done in `output` to `file`, in the grid's order, and says how many there are."""
    known = {entry["name"]: entry for entry in entries(file, size)}
    done = [path for run in runs if (path := output / "runs" / f"{run.name}.json").is_file()]
    if not done:
        print(f"--merge: nothing is done in {output}; run without --merge first, or give --output", file=sys.stderr)
        return 2
    for path in done:
        result = json.loads(path.read_text())
        if result["settings"]["size"] != size_entry(size):
            print(f"--merge: {path} is a run of another size; keep those of one size in a folder", file=sys.stderr)
            return 2
        known[path.stem] = compact(path.stem, result)
    found = [known[run.name] for run in runs if run.name in known]
    store.write_json(file, {"size": size_entry(size), "runs": found, "of": len(runs)})
    print(f"{len(found)} of {len(runs)} runs, in {file}")
    return 0


def compact(name: str, result: Entry) -> Entry:
    log = result["training"]
    curves = {key: thinned(values) for key, values in log.items() if isinstance(values, list) and values}
    numbers = {key: value for key, value in log.items() if isinstance(value, (int, float))}
    settings = result["settings"]
    return rounded({
        "name": name, **settings["run"], "device": result["device"],
        "before": result["before"], "curves": curves, **numbers, "after": result["after"], "wise": result["wise"],
    })  # fmt: skip


def thinned(values: Sequence[float]) -> list[float]:
    """Means of at most POINTS parts of equal length."""
    count = min(POINTS, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    return [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def rate_text(rate: float) -> str:
    """As 2e-5."""
    return f"{rate:.0e}".replace("e-0", "e-")


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean over seeds; None of fewer than two."""
    if len(values) < 2:
        return None
    half = T95[min(len(values), max(T95))] * statistics.stdev(values) / len(values) ** 0.5
    middle = statistics.fmean(values)
    return middle - half, middle + half


class Study:
    """Runs by what they are, and what follows from them.

    Differences are to the start model: nll as it was in the run's own precision, all else in the run of that domain
    without training."""

    def __init__(self, runs: Sequence[Entry]) -> None:
        self.starts = {run["domain"]: run["after"] for run in runs if run["method"] == START}
        self.runs = [run for run in runs if run["method"] != START and run["domain"] in self.starts]

    def of(
        self, method: str, rate: float | None = None, domain: str = "reasoning", stretch: float = 1.0
    ) -> list[Entry]:
        """Runs by seed."""
        found = [
            run for run in self.runs
            if (run["method"], run["domain"], run["stretch"]) == (method, domain, stretch)
            and (rate is None or abs(run["rate"] - rate) < 1e-9)
        ]  # fmt: skip
        return sorted(found, key=lambda run: (run["seed"], run["rate"]))

    def of_reasoning(self) -> list[Entry]:
        return [run for run in self.runs if run["domain"] == "reasoning"]

    def gain(self, run: Entry, text: str = "test", after: Entry | None = None) -> float:
        """Nats per token of the domain that were won."""
        found = (after or run["after"])["texts"][text]
        return found["start_nll"] - found["nll"]

    def loss(self, run: Entry, key: str = "nll", after: Entry | None = None) -> float:
        """Nats per token of general texts that were lost: mean over kinds. key "nll_tempered": at each text's best
        temperature, before and after."""
        before, now = self.starts[run["domain"]]["texts"], (after or run["after"])["texts"]
        if key == "nll":
            return statistics.fmean(now[kind]["nll"] - now[kind]["start_nll"] for kind in GENERAL)
        return statistics.fmean(now[kind][key] - before[kind][key] for kind in GENERAL)

    def sharpening(self, run: Entry) -> float:
        """The part of the lost nats that a temperature gives back, both on the same third of the tokens."""
        return self.loss(run, "nll_third") - self.loss(run, "nll_tempered")

    def curve(
        self, method: str, seed: int, domain: str = "reasoning", rates: Sequence[float] | None = None
    ) -> list[tuple[float, float]]:
        """(gain, loss) over rates, smallest first, from the start model on; with `rates` over these, and nothing where
        one of them is missing."""
        runs = [run for run in self.of(method, domain=domain) if run["seed"] == seed]
        if rates is not None:
            runs = [run for run in runs if any(abs(run["rate"] - rate) < 1e-9 for rate in rates)]
            if len(runs) < len(rates):
                return []
        return [(0.0, 0.0), *((self.gain(run), self.loss(run)) for run in sorted(runs, key=lambda run: run["rate"]))]

    def loss_at_gain(
        self, method: str, gain: float, seed: int, domain: str = "reasoning", rates: Sequence[float] | None = None
    ) -> float | None:
        """Interpolated along the method's curve over rates, where it turns back the least loss; None beyond it."""
        points = self.curve(method, seed, domain, rates)
        found = []
        for (g0, l0), (g1, l1) in itertools.pairwise(points):
            if min(g0, g1) <= gain <= max(g0, g1) and g1 != g0:
                found.append(l0 + (l1 - l0) * (gain - g0) / (g1 - g0))
        return min(found) if found else None

    def paired(
        self, a: tuple[str, float, str], b: tuple[str, float, str], of: Callable[[Entry], float]
    ) -> list[float]:  # fmt: skip
        """of(a) − of(b), by seed, where both are there; a and b: (method, rate, domain)."""
        ours = {run["seed"]: of(run) for run in self.of(*a)}
        theirs = {run["seed"]: of(run) for run in self.of(*b)}
        return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
