"""How long a model takes to answer all problems, from tries on fewer problems and shorter answers.

First enough answers to fill the batch are begun, then they are let grow, then more problems follow, as far as time
allows. What a batch costs at the start is so told from what each further token costs at the batch's occupancy. Knows
no model: a try is a function. Of answers that did not end in time it knows a range.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

FIRST_TOKENS = 4
OCCUPIED = 0.75
"""Share of the rows that must still be writing for their speed to count as a full batch's."""
WORTH_IT = 1.3
"""A try is followed by one that is larger by this factor at the least."""


@dataclass(frozen=True)
class Try:
    """What came of some problems."""

    n: int
    """Problems."""
    cap: int
    """Most tokens of an answer."""
    seconds: float
    tokens: int
    """Of all answers."""
    cut: float
    """Share of the answers that reached the cap."""

    @property
    def each(self) -> float:
        """Tokens of a problem's answers."""
        return self.tokens / self.n


@dataclass(frozen=True)
class Estimate:
    """Of a candidate on all problems: from the least to the most; equal where answers ended in time."""

    seconds: tuple[float, float]
    tokens: tuple[float, float]
    """Of all answers."""


Ask = Callable[[int, int], Try]
"""Tries so many problems, with answers of at most so many tokens."""


def explore(ask: Ask, n: int, rows: int, most: int, seconds: float) -> list[Try]:
    """Larger and larger tries, within some seconds if the first alone, a problem and a few tokens, is.

    Args:
        ask: makes a try.
        n: problems that a candidate is asked.
        rows: problems that are decoded together.
        most: tokens of an answer.
        seconds: that there are.
    """
    found, size = [], (1, min(FIRST_TOKENS, most))
    while True:
        found.append(ask(*size))
        left = seconds - sum(one.seconds for one in found)
        following = _larger(found[-1], max(0.0, 0.8 * left) / max(found[-1].seconds, 1e-9), n, min(rows, n), most)
        if following is None:
            return found
        size = following


def _larger(last: Try, room: float, n: int, rows: int, most: int) -> tuple[int, int] | None:
    """The next size; `room` is how many times the last one's seconds are left."""
    if last.n < rows:
        growth = min(4.0, room)
        return (min(rows, math.ceil(last.n * growth)), last.cap) if growth >= WORTH_IT else None
    if last.n == rows and last.cap < most and last.cut:
        growth = min(4.0, math.sqrt(room))  # attention to all that was written: seconds may grow as the square
        return (last.n, min(most, math.ceil(last.cap * growth))) if growth >= WORTH_IT else None
    more = min(n, int(last.n * min(4.0, room)))
    return (more, most) if more >= min(n, WORTH_IT * last.n) and last.n < n else None


def estimate(found: list[Try], n: int, most: int, samples: int = 1, tokens: float | None = None) -> Estimate:
    """Extrapolate to all problems: what the last try took, and what is left to write at the batch's speed.

    Args:
        found: of `explore`.
        n: problems that a candidate is asked.
        most: tokens of an answer.
        samples: answers to a problem.
        tokens: mean tokens of an answer, if somebody knows; used where answers did not end in time.
    """
    last, speed = found[-1], steady_speed(found)
    cut = last.cut if last.cap < most else 0.0
    low, high = last.each, last.each + samples * cut * (most - last.cap)
    if cut and tokens is not None:
        low = high = min(max(low, samples * tokens), high)
    seconds = [last.seconds + (n * each - last.tokens) / speed for each in (low, high)]
    return Estimate((seconds[0], seconds[1]), (n * low, n * high))


def steady_speed(found: list[Try]) -> float:
    """Tokens a second of a batch that is full: between two tries, so that what a batch costs once is in neither."""
    steps = [(a, b) for a, b in pairwise(found) if b.seconds > a.seconds and b.tokens > a.tokens]
    longer = [(a, b) for a, b in steps if a.n == b.n]
    full = [(a, b) for a, b in longer if b.each - a.each >= OCCUPIED * (b.cap - a.cap) * a.each / a.cap]
    refilled = [(a, b) for a, b in steps if a.n < b.n and a.cap == b.cap and longer and a.n >= longer[0][0].n]
    for a, b in [*refilled[-1:], *full[-1:], *longer[:1]]:
        return (b.tokens - a.tokens) / (b.seconds - a.seconds)
    return found[-1].tokens / max(found[-1].seconds, 1e-9)
