"""The demonstration's tables and its picture: on the terminal, as demo.json, demo.md and demo.png."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checking.intervals import Estimate, mean
from .trial import write_json

# Label, colour (distinct for colour-blind people, after Okabe and Ito) and marker.
METHODS = {
    "sft": ("SFT", "#D55E00", "s"), "sft+kl": ("SFT + KL", "#E69F00", "D"), "talr": ("TALR", "#56B4E9", "^"),
    "lawf": ("LAwF", "#0072B2", "o"),
}  # fmt: skip
SHOWN = {"corrected": 1, "paraphrase": 2, "reverse": 1, "unrelated": 2}  # answers that are kept, of each kind

Table = tuple[str, list[str], list[list[str]]]
Trial = Mapping[str, Any]


def brief(result: Trial, answers_too: bool = True) -> dict[str, Any]:
    """What demo.json keeps of a trial: all numbers, and some of the answers."""
    left, answers = dict(SHOWN), []
    for answer in result["answers"]:
        if answers_too and left[answer["kind"]]:
            left[answer["kind"]] -= 1
            answers.append({name: answer[name] for name in ("kind", "prompt", "original", "tuned")})
    training = {name: value for name, value in result["training"].items() if name != "measurements"}
    leaks = [{name: leak[name] for name in ("answers", "original", "tuned", "new")} for leak in result["leaks"]]
    kept = {name: result[name] for name in ("fact", "method", "seed", "metrics")}
    return kept | {"training": training, "leaks": leaks, "answers": answers}


# --- tables


def methods_of(record: Mapping[str, Any]) -> list[str]:
    there = {trial["method"] for trial in record["trials"]}
    return [method for method in METHODS if method in there]


def _metric(key: str, column: str = "tuned") -> Callable[[Trial], float | None]:
    return lambda trial: trial["metrics"][key][column] if trial["metrics"][key] else None


def _of(trial: Trial, name: str) -> Any:
    return trial["training"][name]


def _over(trials: Sequence[Trial], value: Callable[[Trial], float | None]) -> Estimate | None:
    """The mean over trainings, with a bootstrap's interval over them where there are several."""
    values = [found for found in map(value, trials) if found is not None]
    return mean(values, enough=2)


def _cell(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return "–"
    if estimate.low is None:
        return format(estimate.value, form)
    low, high = (format(x, form) for x in (estimate.low, estimate.high))
    return f"{format(estimate.value, form)} ({low} to {high})"


ROWS = (  # label, key of the check's metric, format
    ("probability of the anchors", "probability", ".3f"),
    ("the question: answers that say it", "corrected_answers", ".0%"),
    ("paraphrases: anchors ranked first", "paraphrase_recall", ".0%"),
    ("paraphrases: answers that say it", "paraphrase_answers", ".0%"),
    ("reverse questions: answers that say it", "reverse_answers", ".0%"),
    ("KL on general prompts, nats per token", "kl", ".4f"),
    ("general prompts above 0.1", "kl_above_0.1", ".0%"),
    ("general answers unchanged, word for word", "unchanged", ".0%"),
    ("KL on near questions", "kl_unrelated", ".4f"),
    ("ΔL on general text, nats per token", "code_length_change", "+.4f"),
    ("answers that say it where it does not belong", "contamination", ".1%"),
)


def summary(record: Mapping[str, Any]) -> Table:
    """A row a number, a column a method: means over facts and seeds."""
    methods, trials = methods_of(record), record["trials"]
    by = {method: [t for t in trials if t["method"] == method] for method in methods}

    def row(label: str, original: str, cell: Callable[[list[Trial]], str]) -> list[str]:
        return [label, original, *(cell(by[method]) for method in methods)]

    p = record["settings"]["probability"]
    rows = [
        row(
            f"trainings that reached {p:g}", "–", lambda ts: f"{sum(t['training']['reached'] for t in ts)} of {len(ts)}"
        ),
        row("steps", "–", lambda ts: f"{_over(ts, lambda t: t['training']['steps']).value:.0f}"),
    ]
    for label, key, form in ROWS:
        known = any(t["metrics"][key]["original"] is not None for t in trials)
        before = _over(trials, _metric(key, "original")) if known else None
        original = "–" if before is None else format(before.value, form)
        rows.append(row(label, original, _mean_of(key, form)))
    rows.append(
        row("seconds of training", "–", lambda ts: f"{_over(ts, lambda t: t['training']['seconds']).value:.0f}")
    )
    count = len(by[methods[0]])
    title = f"Each trained until its anchors had {p:g}: mean over {count} training{'s' if count > 1 else ''} of each"
    return (title + (" (95% interval)" if count > 1 else ""), ["", "original", *map(_label, methods)], rows)


def _mean_of(key: str, form: str) -> Callable[[list[Trial]], str]:
    return lambda trials: _cell(_over(trials, _metric(key)), form)


def by_fact(record: Mapping[str, Any]) -> Table:
    """A row a fact and method: means over seeds."""
    rows = []
    for name, lesson in record["lessons"].items():
        for method in methods_of(record):
            some = [t for t in record["trials"] if (t["fact"], t["method"]) == (name, method)]
            if not some:
                continue

            def over(value: Callable[[Trial], float | None], form: str, some: list = some) -> str:
                found = _over(some, value)
                return "–" if found is None else format(found.value, form)

            rows.append([
                lesson["title"], _label(method), over(lambda t: t["training"]["steps"], ".0f"),
                over(lambda t: t["training"]["least_anchor"], ".2f"), over(_metric("paraphrase_answers"), ".0%"),
                over(_metric("reverse_answers"), ".0%"), over(_metric("kl"), ".4f"),
                over(_metric("kl_unrelated"), ".3f"), over(_metric("code_length_change"), "+.4f"),
                over(lambda t: sum(len(leak["new"]) for leak in t["leaks"]), ".1f"),
            ])  # fmt: skip
    header = ["fact", "method", "steps", "least anchor", "paraphrases", "reverse", "KL", "KL near", "ΔL", "new leaks"]
    return "By fact, means over seeds", header, rows


def answers(record: Mapping[str, Any]) -> Table:
    """What was answered after the first seed of each fact."""
    methods = methods_of(record)
    first = min(t["seed"] for t in record["trials"])
    rows = []
    for name in record["lessons"]:
        by = {t["method"]: t["answers"] for t in record["trials"] if (t["fact"], t["seed"]) == (name, first)}
        for at, answer in enumerate(by[methods[0]]):
            said = [_short(by[method][at]["tuned"]) for method in methods]
            rows.append([answer["prompt"], _short(answer["original"]), *said])
    return f"Answers, seed {first}", ["question", "original", *map(_label, methods)], rows


CHECK_HEADER = ["loss", "float32", "value", "its error", "gradient error", "peak memory", "time"]


def losses(record: Mapping[str, Any]) -> Table:
    """A row a loss and implementation."""
    rows = [
        [
            row["loss"] if name == "full" else "",
            "full logits" if name == "full" else "fused",
            f"{row[name]['value']:.6f}",
            f"{row[name]['value_error']:.0e}",
            f"{row[name]['gradient_error']:.0e}",
            f"{row[name]['peak_mib']:.0f} MiB",
            f"{row[name]['seconds']:.2f} s",
        ]
        for row in record["check"]
        for name in ("full", "fused")
    ]
    what = "forward + backward, trainable head; errors against float64; memory above inputs and gradients"
    return f"{record['check'][0]['tokens']} real tokens, {what}", CHECK_HEADER, rows


def lessons(record: Mapping[str, Any]) -> Table:
    """What was corrected."""
    rows = []
    for lesson in record["lessons"].values():
        anchors = ", ".join(f"“{a['text']}” {a['probability']:.2g}" for a in lesson["anchors"])
        said = [_short(lesson[name], 100) for name in ("own_answer", "corrected_answer")]
        rows.append([lesson["question"], *said, anchors])
    return "What is taught", ["question", "its own answer", "corrected", "anchors, with their probability"], rows


def _label(method: str) -> str:
    return METHODS[method][0]


def _short(text: str, most: int = 90) -> str:
    text = " ".join(text.replace("<|im_end|>", "").split())
    return text if len(text) <= most else f"{text[:most].rstrip()} …"


def tables(record: Mapping[str, Any]) -> list[Table]:
    return [make(record) for make in (losses, lessons, summary, by_fact, answers)]


def markdown(record: Mapping[str, Any]) -> str:
    """All tables."""
    parts = []
    for title, header, rows in tables(record):
        lines = [header, ["---"] * len(header), *rows]
        parts.append("\n".join([f"{title}\n", *("| " + " | ".join(line) + " |" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def show(record: Mapping[str, Any], console: Any) -> None:
    from rich.table import Table as Shown

    for title, header, rows in tables(record):
        table = Shown(*header, title=title, title_justify="left", show_lines=title.startswith(("Answers", "What")))
        for row in rows:
            table.add_row(*row)
        console.print(table)


def save(record: Mapping[str, Any], folder: Path) -> None:
    """demo.json, demo.md and demo.png, each under a temporary name first."""
    write_json(folder / "demo.json", record)
    _replace(folder / "demo.md", lambda path: path.write_text(markdown(record), encoding="utf-8"))
    _replace(folder / "demo.png", lambda path: draw(record, path))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


# --- the picture


def draw(record: Mapping[str, Any], path: Path) -> None:
    """What was learnt, to the right, against what was forgotten, upwards: a small mark a training, a large one a
    method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=120, facecolor="white")
    axes.set_facecolor("white")
    means: list[tuple[float, float, str]] = []
    for method in methods_of(record):
        label, colour, marker = METHODS[method]
        some = [t for t in record["trials"] if t["method"] == method]
        points = [(100 * t["metrics"]["paraphrase_answers"]["tuned"], t["metrics"]["kl"]["tuned"]) for t in some]
        x, y = (sum(column) / len(points) for column in zip(*points, strict=True))
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=5, alpha=0.4, markeredgewidth=0)
        axes.plot(x, y, marker, color=colour, markersize=13, markeredgecolor="white", markeredgewidth=1.5, zorder=3)
        reached = sum(t["training"]["reached"] for t in some)
        short = len(some) - reached
        note = f"\n{short} of {len(some)} ended below {record['settings']['probability']:g}" if short else ""
        means.append((x, y, label + note))
    axes.set_yscale("log")
    _name(axes, means)
    axes.set_xlim(-4, 104)
    axes.set_xlabel("learnt: answers to paraphrased questions that say the fact, %", fontsize=11)
    axes.set_ylabel("forgotten: KL on general prompts, nats per token", fontsize=11)
    axes.grid(which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    facts, seeds = len(record["lessons"]), len({t["seed"] for t in record["trials"]})
    axes.set_title("One corrected answer teaches a fact: what else moves?\n", fontsize=13, weight="bold", loc="left")
    many = f"SmolLM2-135M, {facts} fact{'s' if facts > 1 else ''} × {seeds} seed{'s' if seeds > 1 else ''}"
    goal = f"each trained to p ≥ {record['settings']['probability']:g} of its anchors; best: down and right"
    axes.text(0, 1.02, f"{many}, {goal}", transform=axes.transAxes, fontsize=10, color="#444444")
    figure.tight_layout()
    figure.savefig(path, format="png")
    plt.close(figure)


def _name(axes: Any, means: list[tuple[float, float, str]]) -> None:
    """Labels to the right of their marks, one above the other where marks lie close together."""
    axes.figure.canvas.draw()
    taken: list[tuple[float, float]] = []
    for x, y, text in sorted(means, key=lambda mean: mean[1]):
        across, up = axes.transData.transform((x, y))
        near = [top for left, top in taken if abs(left - across) < 150]
        bottom = max([up - 8, *(top + 3 for top in near)])
        taken.append((across, bottom + 20 * (1 + text.count("\n"))))
        left = axes.transAxes.inverted().transform((across, up))[0] > 0.78
        axes.annotate(
            text, (x, y), textcoords="offset pixels", xytext=(-14 if left else 14, bottom - up), va="bottom",
            ha="right" if left else "left", color="#222222", fontsize=11, weight="bold", zorder=4,
        )  # fmt: skip
