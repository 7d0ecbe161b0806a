"""Which cases of a parameter grid run by default, and how many random examples: all of them with `--exhaustive`."""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
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
    having = defaultdict(list)
    for at, groups in enumerate(met):
        for group in groups:
            having[group].append(at)
    order = chance.sample(range(len(cases)), len(cases))
    gains, chosen, taken = [len(groups) for groups in met], set(), Counter()
    while (most := max(gains, default=0)) > 0:
        new = (at for at in order if gains[at] == most)
        best = min(new, key=lambda at: sum(taken[value] for value in cases[at]))
        chosen.add(best)
        taken.update(cases[best])
        for group in met[best]:
            for at in having.pop(group, ()):
                gains[at] -= 1
    return chosen
