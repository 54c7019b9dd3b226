"""How long a model takes to answer all problems, from tries on fewer problems and shorter answers.

First enough answers to fill the batch are begun, then they are let grow, then more problems follow, as far as time
allows: so what a call, a step, a row and a long row cost can be told apart (batching.py), from the tries of all
candidates together. Problems that were not tried are taken to have answers as long as those that were. Knows no model:
a try is a function. Of answers that did not end in time it knows a range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import gamma

from evo.planning.batching import Batch, prices

FIRST_TOKENS = 4
TAIL = 2
"""Shape of the gamma distribution of what unfinished answers lack: of simulated searches with lognormal or exponential
lengths 1 in 20 was more than 25 % off, and 1 in 3 where all unfinished were given one length (experiments/LOG.md).
"""
GOLDEN_RATIO = 0.5 * (math.sqrt(5) - 1)
"""Its multiples modulo 1 are spread evenly, and so are any that follow one another."""
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
    lengths: tuple[int, ...]
    """Tokens of each answer; of a problem's samples one after the other."""

    @property
    def cut(self) -> float:
        """Share of the answers that reached the cap."""
        return sum(length >= self.cap for length in self.lengths) / len(self.lengths)


@dataclass(frozen=True)
class Estimate:
    """Of a candidate on all problems: from the least to the most; equal where answers ended in time."""

    seconds: tuple[float, float]
    tokens: tuple[float, float]
    """Of all answers."""


Ask = Callable[[int, int], Try]
"""Tries so many problems, with answers of at most so many tokens."""


def explore(
    ask: Ask, n: int, batch: Batch, samples: int, most: int, seconds: float, others: Sequence[Try] = ()
) -> list[Try]:
    """Larger and larger tries, within some seconds if the first alone, a problem and a few tokens, is.

    Args:
        ask: makes a try.
        n: problems that a candidate is asked.
        batch: in which they are decoded.
        samples: answers of a problem.
        most: tokens of an answer.
        seconds: that there are.
        others: tries that were made before, of this or of another candidate.
    """
    found, size = [], (1, min(FIRST_TOKENS, most))
    while True:
        found.append(ask(*size))
        left = 0.8 * (seconds - sum(one.seconds for one in found))
        following = _larger(found[-1], [*others, *found], max(0.0, left), n, batch, samples, most)
        if following is None:
            return found
        size = following


def _larger(
    last: Try, tries: Sequence[Try], left: float, n: int, batch: Batch, samples: int, most: int
) -> tuple[int, int] | None:
    """The next size, which should take no longer than the seconds that are left; None if none is worth it."""
    rows = min(n, math.ceil(batch.rows / samples))
    if last.n < rows:
        sizes = [(more, last.cap) for more in _above(last.n, rows)]
    elif last.n == rows and last.cap < most and last.cut:
        sizes = [(last.n, cap) for cap in _above(last.cap, most)]
    else:
        sizes = [(more, most) for more in _above(last.n, n)]
    each = priced(tries, batch)
    fit = (size for size in sizes if estimate(last, each, size[0], batch, size[1]).seconds[1] <= left)
    return next(fit, None)


def _above(size: int, most: int) -> Iterator[int]:
    """Sizes from at most eight times one down to what is worth it."""
    larger = min(most, 8 * size)
    while larger > size and larger >= min(most, WORTH_IT * size):
        yield larger
        larger = int(0.9 * larger)


def priced(tries: Sequence[Try], batch: Batch) -> NDArray[np.float64]:
    """See `prices`; of all tries that were made, of whatever candidates: work costs the same."""
    return prices([batch.work(one.lengths, one.cap) for one in tries], [one.seconds for one in tries])


def estimate(
    last: Try, each: NDArray[np.float64], n: int, batch: Batch, most: int, tokens: float | None = None
) -> Estimate:
    """Extrapolate to all problems: what the last try took, and the price of what is done beyond it.

    Args:
        last: of a candidate.
        each: prices of work.
        n: problems that a candidate is asked.
        batch: in which they are decoded.
        most: tokens of an answer.
        tokens: mean tokens of an answer, if somebody knows; used where answers did not end in time.
    """
    done, ends = batch.work(last.lengths, last.cap), []
    for answers in _ends(last, n, most, tokens):
        work = batch.work(answers.tolist(), most) - done
        ends.append((last.seconds + float(each @ work), float(answers.sum())))
    seconds, written = zip(ends[0], ends[-1], strict=True)
    return Estimate(seconds, written)


def _ends(last: Try, n: int, most: int, tokens: float | None) -> list[NDArray[np.int64]]:
    """Tokens of all answers: the least and the most, or what is known of them."""
    if not last.cut:
        missing = [0.0]
    elif tokens is None:
        missing = [0.0, float(most - last.cap)]
    else:
        missing = [(tokens - float(np.mean(last.lengths))) / last.cut]
    ends = []
    for mean in missing:
        answers = np.resize(last.lengths, n * len(last.lengths) // last.n)
        unfinished = answers >= last.cap
        answers[unfinished] = last.cap + _tail(int(unfinished.sum()), mean, most - last.cap)
        ends.append(answers)
    return ends


def _tail(n: int, mean: float, most: int) -> NDArray[np.int64]:
    """Tokens that n answers still lack: spread as a gamma distribution of that mean would be, cut at the most."""
    if n == 0 or not 0 < mean < most:
        return np.full(n, min(max(0, round(mean)), most))
    spread = gamma.ppf((np.arange(1, n + 1) * GOLDEN_RATIO) % 1, TAIL)
    scale = brentq(lambda scale: np.minimum(scale * spread, most).mean() - mean, 0, most / spread.min())
    lacking: NDArray[np.int64] = np.minimum(scale * spread, most).round().astype(np.int64)
    return lacking
