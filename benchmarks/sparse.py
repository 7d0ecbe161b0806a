"""Sparse-plus-rank-one gradients, measured: how wrong, how fast, and the figures of docs/method.md.

    python benchmarks/sparse.py [accuracy] [speed] [kept] [directions] [figures] [tables]   (default: all; an hour)

Hidden states are those of SmolLM2-135M-Instruct on real text (benchmarks/texts.py), kept in the folder for temporary
files and made anew when the code that makes them changes. D = 2048 is the same states and head in a rotated, wider
basis: equal logits, wider products. Truth is float64. Each step writes benchmarks/results/sparse-*.json; training
curves are those of benchmarks/training.py.
"""

from __future__ import annotations

import argparse

from sparse_accuracy import accuracy
from sparse_figures import figures, tables
from sparse_speed import directions_cost, speed, speed_with_kept_memory

TIMED = {"speed": speed, "kept": speed_with_kept_memory, "directions": directions_cost}
STEPS = ("accuracy", *TIMED, "figures", "tables")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", default=list(STEPS))
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    unknown = set(options.steps) - set(STEPS)
    if unknown:
        parser.error(f"unknown step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    for step in options.steps:
        if step in TIMED:
            TIMED[step](options.runs)
        else:
            {"accuracy": accuracy, "figures": figures, "tables": tables}[step]()


if __name__ == "__main__":
    main()
