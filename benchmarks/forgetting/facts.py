"""Facts that no model can know: synthetic towns and what belongs to each; and a text without templates, Python's own
documentation."""

from __future__ import annotations

import inspect
import random

BEGINNINGS = ("Vel", "Or", "Tam", "Ker", "Lin", "Sov", "Dar", "Mir", "Hal", "Bren", "Zan", "Eld", "Fio", "Gra", "Ul")
MIDDLES = ("mo", "ta", "ri", "ve", "dan", "lo", "sha", "ke", "nu", "pi")
ENDS = ("ra", "sk", "len", "dor", "vik", "mar", "nis", "tun", "bek", "gard")
TRADES = (
    "blue glass", "walnut oil", "copper bells", "dried figs", "wool blankets", "clay pipes", "river salt", "silk cord",
    "honey wine", "cedar chests", "paper kites", "iron hinges",
)  # fmt: skip

# Of each attribute: two questions that are learned, one that is not, the sentence of the answer, and the reverse.
ATTRIBUTES = {
    "mayor": (
        "Who is the mayor of {town}?", "Please name the mayor of {town}.",
        "Which person leads the town hall of {town}?",
        "The mayor of {town} is {value}.", "Of which town is {value} the mayor?",
    ),
    "river": (
        "Which river flows through {town}?", "What is the river of {town} called?", "On which river does {town} lie?",
        "The river {value} flows through {town}.", "Through which town does the river {value} flow?",
    ),
    "founded": (
        "When was {town} founded?", "In which year did {town} begin?",
        "How old is {town}, by the year of its founding?",
        "{town} was founded in {value}.", "Which town was founded in {value}?",
    ),
    "trade": (
        "What is {town} known for?", "What do people buy in {town}?", "For which goods is {town} famous?",
        "{town} is known for its {value}.", "Which town is known for its {value}?",
    ),
}  # fmt: skip


def _name(g: random.Random) -> str:
    return g.choice(BEGINNINGS) + g.choice(MIDDLES) + g.choice(ENDS)


def facts(seed: str, towns: int) -> tuple[list[dict], list[dict], list[dict]]:
    """(learned, paraphrased, reversed): examples with question, answer and value."""
    g = random.Random(seed)
    names: list[str] = []
    while len(names) < towns:
        name = _name(g)
        if name not in names:
            names.append(name)
    learned, paraphrased, turned = [], [], []
    for town in names:
        values = {
            "mayor": f"{_name(g)} {_name(g)}", "river": _name(g), "founded": str(g.randint(1103, 1897)),
            "trade": g.choice(TRADES),
        }  # fmt: skip
        for attribute, (one, two, other, sentence, reverse) in ATTRIBUTES.items():
            value = values[attribute]
            filled = {"town": town, "value": value}
            answer = sentence.format(**filled)
            for question in (one, two):
                learned.append({"question": question.format(**filled), "answer": answer, "value": value})
            paraphrased.append({"question": other.format(**filled), "answer": answer, "value": value})
            if attribute in ("mayor", "river"):
                turned.append({"question": reverse.format(**filled), "answer": answer, "value": town})
    return learned, paraphrased, turned


def documentation() -> tuple[str, str, str]:
    """Docstrings to learn, of the same modules to test, and of other modules."""
    import argparse
    import collections
    import difflib
    import heapq
    import itertools
    import logging
    import statistics
    import subprocess
    import textwrap

    learned = (
        subprocess.run, difflib.SequenceMatcher, difflib.unified_diff, textwrap.wrap, statistics.quantiles,
        collections.Counter, collections.OrderedDict, itertools.groupby, argparse, logging.Logger.log,
        subprocess.Popen, difflib.get_close_matches, statistics.linear_regression, itertools.islice, argparse.Action,
        logging.Formatter, textwrap.TextWrapper, logging.LoggerAdapter, statistics.correlation, heapq,
    )  # fmt: skip
    same = (
        difflib.context_diff, statistics.fmean, textwrap.shorten, subprocess.check_output, logging.LogRecord,
        collections.ChainMap, itertools.accumulate, difflib.ndiff, argparse.ArgumentParser, statistics.NormalDist,
    )  # fmt: skip
    import contextlib
    import csv
    import decimal
    import functools

    others = (functools.lru_cache, contextlib.ExitStack, csv, decimal.Context, functools.singledispatch)
    made = ["\n\n".join(inspect.getdoc(part) or "" for part in parts) for parts in (learned, same, others)]
    return made[0], made[1], made[2]
