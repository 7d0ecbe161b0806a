"""What the rows say: who is ahead of ours, whether to switch, and the tables of docs/benchmarks.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .ours import OURS
from .plan import DECISION, SWEPT, TOKENS, VOCABULARY, Cell
from .store import Row, seconds

EAGER = "eager, full logits"  # what one has without any package
ASPECTS = {"seconds": "time", "peak_mib": "memory", "error": "error"}
CLOSE = 1.05  # a ratio that is no lead: medians of shared machines vary by as much
ROUNDING = 1.5  # likewise of errors, which are of a sample


@dataclass(frozen=True)
class Figures:
    seconds: float
    peak_mib: float | None
    error: float  # the larger of both gradients'


def groups(rows: Mapping[str, Row]) -> dict[Cell, dict[str, Row]]:
    """{cell: {contestant: row}} of the decision, in the order of the rows."""
    found: dict[Cell, dict[str, Row]] = {}
    for row in rows.values():
        if row["settings"]["purpose"] == DECISION:
            found.setdefault(Cell.of_settings(row["settings"]), {})[row["settings"]["contestant"]] = row
    return found


def figures(row: Row) -> Figures | None:
    if "reason" in row or row.get("hidden_error") is None:
        return None
    return Figures(seconds(row), row["peak_mib"], max(row["hidden_error"], row["weight_error"] or 0.0))


def present(members: Mapping[str, Row]) -> dict[str, Figures]:
    """Those with figures; those with rounds only, where there are any."""
    timed = any(row.get("seconds") for row in members.values())
    found = {name: figures(row) for name, row in members.items() if row.get("seconds") or not timed}
    return {name: each for name, each in found.items() if each is not None}


# --- the decision


def ahead(members: Mapping[str, Row]) -> dict[str, tuple[str, list[str]]]:
    """{other: (the one of ours that it is ahead of in least, in what)}; an empty list: ours is ahead in all."""
    some = present(members)
    ours = {name: each for name, each in some.items() if name.startswith(OURS)}
    if not ours:
        return {}
    found = {}
    for name, other in some.items():
        if name not in ours:
            lost = {mine: _lost(other, each) for mine, each in ours.items()}
            best = min(lost, key=lambda mine: len(lost[mine]))
            found[name] = (best, lost[best])
    return found


def _lost(other: Figures, mine: Figures) -> list[str]:
    found = []
    for name, aspect in ASPECTS.items():
        a, b = getattr(other, name), getattr(mine, name)
        if a is not None and b is not None and a * (ROUNDING if name == "error" else CLOSE) < b:
            found.append(aspect)
    return found


RULE = (
    "ahead of ours: in what a contestant is better than each one of ours, by more than 5 % (errors: by half); in "
    "brackets the one of ours that it is ahead of in least."
)
HEADER = ("loss", "dtype", "ours, s", "eager, s", "ours, MiB", "eager, MiB", "ahead of ours")


def decision(rows: Mapping[str, Row]) -> dict[str, list[tuple[str, ...]]]:
    """{inputs: a line a loss and dtype, under HEADER}."""
    lines: dict[str, list[tuple[str, ...]]] = {}
    for cell, members in groups(rows).items():
        some = present(members)
        mine = next((each for name, each in some.items() if name.startswith(OURS)), None)
        eager = some.get(EAGER)
        where = f"{cell.distribution} inputs, D={cell.hidden}, V={cell.vocabulary}, N={cell.tokens}"
        lines.setdefault(where, []).append(
            (
                cell.loss, cell.dtype,
                *(_number(each.seconds if each else None) for each in (mine, eager)),
                *(_number(each.peak_mib if each else None) for each in (mine, eager)), _leaders(members),
            )
        )  # fmt: skip
    return lines


def _leaders(members: Mapping[str, Row]) -> str:
    found = ahead(members)
    if not found:
        return "no figures of ours and another"
    leading = [f"{name}: {' and '.join(lost)} ({mine})" for name, (mine, lost) in found.items() if lost]
    return "; ".join(leading) or "nobody: ours ahead in all"


def answer(rows: Mapping[str, Row]) -> str:
    """The sentence: whether to switch from full logits."""
    speed, memory, losses, names = [], [], [], []
    for cell, members in groups(rows).items():
        some = present(members)
        name = next((name for name in some if name.startswith(OURS)), None)
        eager = some.get(EAGER)
        if name is None or eager is None:
            continue
        speed.append(times(members[EAGER], members[name]))
        if some[name].peak_mib is not None and eager.peak_mib is not None:
            memory.append(100 * counted(some[name].peak_mib) / counted(eager.peak_mib))
        losses.append(cell.loss)
        names.append(name.removeprefix(OURS))
    if not speed:
        return f"No answer: there are no figures of both ours and {EAGER}{_why(rows)}."
    ours = f"fused_losses ({' or '.join(dict.fromkeys(names))})"
    than = f"what you have ({EAGER})"
    word = "Switch" if min(speed) >= 1 else "It depends" if max(speed) >= 1 else "Stay, unless memory is short"
    if max(speed) >= 1:
        what = f"{ours} is {_range(speed)} times as fast as {than}"
    else:
        what = f"{ours} takes {_range([1 / ratio for ratio in speed])} times as long as {than}"
    if memory:
        what += f", with {_range(memory)} % of its memory"
    some_of = "" if word != "It depends" else "; the table says which loss gains"
    return f"{word}: {what} ({', '.join(dict.fromkeys(losses))}){some_of}."


def times(other: Row, mine: Row) -> float:
    """How many times as long the other takes: the median over rounds, else of one call alone."""
    if other.get("of_ours"):
        return statistics.median(other["of_ours"])
    a, b = seconds(other), seconds(mine)
    assert a is not None and b is not None
    return a / b


def counted(mib: float) -> float:
    """Below one MiB it is what the system rounds to."""
    return max(1.0, mib)


def _why(rows: Mapping[str, Row]) -> str:
    found = {
        f"{row['settings']['contestant']}: {row['reason']}" for row in rows.values()
        if "reason" in row and row["settings"]["contestant"].startswith((OURS, EAGER))
    }  # fmt: skip
    return f" ({'; '.join(sorted(found))})" if found else ""


def _range(values: Sequence[float]) -> str:
    low, high = (f"{value:.2g}" if value < 10 else f"{value:.0f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def left_out(rows: Mapping[str, Row]) -> list[tuple[str, str, str]]:
    """(contestant, reason, losses) of rows without figures."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows.values():
        if "reason" in row and row["settings"]["purpose"] == DECISION:
            names = found.setdefault((row["settings"]["contestant"], row["reason"]), [])
            names.append(row["settings"]["loss"])
    return [(name, reason, ", ".join(dict.fromkeys(losses))) for (name, reason), losses in found.items()]


def side_by_side(before: Row, after: Row) -> list[tuple[str, ...]]:
    """(figure, before, after) of one row."""
    names = {"peak_mib": "peak, MiB", "hidden_error": "error of dx", "weight_error": "error of dW"}
    names |= {"token_error": "error per token, mean", "largest_token_error": "largest"}
    lines: list[tuple[str, ...]] = [("seconds", *(_number(seconds(row)) for row in (before, after)))]
    lines += [("time / ours", *(_median(row, "of_ours") for row in (before, after)))]
    lines += [(what, *(_figure(row.get(name)) for row in (before, after))) for name, what in names.items()]
    if "reason" in before or "reason" in after:
        lines.append(("without figures", before.get("reason", "–"), after.get("reason", "–")))
    return lines


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _median(row: Row, key: str) -> str:
    return f"{statistics.median(row[key]):.2f}" if row.get(key) else "–"


# --- tables in Markdown


COLUMNS = (
    "| loss | dtype | D | | s | in products | time / ours | MiB | error of dx | of dW | per token, mean | largest |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
)


def markdown(content: Mapping[str, Any]) -> str:
    """All that bench.json says, as tables of a page; those of docs/benchmarks.md come from here."""
    rows, machine = content["rows"], content["machine"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    lines = [
        answer(rows), "",
        f"{device}; torch {machine['torch']}, fused_losses {machine['fused_losses']}, backend {machine['backend']}; "
        f"{machine['date'][:10]}. Seconds are of forward and backward: the median of interleaved rounds. In products: "
        "of one `hidden @ weight.T` in the same round. MiB: peak of a process of its own above inputs and gradients. "
        "Errors of gradients are relative L2 against float64, on a sample. ¹: alone, one call, with what is done once "
        "for a head.", "",
    ]  # fmt: skip
    for where, cells in _by_inputs(groups(rows)):
        lines += [f"### {where}", "", *COLUMNS]
        for cell, members in cells:
            lines += [_line(cell, name, row) for name, row in members.items() if "reason" not in row]
        lines.append("")
    lines += growth(rows)
    if found := left_out(rows):
        lines += ["| without figures | why | losses |", "|---|---|---|", *(f"| {' | '.join(each)} |" for each in found)]
    if content.get("notes"):
        lines += ["", *(f"- {note}" for note in content["notes"])]
    return "\n".join(lines).rstrip() + "\n"


def growth(rows: Mapping[str, Row]) -> list[str]:
    """Tables of the sweeps: seconds against N, MiB against V; each contestant in a process of its own."""
    lines = []
    swept: tuple[tuple[str, str, str, str], ...] = (
        (TOKENS, "tokens", "vocabulary", "seconds of a call against N"),
        (VOCABULARY, "vocabulary", "tokens", "peak MiB against V"),
    )
    for purpose, across, fixed, what in swept:
        found = [row for row in rows.values() if row["settings"]["purpose"] == purpose]
        if not found:
            continue
        first = found[0]["settings"]
        sizes = sorted({row["settings"][across] for row in found})
        by = {(row["settings"]["contestant"], row["settings"][across]): row for row in found}
        symbol = "V" if fixed == "vocabulary" else "N"
        where = f"{first['loss']}, {first['dtype']}, {first['distribution']} inputs, D = {first['hidden']}"
        lines += [f"### {where}, {symbol} = {first[fixed]:,}: {what}", ""]
        lines += [f"| | {' | '.join(f'{size:,}' for size in sizes)} |", "|---" * (len(sizes) + 1) + "|"]
        for name in SWEPT:
            cells = [_swept(by.get((name, size)), purpose) for size in sizes]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _swept(row: Row | None, purpose: str) -> str:
    if row is None or "reason" in row:
        return "–" if row is None else row["reason"]
    return _number(seconds(row) if purpose == TOKENS else row["peak_mib"])


def _by_inputs(found: dict[Cell, dict[str, Row]]) -> Iterator[tuple[str, list[tuple[Cell, dict[str, Row]]]]]:
    by: dict[str, list[tuple[Cell, dict[str, Row]]]] = {}
    for cell, members in found.items():
        where = f"{cell.distribution} inputs, N = {cell.tokens:,}, V = {cell.vocabulary:,}"
        by.setdefault(where, []).append((cell, members))
    yield from by.items()


def _line(cell: Cell, name: str, row: Row) -> str:
    errors = (_error(row.get(key)) for key in ("hidden_error", "weight_error", "token_error", "largest_token_error"))
    alone = "" if row.get("seconds") else "¹"
    cells = (
        cell.loss, cell.dtype, str(cell.hidden), name, _number(seconds(row)) + alone, _median(row, "products"),
        _median(row, "of_ours"), _number(row["peak_mib"]), *errors,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"
