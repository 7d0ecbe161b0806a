"""One row anew, from its entry."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..checks import meant
from . import measure, run
from .plan import Cell, Plan
from .store import NAME, Results, Row


def reproduce(folder: Path, name: str, added: Path | None, rounds: int, limit: float) -> tuple[Row, Row]:
    """The row as it stands in the folder's bench.json, and as it comes out now: in rounds with ours. Nothing is written
    there.

    Raises ValueError where there is no such row, or its contestant is not known any more.
    """
    if not (folder / NAME).is_file():
        raise ValueError(
            f"--row: there is no {folder / NAME}; name its folder with --output, or run without --row first"
        )
    results = Results(folder)
    if name not in results.rows:
        remedy = meant(name, results.rows) or f"; the names are those in {folder / NAME}"
        raise ValueError(f"--row: expected a row of {folder / NAME}, got {name!r}{remedy}")
    before = results.rows[name]
    cell, contestant = Cell.of_settings(before["settings"]), before["settings"]["contestant"]
    registry = measure.Registry(cell.device, added, True)
    every = registry.contestants()
    if contestant not in every:
        raise ValueError(
            f"--row: {contestant} is no contestant here; there are {'; '.join(every)}, and --add gives others"
        )
    ours = next((each for each in every.values() if each.ours and not isinstance(each.losses[cell.loss], str)), None)
    some = {each.name: each for each in (ours, every[contestant]) if each is not None}
    with tempfile.TemporaryDirectory() as temporary:
        plan = Plan(Path(temporary), [cell], list(some.values()), cell.device, rounds, None, limit, False, registry)
        after = run.run(plan).rows[name]
    return before, after
