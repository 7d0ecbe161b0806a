"""The run: every contestant of every cell alone, then all of a cell in turn, then the sweeps; each row kept at once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import measure, processes, store
from .contestants import Contestant
from .plan import DECISION, Cell, Plan
from .store import Results, Row

ALONE_SHARE = 0.6  # of the minutes: no cell is begun that might end later
SWEEP_SHARE = 0.85  # with more than this used there is no sweep, unless it was asked for
NO_TIME = "no time was left; the same command goes on with it, and --minutes gives more"


def run(plan: Plan, progress: Callable[[str, int, int], Any] = lambda *_: None) -> Results:
    """All rows of the plan, on disk and returned. `progress`: called with (what, done, total).

    Goes on where it was stopped: rows with equal settings are not measured twice. Raises ValueError where another run
    writes to the folder.
    """
    results, close = store.open_results(plan.folder)
    try:
        _Run(plan, results, progress).all()
    finally:
        close()
    return results


@dataclass
class _Run:
    plan: Plan
    results: Results
    progress: Callable[[str, int, int], Any]

    def __post_init__(self) -> None:
        self.begin, self.done = time.monotonic(), 0
        sweep = [] if self.plan.sweep is False else self.plan.sweep_cells()
        self.total = len(self.plan.cells) * (len(self.plan.contestants) + 1) + len(sweep) * len(self.plan.swept())
        self.forget_failures()
        self.broken: dict[str, str] = {}  # {name of inputs: why they cannot be made}

    def forget_failures(self) -> None:
        """Those of an earlier command are tried again: it may have had less memory. Not what took too long, if it may
        take no longer now."""
        same = processes.too_long(self.plan.limit)
        for name, row in self.plan.rows_of(self.results).items():
            if "reason" in row and same not in row["reason"]:
                del self.results.rows[name]

    def used(self) -> float:
        """The share of the time."""
        return 0.0 if self.plan.minutes is None else (time.monotonic() - self.begin) / (60 * self.plan.minutes)

    def all(self) -> None:
        processes.import_ahead(self.plan.device, self.plan.contestants)
        self.results.notes = list(self.plan.notes)
        self.results.save()
        took = 0.0  # of the time, the cell that took longest: another one may take as long
        for cell in self.plan.cells:
            before = self.used()
            self.cell_alone(cell, self.plan.contestants, before + took > ALONE_SHARE)
            took = max(took, self.used() - before)
        for at, cell in enumerate(self.plan.cells):
            self.rounds(cell, self.plan.cells[at:])
        if self.plan.sweep is not False:
            for cell in self.plan.sweep_cells():
                late = self.plan.sweep is None and self.used() > SWEEP_SHARE
                self.cell_alone(cell, self.plan.swept(), late)
        self.results.save()
        shutil.rmtree(self.plan.folder / "inputs", ignore_errors=True)
        self.progress("done", self.total, self.total)

    def step(self, what: str) -> None:
        self.progress(what, self.done, self.total)
        self.done += 1

    # --- alone

    def cell_alone(self, cell: Cell, contestants: Any, late: bool) -> None:
        """`late`: nothing is measured any more, and a note says so."""
        for contestant in contestants:
            self.step(cell.row(contestant.name))
            reason = contestant.missing(cell.loss, cell.device, cell.dtype)
            if reason is not None:
                self.results.put(cell, contestant, {"reason": reason})
            elif self.results.known(cell, contestant) is None and late:
                self.note(f"{cell.name if cell.purpose == DECISION else 'the sweep'}: {NO_TIME}")
            elif self.results.known(cell, contestant) is None:
                self.results.put(cell, contestant, self.alone(cell, contestant))

    def alone(self, cell: Cell, contestant: Contestant) -> Row:
        plan = self.plan
        try:
            self.prepare(cell)
            arguments = (cell, contestant.name, plan.registry, plan.folder)
            with processes.started(measure.alone, *arguments, limit=plan.limit) as messages:
                return next(messages)
        except processes.Ended as end:
            return {"reason": str(end)}

    def prepare(self, cell: Cell) -> None:
        """Inputs and truth. `Ended` where they cannot be made."""
        if cell.inputs in self.broken:
            raise processes.Ended(self.broken[cell.inputs])
        if measure.prepared(cell, self.plan.folder):
            return
        try:
            with processes.started(measure.prepare, cell, self.plan.folder, limit=1800) as messages:
                next(messages)
        except processes.Ended as end:
            self.broken[cell.inputs] = f"its inputs cannot be made: {end}"
            raise processes.Ended(self.broken[cell.inputs]) from None

    # --- in turn

    def rounds(self, cell: Cell, cells: list[Cell]) -> None:
        """The cell's share of the time that is left for it and those after it; at least one round."""
        self.step(f"{cell.name}: rounds")
        rows = self.survivors(cell)
        left = self.plan.rounds - min((len(row.get("seconds", ())) for row in rows.values()), default=self.plan.rounds)
        if left <= 0:
            return
        seconds = float("inf")
        if self.plan.minutes is not None:
            cost = {each: sum(row["seconds_alone"] for row in self.survivors(each).values()) for each in cells}
            share = cost[cell] / max(1e-9, sum(cost.values()))
            # The last call that is begun may take as long as a round.
            seconds = 60 * self.plan.minutes * (1 - self.used()) * share - cost[cell]
        self.prepare(cell)
        self.take_turns(cell, list(rows), left, seconds)
        least = min((len(row.get("seconds", ())) for row in self.survivors(cell).values()), default=0)
        if least < self.plan.rounds:
            self.note(f"{cell.name}: {least} of {self.plan.rounds} rounds, as no more time was left")

    def take_turns(self, cell: Cell, names: list[str], count: int, seconds: float) -> None:
        """One that fails has a row that says so, and the others go on."""
        plan, now = self.plan, None
        arguments = (cell, names, plan.registry, plan.folder, count, seconds)
        try:
            with processes.started(measure.rounds, *arguments, limit=plan.limit) as messages:
                for message in messages:
                    now = message.get("now", now)
                    if "gone" in message:
                        self.gone(cell, message["gone"], message["why"])
                    elif "product" in message:
                        self.keep_round(cell, message)
                        count -= 1
        except processes.Ended as end:
            if now is None:
                self.note(f"{cell.name}: no rounds: {end}")
                return
            self.gone(cell, now, str(end))
            others = [name for name in names if name != now]
            if others and count:
                self.take_turns(cell, others, count, seconds)

    def keep_round(self, cell: Cell, message: dict[str, Any]) -> None:
        taken = message["seconds"]
        ours = next((taken[each.name] for each in self.plan.contestants if each.ours and each.name in taken), None)
        for name, seconds in taken.items():
            row = self.results.rows[cell.row(name)]
            values = {"seconds": seconds, "products": seconds / message["product"]}
            for key, value in (values if ours is None else values | {"of_ours": seconds / ours}).items():
                row[key] = [*row.get(key, ()), value]
        self.results.save()

    def gone(self, cell: Cell, name: str, why: str) -> None:
        self.results.rows[cell.row(name)]["reason"] = f"in turn with others: {why}"
        self.results.save()

    def survivors(self, cell: Cell) -> dict[str, Row]:
        rows = {each.name: self.results.known(cell, each) for each in self.plan.contestants}
        return {name: row for name, row in rows.items() if row is not None and "reason" not in row}

    def note(self, text: str) -> None:
        if text not in self.results.notes:
            self.results.notes.append(text)
