"""The pictures of docs/forgetting.md; each title says what its picture shows, in figures of the results."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .methods import LARGE, LORA_FACTOR, METHODS, MIDDLE, SMALL, WISE_TITLE
from .results import Study, interval, rate_text

MARKERS = dict(zip(METHODS, (*"osDP^v<>Xdph", "$I$", "*"), strict=True))
GREYS = ("black", "0.55")
GAIN, LOSS = "domain gain (nats per token)", "general loss (nats per token)"


def draw(study: Study, folder: Path) -> list[str]:
    """Writes what there are runs for; the names of the files."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Any, Study], bool]] = {
        "headline": headline, "pareto": pareto, "equal_gain": equal_gain, "tokens": tokens, "curriculum": curriculum,
        "steps": steps, "label": label_only,
    }  # fmt: skip
    return [name for name, picture in pictures.items() if _saved(folder / f"{name}.png", picture, study)]


def _saved(path: Path, picture: Callable[[Any, Study], bool], study: Study) -> bool:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    try:
        if not picture(axes, study):
            return False
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=130)
        return True
    finally:
        plt.close(figure)


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other beats in both: more gain and less loss."""
    best: list[tuple[float, float]] = []
    for gain, loss in sorted(points, key=lambda p: (-p[0], p[1])):
        if not best or loss < best[-1][1]:
            best.append((gain, loss))
    return best[::-1]


def wise_points(study: Study) -> list[tuple[float, float]]:
    return [
        (study.gain(run, after=after), study.loss(run, after=after))
        for run in study.of("sft")
        for after in run["wise"].values()
    ]


def with_seeds(study: Study) -> list[tuple[str, float, list[tuple[float, float]]]]:
    """Method, rate, and (gain, loss) of each seed, of all that have at least three."""
    found = []
    for name in METHODS:
        for rate in sorted({run["rate"] for run in study.of(name)}):
            runs = study.of(name, rate)
            if len(runs) >= 3:
                found.append((name, rate, [(study.gain(run), study.loss(run)) for run in runs]))
    return found


def headline(axes: Any, study: Study) -> bool:
    """Means with 95 % intervals, over rates; a dot is one seed."""
    shown = with_seeds(study)
    if len(shown) < 2:
        return False
    for name in dict.fromkeys(method for method, _, _ in shown):
        of_it = [(rate, points) for method, rate, points in shown if method == name]
        means = [[statistics.fmean(values) for values in zip(*points, strict=True)] for _, points in of_it]
        halves = [[_half(values) for values in zip(*points, strict=True)] for _, points in of_it]
        face = {"sft": "black", "talr": "0.6"}.get(name, "white")
        gains, losses = zip(*means, strict=True)
        across, along = zip(*halves, strict=True)
        axes.errorbar(gains, losses, along, across, fmt=MARKERS[name], linestyle="-" if len(means) > 1 else "none",
                      color="0.35", linewidth=0.8, elinewidth=0.6, capsize=2, markersize=7, markerfacecolor=face,
                      markeredgecolor="black", label=METHODS[name].title, zorder=3)  # fmt: skip
        dots = [point for _, points in of_it for point in points]
        axes.scatter(*zip(*dots, strict=True), s=4, color="black", zorder=4)
        if name in ("sft", "talr") or len(of_it) == 1:  # the others' rates are SFT's
            side, place = ("right", (-9, 6)) if name == "talr" else ("left", (9, 6) if name == "sft" else (9, -12))
            for (rate, _), mean in zip(of_it, means, strict=True):
                axes.annotate(rate_text(rate), mean, place, textcoords="offset points", fontsize=8, ha=side)
    _loss_scale(axes, [loss for _, _, points in shown for _, loss in points])
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_title(_small_and_large(study), fontsize=10, loc="left")
    return True


def _half(values: tuple[float, ...]) -> float:
    found = interval(values)
    return 0.0 if found is None else (found[1] - found[0]) / 2


def _loss_scale(axes: Any, losses: list[float]) -> None:
    """Linear to 0.1, then logarithmic: most methods lose less than that at the small rate."""
    axes.set_yscale("symlog", linthresh=0.1)
    ticks = (-0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(min(losses) - 0.02, 1.2 * max(losses) + 0.02)
    axes.set_xlabel(GAIN)
    axes.set_ylabel(LOSS)


def front_titles(study: Study) -> list[str]:
    """The methods that have a run on the Pareto front."""
    points = [((study.gain(run), study.loss(run)), METHODS[run["method"]].title) for run in study.of_reasoning()]
    points += [(point, WISE_TITLE) for point in wise_points(study)]
    best = set(front([point for point, _ in points]))
    return list(dict.fromkeys(title for point, title in sorted(points) if point in best))


def pareto(axes: Any, study: Study) -> bool:
    everything: list[tuple[float, float]] = []
    rates: dict[tuple[float, float], str] = {}
    for name, method in METHODS.items():
        runs = study.of(name)
        points = [(study.gain(run), study.loss(run)) for run in runs]
        everything += points
        rates |= {point: rate_text(run["rate"]) for point, run in zip(points, runs, strict=True)}
        if points:
            face = "black" if name == "sft" else "0.6" if name == "talr" else "white"
            axes.scatter(*zip(*points, strict=True), marker=MARKERS[name], s=40, facecolor=face, edgecolor="black",
                         label=method.title, zorder=3)  # fmt: skip
    if wise := wise_points(study):
        everything += wise
        axes.scatter(*zip(*wise, strict=True), marker="+", color="black", s=50, label=WISE_TITLE, zorder=3)
    if len(everything) < 2:
        return False
    best = front(everything)
    axes.plot(*zip(*best, strict=True), color="0.5", linewidth=1, label="Pareto front, rates")
    for before, at in zip([None, *best], best, strict=False):
        if at in rates and rates[at] != rates.get(before):  # Wise-FT's are of weights between two models
            axes.annotate(rates[at], at, xytext=(6, -4), textcoords="offset points", fontsize=6)
    _loss_scale(axes, [loss for _, loss in everything])
    axes.legend(fontsize=7, ncols=2, frameon=False, loc="center left", bbox_to_anchor=(1.05, 0.5))
    names = ", ".join(front_titles(study))
    axes.set_title(f"No run beats these in gain and loss at once: {names}", fontsize=9, loc="left")
    return True


def _small_and_large(study: Study) -> str:
    ends = [_mean([(study.gain(r), study.loss(r)) for r in study.of("sft", rate)]) for rate in (SMALL, LARGE)]
    if None in ends:
        return "What each run gained, and what it lost"
    (g0, l0), (g1, l1) = ends
    small, large = rate_text(SMALL), rate_text(LARGE)
    return f"SFT at {small} gains {g0:.2f} nats and loses {l0:.2f}; at {large} it gains {g1:.2f} and loses {l1:.2f}"


def _mean(pairs: list[tuple[float, float]]) -> tuple[float, float] | None:
    if not pairs:
        return None
    return statistics.fmean(p[0] for p in pairs), statistics.fmean(p[1] for p in pairs)


def common_gain(study: Study) -> float | None:
    """0.9 of the most that SFT of seed 0 gained: below it methods lose too little to be told apart."""
    gains = [study.gain(run) for run in study.of("sft") if run["seed"] == 0]
    return 0.9 * max(gains) if gains else None


def loss_at_common_rates(study: Study, name: str, gain: float) -> float | None:
    """Along the three rates that every method has, of seed 0: between few points a straight line says too much."""
    factor = LORA_FACTOR if METHODS[name].lora else 1
    return study.loss_at_gain(name, gain, 0, rates=[rate * factor for rate in (SMALL, MIDDLE, LARGE)])


def equal_gain(axes: Any, study: Study) -> bool:
    level = common_gain(study)
    if level is None:
        return False
    found = {METHODS[name].title: loss_at_common_rates(study, name, level) for name in METHODS}
    there = sorted([(loss, title) for title, loss in found.items() if loss is not None])
    if len(there) < 2:
        return False
    axes.barh([title for _, title in there], [loss for loss, _ in there], color="0.6", edgecolor="black")
    for i, (loss, _) in enumerate(there):
        axes.text(loss, i, f" {loss:.3f}", va="center", fontsize=8)
    axes.set_xlabel(f"{LOSS} where the domain gain is {level:.2f} nats per token, seed 0{_how_exact(study, level)}")
    axes.set_title(_at_equal_gain(there), fontsize=10, loc="left")
    return True


def _how_exact(study: Study, level: float) -> str:
    """What a difference between bars has to be above: SFT along all of its rates, and its seeds."""
    nearer = study.loss_at_gain("sft", level, 0)
    several = interval([study.loss(run) for run in study.of("sft", SMALL)])
    said = ["bars: straight lines between three rates"]
    said += [] if nearer is None else [f"SFT along all of its rates: {nearer:.3f}"]
    said += [] if several is None else [f"SFT's seeds at {rate_text(SMALL)}: ± {(several[1] - several[0]) / 2:.3f}"]
    return "".join(f"\n{each}" for each in said)


def _at_equal_gain(there: list[tuple[float, str]]) -> str:
    titles = {title: loss for loss, title in there}
    own = METHODS["sft"].title
    (low, least), (high, most) = there[0], there[-1]
    middle = f", {own} {titles[own]:.2f}" if own in titles and own not in (least, most) else ""
    return f"At the same domain gain {least} loses {low:.2f} nats per token{middle}, {most} {high:.2f}"


def tokens(axes: Any, study: Study) -> bool:
    titles = {"reasoning": "-", "label": "--", "facts": ":", "docs": "-."}
    said = []
    for domain, style in titles.items():
        runs = [run for run in study.runs if run["domain"] == domain and run["seed"] == 0]
        if not runs:
            continue
        before = runs[0]["before"]
        counts = [n / before["tokens"] for n in before["histogram"]]
        axes.stairs(counts, [i / len(counts) for i in range(len(counts) + 1)], linestyle=style, color="black",
                    label=domain, linewidth=1.4)  # fmt: skip
        said.append(f"{before['hard']:.0%} in {domain}")
    axes.set_xlabel("probability of the label before training")
    axes.set_ylabel("share of the training tokens")
    axes.legend(frameon=False)
    axes.set_title(f"Hard tokens (p < 0.1): {', '.join(said)}", fontsize=10, loc="left")
    return bool(said)


def curriculum(axes: Any, study: Study) -> bool:
    styles = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))
    shown = [name for name in ("talr", "dft", "infosft", "flow", "eaft", "stm") if study.of(name, LARGE)]
    for name, style in zip(shown, styles, strict=False):
        run = study.of(name, LARGE)[0]
        weights = run["curves"]["weight_hard"]
        steps = [(i + 0.5) / len(weights) * 100 for i in range(len(weights))]
        axes.plot(steps, weights, linestyle=style, color="black", label=METHODS[name].title)
    if "talr" not in shown:
        return False
    weights = study.of("talr", LARGE)[0]["curves"]["weight_hard"]
    axes.axhline(1.0, color="0.6", linewidth=1)
    axes.text(100, 1.0, "SFT", ha="right", va="bottom", fontsize=8)
    axes.set_xlabel("steps done (%)")
    axes.set_ylabel("mean weight of tokens hard at the start")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_title(
        f"TALR's weight of hard tokens goes from {weights[0]:.2f} to {weights[-1]:.2f} at {rate_text(LARGE)}",
        fontsize=10,
        loc="left",
    )
    return True


def steps(axes: Any, study: Study) -> bool:
    ends = {}
    for method, colour in zip(("sft", "talr"), GREYS, strict=True):
        for rate, style in ((SMALL, "--"), (LARGE, "-")):
            if not (runs := study.of(method, rate)):
                continue
            nll = runs[0]["curves"]["nll"]
            axes.plot([(i + 0.5) / len(nll) * 100 for i in range(len(nll))], nll, style, color=colour,
                      label=f"{METHODS[method].title}, {rate_text(rate)}")  # fmt: skip
            ends[method, rate] = nll[-1]
    if not {("sft", LARGE), ("talr", LARGE)} <= ends.keys():
        return False
    axes.set_ylim(bottom=0)
    axes.set_xlabel("steps done (%)")
    axes.set_ylabel("nll of the rows of a step (nats per token)")
    axes.legend(frameon=False)
    said = f"{ends['sft', LARGE]:.2f} with SFT and {ends['talr', LARGE]:.2f} with TALR"
    axes.set_title(f"At {rate_text(LARGE)} the last rows have {said} nats per token", fontsize=10, loc="left")
    return True


def label_only(axes: Any, study: Study) -> bool:
    named, ends = {"reasoning": "with reasoning", "label": "labels alone"}, []
    for domain, style in (("reasoning", "-"), ("label", "--")):
        for method, colour in zip(("sft", "talr"), GREYS, strict=True):
            runs = [run for run in study.of(method, domain=domain) if run["seed"] == 0]
            points = sorted((run["rate"], study.loss(run)) for run in runs)
            if not points:
                continue
            axes.plot(*zip(*points, strict=True), style, color=colour, marker=MARKERS[method],
                      label=f"{METHODS[method].title}, {named[domain]}")  # fmt: skip
            if method == "sft":
                ends.append(points[-1][1])
    if len(ends) < 2:
        return False
    axes.set_xscale("log")
    axes.set_xlabel("learning rate at the start, seed 0")
    axes.set_ylabel(LOSS)
    axes.legend(frameon=False)
    axes.set_title(
        f"SFT at {rate_text(LARGE)} loses {ends[0]:.2f} nats with reasoning, {ends[1]:.2f} with labels alone",
        fontsize=10,
        loc="left",
    )
    return True
