"""Cuts problems into disjoint splits by a seeded hash of their text, and checks those that a task gives.

A problem stays in its split whatever is added to the data later, and a question that occurs twice never
sits in two splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated

from annotated_types import Ge, Le

from fitness.types import Problem, Split, Task

Size = Annotated[int, Ge(1)]
"""How many problems a split has."""
MadeSize = Annotated[int, Ge(1), Le(100_000)]
"""The same where problems are made for it, which takes time."""

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
        fewer = f"ask for at most {len(found)} or give more data" if found else "give more data"
        raise ValueError(
            f"split '{split}' was asked for {n} problems, but this data leaves only {len(found)} for it "
            f"({shares[split]:.0%} of its distinct questions): {fewer}"
        )
    return list(found.values())


def problems_of(task: Task, name: str, splits: Collection[Split] = tuple(Split)) -> dict[Split, list[Problem]]:
    """The problems of a task, checked: what breaks a promise of Task would not fail, but make scores worthless.

    Args:
        task: to ask.
        name: what errors call it.
        splits: to ask for. Of several, the reserve may be empty, as no search scores it.

    Raises:
        ValueError: if a split is empty, holds anything but problems or one of them twice, shares one with another
            split, or a prompt is no text.
    """
    found: dict[Split, list[Problem]] = {}
    owners: dict[str, Split] = {}
    for split in splits:
        where = f"task {name!r}, split '{split}'"
        found[split] = problems = task.problems(split)
        if not isinstance(problems, list | tuple):
            raise ValueError(f"{where}: expected a list of Problem, got {type(problems).__name__}")
        if not problems and (split is not Split.RESERVE or len(splits) == 1):
            raise ValueError(f"{where}: expected at least one problem, got none: give the task more data")
        for problem in problems:
            if not isinstance(problem, Problem):
                raise ValueError(f"{where}: expected objects of fitness.types.Problem, got {problem!r:.100}")
            if not isinstance(problem.question, str) or not isinstance(problem.answer, str):
                raise ValueError(f"{where}: expected text as question and as answer, got {problem!r:.200}")
            if owner := owners.get(problem.id):
                raise ValueError(
                    f"{where}: expected each question once, got {problem.question!r:.100}, which is in '{owner}' "
                    "already: fitness.splits.take cuts problems into disjoint splits without duplicates"
                )
            owners[problem.id] = split
            if not isinstance(prompt := task.prompt(problem), str):
                raise ValueError(f"{where}: expected text as prompt of {problem.question!r:.100}, got {prompt!r:.100}")
    return found


def _position(question: str, seed: int) -> float:
    """A uniform number in [0, 1) that depends on the seed and the text alone."""
    digest = hashlib.blake2b(question.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") / 2.0**64
