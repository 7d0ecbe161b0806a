"""Errors of sparse gradients on made inputs (fused_losses/bench/calibrated.py), beside those of real ones.

    python benchmarks/calibrated_check.py same     # real and made, D = 576 and V = 49,152, as many tokens
    python benchmarks/calibrated_check.py larger   # made ones at larger V and D
    python benchmarks/calibrated_check.py tables   # those of docs/method.md, from results/calibrated.json

Real tokens are those whose statistics the made ones have. The KL asked for is the real ones' own mean.
"""

from __future__ import annotations

import argparse
import json

import calibrated_fit
import enlarged
import torch
from sparse_states import RESULTS, load_states, save
from tqdm import tqdm

from fused_losses.bench import calibrated

WANTED = 0.2  # relative: so far off may statistics and errors be
SEEDS = (0, 1)
LARGER = [
    ("documentation", 128256, 576), ("documentation", 262144, 576), ("generated", 128256, 576),
    ("generated", 262144, 576), ("documentation", 128256, 2048),
]  # fmt: skip


def measured(hidden, weight, labels, tuned, original) -> dict:
    """Statistics, and errors of dx and dW for each loss with full and 8-bit products; in float32."""
    found = enlarged.statistics(hidden, weight, labels)
    losses = {}
    for case in (enlarged.Case(hidden, weight, labels), enlarged.Case(tuned, weight, labels, original)):
        if case.reference is None:
            found["nll"] = case.nll.mean().item()
        for loss in case.losses:
            truth = case.truth(loss)
            for scan in ("full", "int8"):
                row = case.ours(loss, truth, scan)
                losses[f"{loss}, {scan}"] = {"dx": row["errors"][0], "dW": row["errors"][1]}
                found.setdefault("entries", row["entries"])
                if row["kl"] is not None:
                    found["kl"] = row["kl"]
    return {"statistics": found, "errors": losses}


def real(states: dict, kind: str) -> dict:
    at = torch.linspace(0, len(states["texts"][kind][1]) - 1, calibrated_fit.TOKENS).long()
    hidden, labels, tuned, original = (t[at] for t in (*states["texts"][kind], *states["adapted"][kind][:2]))
    return measured(hidden, states["weight"], labels, tuned, original)


def made(kind: str, dim: int, vocabulary: int, tokens: int, kl: float, seed: int = 0) -> dict:
    hidden, weight, labels, reference = calibrated.calibrated(tokens, dim, vocabulary, seed=seed, kind=kind, kl=kl)
    return measured(hidden, weight, labels, hidden, reference)


def same(content: dict) -> None:
    states = load_states()
    for seed in SEEDS:
        for kind in calibrated.KINDS:
            row = content.setdefault("same", {}).setdefault(kind, {})
            if "real" not in row:
                row["real"] = real(states, kind)
            if f"made, seed {seed}" not in row:
                kl = row["real"]["statistics"]["kl"]
                row[f"made, seed {seed}"] = made(kind, 576, 49152, calibrated_fit.TOKENS, kl, seed)
                save("calibrated", content)
    ratios = [ratio for row in content["same"].values() for seed in SEEDS for *_, ratio in pairs(row, seed)]
    content["within"] = [sum(abs(r - 1) <= WANTED for r in ratios), len(ratios)]
    save("calibrated", content)


def pairs(row: dict, seed: int = 0) -> list[tuple[str, float, float, float]]:
    """Name, real, made, and their ratio."""
    one, other = flat(row["real"]), flat(row[f"made, seed {seed}"])
    return [(name, one[name], other[name], other[name] / one[name]) for name in one if name != "kl"]


def flat(part: dict) -> dict[str, float]:
    errors = {f"{loss}, {name}": 100 * e for loss, both in part["errors"].items() for name, e in both.items()}
    return part["statistics"] | errors


def larger(content: dict) -> None:
    for kind, vocabulary, dim in tqdm(LARGER):
        name = f"{kind}, V = {vocabulary:,}, D = {dim:,}"
        if name not in content.setdefault("larger", {}):
            content["larger"][name] = made(kind, dim, vocabulary, 256, 0.003)
            save("calibrated", content)


def tables(content: dict) -> None:
    """In Markdown: real, made with the first seed, how far it and those of other seeds are off; then larger ones."""
    lines: dict[str, str] = {}
    for row in content.get("same", {}).values():
        seeds = [seed for seed in SEEDS if f"made, seed {seed}" in row]
        for at, (what, one, other, _) in enumerate(pairs(row) if seeds else []):
            off = " / ".join(f"{100 * (pairs(row, seed)[at][3] - 1):+.0f}" for seed in seeds)
            lines[what] = lines.get(what, f"| {what} |") + f" {one:.3g} | {other:.3g} | {off} |"
    print("\n".join(lines.values()))
    for name, row in content.get("larger", {}).items():
        cells = [f"{row['statistics'][key]:.3g}" for key in ("entropy", "entries", "tail")]
        cells += [" / ".join(f"{100 * e[key]:.2f}" for key in ("dx", "dW")) for e in row["errors"].values()]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if "within" in content:
        print("within {} %: {} of {}".format(round(100 * WANTED), *content["within"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=("same", "larger", "tables"))
    path = RESULTS / "calibrated.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    for step in parser.parse_args().steps:
        {"same": same, "larger": larger, "tables": tables}[step](content)


if __name__ == "__main__":
    main()
