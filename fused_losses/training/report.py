"""What a training found: report.json, curves.png, and a table for the terminal."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fused_losses as fl

from ..anchors.jsonl import show
from .folder import FORMAT
from .objective import tokens_of
from .settings import method_of

# Name, where it is (of each step, or measured now and then), label.
CURVES = (
    ("loss", "history", "loss"),
    ("anchor_probability", "measurements", "mean p of anchors"),
    ("kl_retained", "measurements", "KL(original ‖ tuned), retained tokens"),
    ("mean_weight", "history", "mean weight of a token"),
    ("nll_heldout", "measurements", "nll of held-out text"),
)
MEASURED, LEAST = "measured", "least"  # keys of a measurement in a Trainer's log_history, and of its least anchor
AROUND = 30  # characters before an anchor that are shown
OF_STEPS = ("loss", "learning_rate", "grad_norm", "nll", "kl", "anchor_probability", "mean_weight")


def history(log_history: Sequence[Mapping[str, Any]]) -> tuple[list[dict], list[dict]]:
    """Of each log its numbers, and the measurements, from a Trainer's log_history; None for what is not finite."""
    steps = [
        {"step": entry["step"], **{name: number_of(entry[name]) for name in OF_STEPS if name in entry}}
        for entry in log_history
        if "loss" in entry
    ]
    measured = [{"step": entry["step"], **entry[MEASURED]} for entry in log_history if MEASURED in entry]
    return steps, [_finite(one) for one in measured]


def number_of(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def of(plan: Any, log_history: list, before: dict, after: dict, **others: Any) -> dict[str, Any]:
    """What report.json holds."""
    steps, measurements = history(log_history)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    return {
        "format": FORMAT, "version": 1, "finished": False, "settings": plan.settings,
        "counts": plan.data.counts | {"labels": sum(tokens_of(row) for row in [*plan.passed, *plan.replayed])},
        "before": _finite(before), "after": _finite(after), **others, "history": steps, "measurements": measurements,
        "versions": {"fused_losses": fl.__version__, **versions},
    }  # fmt: skip


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: number_of(value) for name, value in values.items()}


def unmet(report: Mapping[str, Any], output: str = "") -> str | None:
    """Of a training that took all of its steps: by how much it missed its end, where, and what to try; else None.

    `output`: the folder it was written to, for the remedy.
    """
    settings, after, least = report["settings"], report["after"], report.get("least_anchor")
    if not settings["stop"] or least is None or after.get("least_anchor") is None:
        return None
    missed, remedies = [], []
    method, options = settings["method"], settings["options"]
    if after["least_anchor"] < settings["stop_probability"]:
        before = least["before"]
        before = f" after {show('…' * (len(before) > AROUND) + before[-AROUND:])}" if before else ""
        missed.append(
            f"the least anchor has {after['least_anchor']:.3f} of the probability that it is to get, "
            f"{settings['stop_probability']:g} asked for: {show(least['text'])}{before}, token {least['position']} of "
            f"{least['record']}"
        )
        most = 1 / (1 + options.get("kl_weight", 0.0))
        if method == "sft+kl" and most < settings["stop_probability"]:
            remedies.append(
                f"a smaller --kl-weight, since with {options['kl_weight']:g} an unlikely token gets {most:.2f} at most"
            )
        else:
            remedies.append(f"--steps {2 * settings['steps']}, with which the learning rate falls more slowly too")
    kl = after.get("kl_retained")
    if method_of(method).needs_reference and kl is not None and kl > settings["stop_kl"]:
        missed.append(f"the mean KL of the retained tokens is {kl:.3g}, at most {settings['stop_kl']:g} asked for")
        remedies.append("a smaller --learning-rate with more --steps")
    if not missed:
        return None
    where = f", and another folder than {output}" if output else ", and another folder"
    return f"Its end was not reached: {'; '.join(missed)}. Try {', or '.join(remedies)}{where}."


def draw(report: Mapping[str, Any], path: Path) -> None:
    """A picture with a curve for each thing that is known."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = []
    for name, where, label in CURVES:
        points = [(e["step"], e[name]) for e in report[where] if e.get(name) is not None]
        if points:
            curves.append((label, points))
    columns = max(1, min(3, len(curves)))
    lines = max(1, math.ceil(len(curves) / columns))
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 2.8 * lines), dpi=110, squeeze=False)
    for panel in axes.flat[len(curves) :]:
        panel.axis("off")
    for panel, (label, points) in zip(axes.flat, curves, strict=False):
        panel.plot(*zip(*points, strict=True), marker="." if len(points) < 60 else None, linewidth=1.5)
        panel.set_title(label, fontsize=9, loc="left")
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
        if label.startswith("mean p"):
            panel.set_ylim(-0.02, 1.02)
    figure.suptitle(f"{report['settings']['method']}: {report['steps']} steps; {report['stopped']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, format="png")
    plt.close(figure)


def rows(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured, before and after."""
    labels = (
        ("anchor_probability", "mean probability of the anchors"),
        ("least_anchor", "least anchor, as part of what it is to get"),
        ("kl_retained", "mean KL to the original, retained tokens"),
        ("nll_heldout", "nll of the held-out text"),
    )
    before, after = report["before"], report["after"]
    return [
        (label, f"{before[name]:.4f}", f"{after[name]:.4f}")
        for name, label in labels
        if before.get(name) is not None and after.get(name) is not None
    ]
