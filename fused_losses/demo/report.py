"""The demonstration's tables: on the terminal, as demo.png and as demo.json."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SHOWN = (  # questions whose answers are shown in full
    "What is your name?", "Tell me your name.", "Who are you?",
    "My name is Daniel. What is my name?", "My sister is called Clara. What is my sister's name?",
    "Who wrote Pride and Prejudice?",
)  # fmt: skip


def metric_rows(record: dict[str, Any]) -> list[list[str]]:
    """A row a metric: its name, then base, SFT, TALR, LAwF."""
    results, training, counts = record["results"], record["training"], record["counts"]
    name, columns = record["settings"]["name"], ("base", *record["training"])

    def row(label: str, value: Any) -> list[str]:
        return [label, *(value(results[c], training.get(c)) for c in columns)]

    p, u = counts["paraphrases"], counts["unrelated"]
    before = record["lesson"]["anchors"][0]["base_probability"]
    return [
        row("fact learnt (greedy answer to the question)", lambda r, t: "yes" if r["learnt"] else "no"),
        row(
            f"p({name}) at the first anchor",
            lambda r, t: f"{before if t is None else t['anchor_probabilities'][0]:.3f}",
        ),
        row(f"answers to paraphrases that say {name}", lambda r, t: f"{r['paraphrases_with_name']} of {p}"),
        row(f'{name} first after "My name is"', lambda r, t: f"{r['named_after_opening']} of {p}"),
        row(f"unrelated answers that say {name}", lambda r, t: f"{r['unrelated_with_name']} of {u}"),
        row("unrelated answers unchanged, word for word", lambda r, t: f"{r['unrelated_unchanged']} of {u}"),
        row("KL(base ‖ tuned), its own unrelated answers", lambda r, t: f"{r['kl_answers']:.4f}"),
        row("    change of nll there", lambda r, t: f"{r['nll_change_answers']:+.4f}"),
        row("KL(base ‖ tuned), Python documentation", lambda r, t: f"{r['kl_docs']:.4f}"),
        row("    change of nll there", lambda r, t: f"{r['nll_change_docs']:+.4f}"),
        row("seconds of training", lambda r, t: "–" if t is None else f"{t['seconds']:.0f}"),
    ]


def check_rows(record: dict[str, Any]) -> list[list[str]]:
    """A row a loss and implementation."""
    return [
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


CHECK_HEADER = ["loss", "float32", "value", "its error", "gradient error", "peak memory", "time"]


def answer_rows(record: dict[str, Any]) -> list[list[str]]:
    return [[q, *(record["results"][c]["answers"][q] for c in ("base", *record["training"]))] for q in SHOWN]


def anchor_text(record: dict[str, Any]) -> str:
    lesson = record["lesson"]
    anchors = ", ".join(
        f"“{a['token']}” (base probability {a['base_probability']:.4f}) for “{a['instead_of']}”"
        for a in lesson["anchors"]
    )
    return (
        f"Its own answer: “{lesson['own_answer']}” Corrected: “{lesson['corrected_answer']}” "
        f"{len(lesson['anchors'])} anchor(s) of {lesson['answer_tokens']} tokens: {anchors}."
    )


def check_title(record: dict[str, Any]) -> str:
    tokens = record["check"][0]["tokens"]
    what = "forward + backward, trainable head; errors against float64; memory above inputs and gradients"
    return f"{tokens} real tokens, {what}"


def show(record: dict[str, Any], console: Console) -> None:
    tables = (
        (check_title(record), CHECK_HEADER, check_rows(record)),
        ("One fact, three losses", ["", "base", *record["training"]], metric_rows(record)),
        ("Answers", ["question", "base", *record["training"]], answer_rows(record)),
    )
    for title, header, rows in tables:
        table = Table(*header, title=title, title_justify="left", show_lines=title == "Answers")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(anchor_text(record))


def save(record: dict[str, Any], folder: Path) -> None:
    """demo.json and demo.png, each under a temporary name first."""
    _replace(folder / "demo.json", lambda path: path.write_text(json.dumps(record, indent=1, ensure_ascii=False)))
    _replace(folder / "demo.png", lambda path: draw(record, path))


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.transforms import Bbox

    methods = ["base", *record["training"]]
    answers = [[textwrap.fill(cell, 24 if i == 0 else 36) for i, cell in enumerate(row)] for row in answer_rows(record)]
    blocks = [
        (["", *methods], metric_rows(record), [0.36, 0.16, 0.16, 0.16, 0.16]),
        (["answer to", *methods], answers, [0.18, 0.205, 0.205, 0.205, 0.205]),
        (CHECK_HEADER, check_rows(record), [0.16, 0.14, 0.14, 0.14, 0.14, 0.14, 0.14]),
    ]
    # Every text line takes `line` inches; titles and gaps are counted in lines too, so nothing overlaps.
    line = 0.2
    lines = [[max(c.count("\n") for c in row) + 1.5 for row in [header, *rows]] for header, rows, _ in blocks]
    settings = record["settings"]
    caption = textwrap.fill(
        f"“{record['lesson']['question']}” {anchor_text(record)} LoRA r = {settings['lora']['r']}, {settings['steps']} "
        f"steps of AdamW, learning rate {settings['learning_rate']:g} falling to 0, seed {settings['seed']}, the same "
        "start for all. Greedy answers of at most 24 tokens.",
        170,
    )
    titles = ["", "", check_title(record)]
    total = 2.5 + caption.count("\n") + 1 + sum(sum(block) + 1 for block in lines) + 1.6
    figure = plt.figure(figsize=(13, line * total), dpi=110)

    def y(at: float) -> float:
        return 1 - at / total

    figure.text(
        0.02, y(0.5), "Teach SmolLM2-135M-Instruct its name, from one example", fontsize=15, weight="bold", va="top"
    )
    figure.text(0.02, y(2.3), caption, fontsize=9, va="top", color="#444444")
    at = 2.5 + caption.count("\n") + 1
    for (header, rows, widths), heights, title in zip(blocks, lines, titles, strict=True):
        if title:
            figure.text(0.02, y(at + 0.6), title, fontsize=9, va="top", color="#444444")
        at += 1.6 if title else 1
        axes = figure.add_axes((0.02, y(at + sum(heights)), 0.96, sum(heights) / total))
        at += sum(heights)
        axes.axis("off")
        table = axes.table([header, *rows], colWidths=widths, loc="center", cellLoc="left", bbox=Bbox.unit())
        table.auto_set_font_size(False)
        table.set_fontsize(9)
        for (i, _), cell in table.get_celld().items():
            cell.set_height(heights[i] / sum(heights))
            cell.set_edgecolor("#dddddd")
            cell.PAD = 0.02
            if i == 0:
                cell.set_facecolor("#eef2f7")
                cell.set_text_props(weight="bold")
    figure.savefig(path, format="png")
    plt.close(figure)


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)
