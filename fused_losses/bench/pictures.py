"""The pictures of a run: the decision, and how time and memory grow."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import report
from .ours import OURS
from .plan import SWEPT, TOKENS, VOCABULARY
from .store import Row, seconds

MARKERS = "osD^v<>phX*P"
STYLES = ("-", "--", ":", "-.")


def draw(rows: Mapping[str, Row], folder: Path) -> list[Path]:
    """Those of which there are rows; returns their files."""
    groups = {cell: members for cell, members in report.groups(rows).items() if len(report.present(members)) > 1}
    found = []
    if groups:
        cell, members = next(iter(groups.items()))
        found.append(_decision(cell, report.present(members), folder / "decision.png"))
    for purpose, name, draw_one in ((TOKENS, "tokens.png", _time), (VOCABULARY, "vocabulary.png", _memory)):
        swept = [row for row in rows.values() if row["settings"]["purpose"] == purpose and "reason" not in row]
        if swept:
            found.append(draw_one(swept, folder / name))
    return found


def _decision(cell: Any, some: Mapping[str, report.Figures], path: Path) -> Path:
    """Time against memory; the error as grey."""
    from matplotlib.colors import LogNorm

    figure, axes = _axes((8, 5.2))
    errors = [max(each.error, 1e-9) for each in some.values()]
    norm = LogNorm(min(errors) / 2, max(errors) * 2)
    for marker, (name, each) in zip(MARKERS * 3, some.items(), strict=False):
        drawn = axes.scatter(
            each.seconds, report.counted(each.peak_mib or 0.0), s=130, marker=marker, c=[max(each.error, 1e-9)],
            cmap="Greys", norm=norm, edgecolors="black", linewidths=2.2 if name.startswith(OURS) else 0.8, label=name,
            zorder=3,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="time of forward and backward, s (best: left)")
    axes.set_ylabel("peak memory above inputs and gradients, MiB, at least 1")
    _log_room(axes)
    figure.colorbar(drawn, ax=axes, label="relative error of gradients against float64")
    axes.legend(fontsize=8, loc="best", framealpha=0.9)
    where = (
        f"{cell.loss}, {cell.dtype}, {cell.distribution} inputs, N={cell.tokens}, D={cell.hidden}, V={cell.vocabulary}"
    )
    _title(axes, _message(some), f"{where}; thick edge: ours")
    return _save(figure, path)


def _message(some: Mapping[str, report.Figures]) -> str:
    ours = {name: each for name, each in some.items() if name.startswith(OURS)}
    eager = some.get(report.EAGER)
    if not ours or eager is None:
        return "Time and memory of each contestant"
    name, first = next(iter(ours.items()))  # the one that the answer is of
    text = f"{name.removeprefix(OURS)}: {_brief(eager.seconds / first.seconds)} times as fast as full logits"
    if first.peak_mib is not None and eager.peak_mib is not None:
        text += f", with {100 * report.counted(first.peak_mib) / report.counted(eager.peak_mib):.2g} % of the memory"
    return text


def _brief(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _time(rows: list[Row], path: Path) -> Path:
    figure, axes = _axes((6, 4))
    curves = _curves(axes, rows, "tokens", seconds)
    axes.set(xlabel="tokens N", ylabel="time of forward and backward, s")
    first = rows[0]["settings"]
    where = f"cross-entropy, {first['dtype']}, D={first['hidden']}, V={first['vocabulary']}; median of a few calls"
    _title(axes, _growth(curves, "as fast as full logits at N\u00a0="), where)
    return _save(figure, path)


def _memory(rows: list[Row], path: Path) -> Path:
    figure, axes = _axes((6, 4))
    curves = _curves(axes, rows, "vocabulary", lambda row: report.counted(row["peak_mib"] or 0.0))
    axes.set(xlabel="vocabulary V", ylabel="peak MiB above inputs and gradients")
    first = rows[0]["settings"]
    where = f"cross-entropy, {first['dtype']}, D={first['hidden']}, N={first['tokens']}"
    _title(axes, _growth(curves, "less memory than full logits at V\u00a0="), where)
    return _save(figure, path)


def _curves(axes: Any, rows: list[Row], across: str, value: Any) -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {}
    for name in SWEPT:
        points = {row["settings"][across]: value(row) for row in rows if row["settings"]["contestant"] == name}
        if points:
            curves[name] = dict(sorted(points.items()))
    for (name, points), marker, style in zip(curves.items(), MARKERS, STYLES, strict=False):
        colour = "black" if name.startswith(OURS) else "#777777"
        axes.plot(list(points), list(points.values()), style, marker=marker, color=colour, label=name)
    axes.set(xscale="log", yscale="log")  # before the ticks, which a scale takes back
    ticks = sorted({at for points in curves.values() for at in points})
    axes.set_xticks(ticks, [f"{at:,}" for at in ticks], fontsize=8)
    _plain(axes.yaxis)
    axes.minorticks_off()
    axes.legend(fontsize=8)
    return curves


def _growth(curves: dict[str, dict[int, float]], what: str) -> str:
    ours, eager = curves.get(SWEPT[0], {}), curves.get(report.EAGER, {})
    both = sorted(ours.keys() & eager.keys())
    if not both:
        return "Growth of each contestant"
    ratios = [eager[at] / ours[at] for at in (both[0], both[-1])]
    return f"{_brief(ratios[0])} and {_brief(ratios[1])} times {what}\u00a0{both[0]:,} and {both[-1]:,}"


# --- what they share


def _axes(size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=size, dpi=120, facecolor="white")
    axes.grid(which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _log_room(axes: Any) -> None:
    """Room for the legend and whole marks; plain numbers."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.set(xlim=(left / 1.5, right * 1.5), ylim=(bottom / 1.5, top * 1.5))
    for axis in (axes.xaxis, axes.yaxis):
        _plain(axis)


def _plain(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _title(axes: Any, message: str, where: str) -> None:
    lines = textwrap.wrap(message, int(8.5 * axes.figure.get_size_inches()[0]))
    axes.set_title("\n".join([*lines, ""]), fontsize=12, weight="bold", loc="left")
    axes.text(0, 1.02, where, transform=axes.transAxes, fontsize=8, color="#444444")


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, format="png")
    plt.close(figure)
    return path
