"""The figures and tables of docs/method.md and docs/benchmarks.md, from the results kept in benchmarks/results."""

from __future__ import annotations

import json
import os

import texts
from sparse_accuracy import EDGES, accuracy_line, groups_line, int8_line
from sparse_speed import speed_line
from sparse_states import PICTURES, RESULTS


def figures() -> None:
    import matplotlib

    matplotlib.use("Agg")
    record = json.loads((RESULTS / "sparse-accuracy.json").read_text())
    error_figure(record)
    value_figure(record["rows"])
    time_figure(json.loads((RESULTS / "sparse-speed-cpu.json").read_text())["split"])
    training = RESULTS / "training.json"
    if training.is_file():
        training_figure(json.loads(training.read_text())["runs"])


def error_figure(record: dict) -> None:
    """Error of dx and dW, and what is certified of it, against entries kept."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 7.6), sharey=True, sharex=True)
    counts = {"0": "tab:gray", "8": "tab:green", "16": "tab:blue", "32": "tab:purple"}
    for row, kind in zip(axes, texts.TUNED, strict=True):
        points = [p for p in record["curve"] if p["text"] == kind]
        entries = [p["entries"] for p in points]
        default = next(i for i, p in enumerate(points) if p["threshold"] == record["threshold"])
        for axis, what, gradient in zip(row, (0, 1), ("dx", "dW"), strict=True):
            axis.plot(entries, [100 * p["dropped"][what] for p in points], ":", color="tab:red", label="tail dropped")
            for count, color in counts.items():
                if what == 1 and count not in ("0", "16"):  # directions are of no consequence for dW
                    continue
                found = [p["by directions"][count] for p in points]
                errors = [100 * f["errors"][what] for f in found]
                axis.plot(entries, errors, "o-", color=color, markersize=4, label=f"{count} directions")
                if count == "16":
                    axis.plot(entries[default], errors[default], "o", color=color, markersize=10)
                if count != "0":
                    axis.plot(entries, [100 * f["certified"][what] for f in found], "--", color=color,
                              label=f"{count} directions, certified")  # fmt: skip
            axis.set(xscale="log", yscale="log", title=f"{gradient}, {kind}")
            axis.set_xticks([25, 50, 100, 200, 400, 800], ["25", "50", "100", "200", "400", "800"])
            axis.set_yticks([0.03, 0.1, 0.3, 1, 3, 10], ["0.03", "0.1", "0.3", "1", "3", "10"])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        row[0].set_ylabel("relative L2 error, %")
    for axis in axes[1]:
        axis.set_xlabel("entries kept per token")
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, ncols=4, loc="upper center")
    _write(figure, "sparse-error.png", top=0.93)


def value_figure(rows: list[dict]) -> None:
    """Histograms of a token's error of the nll: 8-bit products, and bf16 logits."""
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row["text"] in texts.TUNED and "values" in row]
    figure, axes = plt.subplots(1, len(shown), figsize=(9, 3.4), sharey=True)
    styles = {"int8": ("tab:blue", "-"), "bf16 logits": ("tab:red", "--")}
    for axis, row in zip(axes, shown, strict=True):
        for name, (color, style) in styles.items():
            found = row["values"][name]
            share = [100 * count / row["N"] for count in found["histogram"]]
            axis.stairs(share, EDGES.tolist(), color=color, linestyle=style, linewidth=1.6,
                        label=f"{name}: mean {found['mean']:.2g}, largest {found['largest']:.2g}")  # fmt: skip
        axis.set(xscale="log", title=row["text"], xlabel="|error of the nll| of a token, nats")
        axis.legend(fontsize=8, loc="upper left")
        axis.set_ylim(0, 16)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% of tokens")
    _write(figure, "int8-error.png")


def time_figure(split: list[dict]) -> None:
    """Seconds of one call by part, beside those of the forward product."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4.4))
    labels = [f"D = {s['D']}, {s['dtype']}{', int8' if s['scan'] == 'int8' else ''}" for s in split]
    left = [0.0] * len(labels)
    colors = ("tab:gray", "tab:green", "tab:olive", "tab:blue", "tab:orange", "tab:red")
    for (part, _), color in zip(split[0]["parts"].items(), colors, strict=True):
        seconds = [s["parts"][part] for s in split]
        axis.barh(labels, seconds, left=left, label=part, color=color, edgecolor="white", linewidth=0.5)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    alone = [s["gemm_seconds"] for s in split]
    axis.plot(alone, labels, "k|", markersize=20, markeredgewidth=2, label="torch.mm of the forward alone")
    axis.set(xlabel="seconds of forward + backward, cross-entropy, N = 2048, V = 49,152")
    axis.invert_yaxis()
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, ncols=3, loc="upper center", markerscale=0.4)
    _write(figure, "sparse-time.png", top=0.82)


def training_figure(runs: dict) -> None:
    """Losses with exact and with sparse gradients, and their difference."""
    import matplotlib.pyplot as plt

    names = sorted({key.rsplit(" ", 1)[0] for key in runs}, reverse=True)
    figure, axes = plt.subplots(2, len(names), figsize=(3 * len(names), 4.6), sharex=True, squeeze=False)
    for column, name in enumerate(names):
        exact = runs[f"{name} exact"]["losses"]
        axes[0][column].plot(exact, color="black", label="exact")
        axes[0][column].set(title=name)
        for kind, color, style in (("sparse", "tab:red", "--"), ("int8", "tab:blue", ":")):
            if f"{name} {kind}" not in runs:
                continue
            losses = runs[f"{name} {kind}"]["losses"]
            axes[0][column].plot(losses, style, color=color, label="sparse" if kind == "sparse" else "sparse, int8")
            difference = [100 * abs(a - b) / abs(a) for a, b in zip(exact, losses, strict=True)]
            axes[1][column].plot(difference, style, color=color)
        axes[1][column].axhline(0.5, color="black", linewidth=1, linestyle=":")
        axes[1][column].set(xlabel="step", ylim=(0, 0.6))
    axes[0][0].set_ylabel("loss")
    axes[1][0].set_ylabel("difference of the losses, %")
    axes[1][0].text(0, 0.51, "0.5 %", fontsize=9)
    axes[0][0].legend()
    _write(figure, "sparse-training.png")


def tables() -> None:
    """The tables of docs/method.md and docs/benchmarks.md, from the committed results."""
    record = json.loads((RESULTS / "sparse-accuracy.json").read_text())
    print(
        "| text | loss | entries | L1 bound, % | certified | ours | ours, bf16 | tail dropped | plain bf16 | "
        "frozen head: entries, dx |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in record["rows"]:
        print(accuracy_line(row))
    print(
        "\n| text | loss | entries | dx / dW, % | full products | certified | nll, int8: mean / largest | "
        "nll, bf16 logits | measured |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in record["rows"]:
        print(int8_line(row))
    print("\n| distance | halves in the call | directions | L1 bound, % | certified, % | exact tokens | dx / dW, % |")
    print("|---|---|---|---|---|---|---|")
    for row in record["groups"]:
        print(groups_line(row))
    kinds = {kind: [r for r in record["rows"] if r["text"] == kind] for kind in texts.TUNED}
    for kind, rows in kinds.items():
        saved = ", ".join(f"{r['loss']} {r['saved_MB_per_8192']:.1f} MB" for r in rows)
        print(f"saved for backward, N = 8192, {kind}: {saved}")
    split = json.loads((RESULTS / "sparse-speed-cpu.json").read_text())
    print("\n| D | dtype | products | s | torch.mm, s |", " | ".join(split["split"][0]["parts"]), "|")
    print("|---|---|---|---|---|" + "---|" * len(split["split"][0]["parts"]))
    for row in split["split"]:
        parts = " | ".join(f"{100 * seconds / row['seconds']:.0f} %" for seconds in row["parts"].values())
        head = f"| {row['D']} | {row['dtype']} | {row['scan']} | {row['seconds']:.2f} |"
        print(f"{head} {row['gemm_seconds']:.2f} | {parts} |")
    for dtype in ("float32", "bfloat16"):
        print(f"\n{dtype}\n\n| distribution | loss | D | | s | in forward GEMMs | time / ours |")
        print("|---|---|---|---|---|---|---|")
        for row in split["rows"]:
            if row["dtype"] == dtype:
                print(speed_line(row).replace(f" {dtype} |", ""))
    training = json.loads((RESULTS / "training.json").read_text())["runs"]
    print("\n| | loss, first and last step | largest difference at any step | mean | largest L1 bound |")
    print("|---|---|---|---|---|")
    for name in dict.fromkeys(key.rsplit(" ", 1)[0] for key in training):
        exact = training[f"{name} exact"]["losses"]
        for kind in ("sparse", "int8"):
            if f"{name} {kind}" in training:
                losses = training[f"{name} {kind}"]["losses"]
                differences = [abs(a - b) / abs(a) for a, b in zip(exact, losses, strict=True)]
                worst, mean = max(differences), sum(differences) / len(differences)
                bound = max(training[f"{name} {kind}"]["bounds"])
                print(f"| {name}, {kind} | {exact[0]:.3f}, {exact[-1]:.3f} | {worst:.2%} | {mean:.2%} | {bound:.1%} |")


def _write(figure, name: str, top: float | None = None) -> None:
    figure.tight_layout(rect=(0, 0, 1, top or 1))
    temporary = PICTURES / f".{name}.tmp"
    figure.savefig(temporary, dpi=130, format="png")
    os.replace(temporary, PICTURES / name)
    print(f"written to docs/{name}")
