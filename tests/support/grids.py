"""Which cases of a parameter grid run by default, and how many random examples: all of them with `--exhaustive`."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Hashable, Sequence

EXHAUSTIVE = False  # set by conftest.py before tests are imported


def examples(few: int, many: int) -> int:
    """Of a hypothesis test: by default, and with `--exhaustive`."""
    return many if EXHAUSTIVE else few


def covering(cases: Sequence[Sequence[Hashable]], together: int, chance: random.Random) -> set[int]:
    """Positions of a few cases in which any `together` values meet that meet in some case.

    Each time the case with most that is new, of these the one whose values have been taken least, of these one by
    `chance`: seeded by a test's name, it makes similar tests leave out different cases.
    """
    met = [set(itertools.combinations(case, min(together, len(case)))) for case in cases]
    order = chance.sample(range(len(cases)), len(cases))
    missing, chosen, taken = set().union(*met), set(), Counter()
    while missing:
        best = max(order, key=lambda at: (len(met[at] & missing), -sum(taken[value] for value in cases[at])))
        chosen.add(best)
        missing -= met[best]
        taken.update(cases[best])
    return chosen
