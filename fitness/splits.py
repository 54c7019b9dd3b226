"""Cuts problems into disjoint splits by a seeded hash of their text.

A problem stays in its split whatever is added to the data later, and a question that occurs twice never
sits in two splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from fitness.types import Problem, Split

SHARES: Mapping[Split, float] = {Split.SEARCH: 0.4, Split.RESERVE: 0.2, Split.HELD_OUT: 0.4}
"""Expected share of the problems that falls to each split."""


TRAINING_SHARES: Mapping[Split, float] = {Split.SEARCH: 2 / 3, Split.RESERVE: 1 / 3}
"""The same where held-out problems come from other data."""


def split_of(question: str, seed: int, shares: Mapping[Split, float] = SHARES) -> Split:
    """The split that a question belongs to."""
    position = _position(question, seed)
    for split, share in shares.items():
        if position < share:
            return split
        position -= share
    return list(shares)[-1]  # rounding at the very end of the interval


def take(
    problems: Iterable[Problem], split: Split, n: int | None, seed: int, shares: Mapping[Split, float] = SHARES
) -> list[Problem]:
    """The first n problems of a split, without duplicates, in the order given; all of them if n is None.

    Raises:
        ValueError: if the split holds fewer than n.
    """
    found: dict[str, Problem] = {}
    for problem in problems:
        if split_of(problem.question, seed, shares) is split:
            found.setdefault(problem.question, problem)
        if n is not None and len(found) == n:
            break
    if n is not None and len(found) < n:
        raise ValueError(
            f"split '{split}' was asked for {n} problems, but this data leaves only {len(found)} for it "
            f"({shares[split]:.0%} of its distinct questions): ask for at most {len(found)} or give more data"
        )
    return list(found.values())


def _position(question: str, seed: int) -> float:
    """A uniform number in [0, 1) that depends on the seed and the text alone."""
    digest = hashlib.blake2b(question.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") / 2.0**64
