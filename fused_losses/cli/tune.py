"""`fused-losses tune`: Time tiles of the scan against chunks of logits; print the best for kernels/triton/tiles.py."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from .. import backends
from ..kernels.triton.tiles import EIGHT_BIT_KINDS, KINDS
from .options import number

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
N, D, V = 8192, 4096, 128256
INTERPRETED = (32, 64, 512)
EVERY_KIND = (*KINDS, *EIGHT_BIT_KINDS)


def add(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("tune", help="the fastest tiles on this GPU", description=__doc__.partition(": ")[2])
    parser.add_argument("--hidden", type=number(int, 1), help=f"D; default {D}")
    parser.add_argument("--vocabulary", type=number(int, 2), help=f"V; default {V}")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 or float16; default bfloat16")
    parser.add_argument("--tokens", type=number(int, 1), help=f"N; default {N}")
    parser.add_argument(
        "--kind", action="append",
        help="plain, capped (soft-cap or bias), shared, own (by the reference's head); with -directions, those of the "
        "head; plain and capped also with -8bit at the end, operands of 8 bits; repeat for more; default: all",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=number(float, 0), default=120.0, help="about how long for each kind; default 120"
    )
    parser.add_argument("--jobs", type=number(int, 0), help="processes that compile ahead")
    parser.add_argument("--output", type=Path, help="file for all timings, JSON")
    return parser


def run(given: argparse.Namespace) -> None:
    if given.dtype not in TYPES:
        sys.exit(f"--dtype: expected bfloat16 or float16, got {given.dtype!r}")
    unknown = [k for k in given.kind or () if k not in EVERY_KIND]
    if unknown:
        sys.exit(f"--kind: expected some of {', '.join(EVERY_KIND)}, got {', '.join(unknown)}")
    if given.output is not None and not given.output.absolute().parent.is_dir():
        sys.exit(f"--output: expected a file in a folder that exists, got {given.output}")
    reason = backends.unavailable("triton")
    if reason is not None:
        sys.exit(f"nothing to tune here: {reason}")
    from ..kernels import tune as tuning

    interpreted = backends.interpreted()
    defaults = INTERPRETED if interpreted else (N, D, V)
    tokens, hidden, vocabulary = (
        chosen or default
        for chosen, default in zip((given.tokens, given.hidden, given.vocabulary), defaults, strict=True)
    )
    dtype = TYPES[given.dtype]
    reason = tuning.unavailable(hidden, dtype)
    if reason is not None:
        sys.exit(f"nothing to tune here: {reason}")
    if interpreted:
        print("# in Triton's interpreter: these times mean nothing")
    outcomes = []
    for kind in given.kind or EVERY_KIND:
        workload = tuning.Workload(kind, tokens, hidden, vocabulary, dtype, "cpu" if interpreted else "cuda")
        outcomes.append(tuning.run(workload, given.seconds, given.jobs, lambda text: print(f"# {text}", flush=True)))
        if given.output is not None:
            temporary = given.output.with_name(given.output.name + ".tmp")
            temporary.write_text(json.dumps([tuning.as_dict(o) for o in outcomes], indent=1) + "\n")
            temporary.replace(given.output)
    for outcome in outcomes:
        if outcome.untried:
            print(f"# {outcome.workload.kind}: no time for {outcome.untried} tiles; give more --seconds")
        print(outcome.line())
