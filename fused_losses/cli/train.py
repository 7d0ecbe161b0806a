"""`fused-losses train`: Fine-tune a model on corrected answers, on chats, or on both, and see what else moved."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import models
from .ending import going_on, refusing
from .options import number, require
from .tables import show

NEEDS = ("transformers", "peft", "accelerate", "tqdm")
OPTIONS = ("kl_weight", "anchor_weight", "retain_weight", "alpha", "threshold")


def add(commands: Any) -> argparse.ArgumentParser:
    from ..training import settings

    parser = commands.add_parser(
        "train", help="fine-tune on corrected answers or chats", description=__doc__.partition(": ")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="methods:\n" + "\n".join(f"  {name:16} {m.title}" for name, m in settings.METHODS.items()),
    )  # fmt: skip
    models.add_options(parser)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", nargs="+", required=True, metavar="F",
        help="what is to be learned: records of anchors, or chats as JSON Lines",
    )  # fmt: skip
    data.add_argument(
        "--retain", nargs="+", default=[], metavar="F",
        help="what is to stay as it is: the model's own answers, as records without anchors or as chats",
    )  # fmt: skip
    data.add_argument("--replay", nargs="+", default=[], metavar="F", help="chats that are learned along")
    data.add_argument(
        "--replay-share", type=number(float, 0, 0.99), default=settings.REPLAY_SHARE, metavar="S",
        help=f"part of the rows of a step that are replayed; default {settings.REPLAY_SHARE}",
    )  # fmt: skip
    data.add_argument("--heldout", metavar="F", help="text whose nll is measured: chats as .jsonl, or plain text")
    data.add_argument("--max-length", type=number(int, 2), default=settings.MAX_LENGTH, help="most tokens of a row")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder, new or empty, or of this training")
    _add_training(parser, settings)
    return parser


def _add_training(parser: argparse.ArgumentParser, settings: Any) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--method", default="lawf", choices=list(settings.METHODS), help="default: lawf")
    weights = group.add_mutually_exclusive_group()
    weights.add_argument("--lora", type=number(int, 1), default=settings.RANK, metavar="R", help="rank; default 8")
    weights.add_argument("--full", action="store_true", help="train all weights")
    group.add_argument("--targets", nargs="+", metavar="LAYER", help="layers with LoRA; default: q_proj v_proj")
    group.add_argument("--learning-rate", type=number(float, 0), metavar="LR", help="default: that of the method")
    group.add_argument("--steps", type=number(int, 1), help="most; default: 3 passes, with anchors at least 40")
    group.add_argument("--batch-size", type=number(int, 1), help="rows of a forward; default: 8, or all there are")
    group.add_argument("--accumulate", type=number(int, 1), default=1, help="forwards of a step; default 1")
    for name in OPTIONS:
        used = ", ".join(f"{m} ({o.options[name]:g})" for m, o in settings.METHODS.items() if name in o.options)
        group.add_argument(f"--{name.replace('_', '-')}", type=number(float, 0), help=f"of {used}")
    group.add_argument(
        "--stop-probability", type=number(float, 0, 1), default=settings.STOP_PROBABILITY, metavar="P",
        help="stop where each anchor has this part of the probability that it is to get; default "
        f"{settings.STOP_PROBABILITY}",
    )  # fmt: skip
    group.add_argument(
        "--stop-kl", type=number(float, 0), default=settings.STOP_KL, metavar="KL",
        help="and the mean KL of retained tokens is at most this (methods with a reference); default "
        f"{settings.STOP_KL}",
    )  # fmt: skip
    group.add_argument("--no-stop", action="store_true", help="take all steps")
    group.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0)
    group.add_argument("--save-every", type=number(int, 1), metavar="STEPS", help="default: a quarter of all steps")
    group.add_argument("--merge", action="store_true", help="save a merged model too, in DIR/merged")
    group.add_argument("--quiet", action="store_true", help="no progress, no table")


def run(given: argparse.Namespace) -> None:
    require("train", NEEDS, "train")
    from .. import training
    from ..training import report as reports
    from ..training.folder import check_free, how_to_go_on

    with refusing(OSError, ValueError, NotImplementedError), going_on("train", lambda: how_to_go_on(given.output)):
        models.check(given)
        if given.full and given.adapter is not None:
            raise ValueError("--full: trains all weights, and --adapter goes on with an adapter; leave one of them out")
        check_free(given.output)
        report = training.train(
            lambda: models.load_model(given, trainable=True), models.load_tokenizer(given), given.data, given.output,
            method=given.method, lora=None if given.full else given.lora, targets=given.targets, retain=given.retain,
            replay=given.replay, replay_share=given.replay_share, heldout=given.heldout,
            learning_rate=given.learning_rate, steps=given.steps, batch_size=given.batch_size,
            accumulate=given.accumulate, max_length=given.max_length,
            options={name: getattr(given, name) for name in OPTIONS if getattr(given, name) is not None},
            stop=not given.no_stop, stop_probability=given.stop_probability, stop_kl=given.stop_kl, seed=given.seed,
            save_every=given.save_every, merge=given.merge, progress=not given.quiet, name=models.whole_name(given),
        )  # fmt: skip
    if not given.quiet:
        title = f"{given.method}: {report['steps']} steps in {report['seconds']:.0f} s; {report['stopped']}"
        if measured := reports.rows(report):
            show(title, ("what", "before", "after"), measured)
        else:
            print(f"{title}; nothing was measured before and after: that takes --heldout or anchors")
        if (sentence := reports.unmet(report, given.output)) is not None:
            print(sentence)
        print(f"written: {given.output}, with {', '.join(_written(Path(given.output)))}")


def _written(folder: Path) -> list[str]:
    names = ("adapter", "model", "merged", "report.json", "curves.png")
    return [name for name in names if (folder / name).exists()]
