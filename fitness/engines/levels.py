"""Who is decoded together: rows of about the same length.

A step costs every row of a batch as much as the longest, so a few answers that run on would make all others dear for as
long as finished rows are replaced. Here the batch runs at a level, which allows so many tokens; a row that outgrows it
is parked, with its keys and values, and goes on among its like. The lowest level runs first; but where what is
parked fills the memory that it may, the highest runs until half of it is free again. (A multi-level feedback queue:
Corbato et al. 1962, "An experimental time-sharing system".)

Knows lengths; knows neither text nor tensors, so that a plan can ask it what a schedule will be
(evo/planning/batching.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

LEAST_TOKENS = 256
"""Of the lowest level: below, what parking saves is not worth its trouble."""


def lowest_level(model_bytes: int, rows: int, token_bytes: int) -> int:
    """Tokens of the longest row from which on a step spends more on the rows' keys and values than on the weights.

    Args:
        model_bytes: that a step reads whatever the rows are.
        rows: of a batch.
        token_bytes: of a token's keys and values.
    """
    return max(LEAST_TOKENS, model_bytes // (rows * max(1, token_bytes)))


class Joining(NamedTuple):
    """Rows that join the batch."""

    fresh: list[int]
    """Prompts."""
    parked: list[int]
    """Rows that go on. One of both lists is empty."""


class Levels:
    """All rows that are not in the batch: prompts that wait, and rows that are parked.

    The rows of the batch, were they as long as their level allows, and the parked ones hold about as many tokens at
    most as a batch whose rows are all as long as can be.

    Args:
        prompts: tokens of each prompt, in the order in which they are to be begun.
        rows: most rows of a batch.
        longest: tokens that a row can come to.
        lowest: tokens of the lowest level; each further one allows twice as many.
    """

    def __init__(self, prompts: Sequence[int], rows: int, longest: int, lowest: int) -> None:
        self._rows, self._longest, self._lowest = rows, longest, lowest
        self._room = rows * longest
        self._may_park = self._room - rows * min(longest, lowest)
        self._level = self._n_parked_tokens = 0
        self._is_full = False
        self._n_ended = self._n_written = 0
        self._fresh: dict[int, deque[int]] = {}
        self._parked: dict[int, deque[int]] = {}
        self._lengths: dict[int, int] = {}  # of what is parked
        for i, n in enumerate(prompts):
            self._fresh.setdefault(self._level_of(n + 1), deque()).append(i)

    @property
    def anyone(self) -> bool:
        """Whether any row is waiting or parked."""
        return bool(self._fresh or self._parked)

    @property
    def limit(self) -> int:
        """Tokens that a row may come to before it is parked."""
        return self._tokens_of(self._level) if self.anyone else self._longest

    def join(self, n_rows: int) -> Joining:
        """Take rows that are to join the batch, which has so many, now; none if it should take a step."""
        if not self.anyone:
            return Joining([], [])
        if self._is_full:
            self._is_full = self._n_parked_tokens > self._may_park // 2
        else:
            self._is_full = self._n_parked_tokens > self._may_park
        if n_rows == 0:
            self._level = max(self._parked) if self._is_full else min(self._waiting())
        elif not self._is_full and n_rows <= self._rows // 2:
            self._level = self._raised(n_rows)
        free, room = self._rows - n_rows, self._room - self._n_parked_tokens - n_rows * self.limit
        if self._level in self._fresh and not self._is_full:
            n = min(free, max(room // self.limit, n_rows == 0))
            return Joining(self._take_fresh(n) if n_rows == 0 or n >= self._worth_joining() else [], [])
        return Joining([], self._take_parked(free, room, n_rows == 0))

    def outgrown(self, lengths: Sequence[int]) -> list[int]:
        """The places of those rows that have to be parked, for all rows of the batch."""
        limit = self.limit
        return [place for place, n in enumerate(lengths) if n > limit] if self.anyone else []

    def park(self, row: int, length: int) -> None:
        """Take a row of so many tokens out of the batch."""
        self._parked.setdefault(self._level_of(length), deque()).append(row)
        self._lengths[row] = length
        self._n_parked_tokens += length

    def end(self, n_written: int) -> None:
        """A row of the batch has ended with so many new tokens."""
        self._n_ended, self._n_written = self._n_ended + 1, self._n_written + n_written

    def _worth_joining(self) -> int:
        """How many rows should be free before prompts join.

        A pass over prompts costs about a step. With a share f of the rows free before each, a row takes 1/f of
        a pass over prompts and n/(1 - f/2) steps per batch: least at f = sqrt(2/n), n being the mean length.
        """
        mean = self._n_written / max(1, self._n_ended)
        return int(min(0.5, (2 / max(1.0, mean)) ** 0.5) * self._rows) or 1

    def _waiting(self) -> Iterator[int]:
        yield from self._fresh
        yield from self._parked

    def _level_of(self, length: int) -> int:
        """The lowest level that allows so many tokens."""
        return max(0, -(-length // self._lowest) - 1).bit_length()

    def _tokens_of(self, level: int) -> int:
        return min(self._longest, self._lowest << level)

    def _raised(self, n_rows: int) -> int:
        """The level for a batch that is half empty: the next one where rows wait, if there is room for this one's."""
        level = min(self._waiting())
        fits = n_rows * self._tokens_of(level) + self._n_parked_tokens <= self._room
        return level if level > self._level and fits else self._level

    def _take_fresh(self, n: int) -> list[int]:
        return [_pop(self._fresh, self._level) for _ in range(min(n, len(self._fresh[self._level])))]

    def _take_parked(self, n: int, room: int, at_least_one: bool) -> list[int]:
        taken: list[int] = []
        while self._level in self._parked and len(taken) < n:
            length = self._lengths[self._parked[self._level][0]]
            room -= self.limit - length  # what it holds is in no one else's way
            if room < 0 and not (at_least_one and not taken):
                break
            taken.append(_pop(self._parked, self._level))
            self._n_parked_tokens -= self._lengths.pop(taken[-1])
        return taken


def _pop(queues: dict[int, deque[int]], level: int) -> int:
    row = queues[level].popleft()
    if not queues[level]:
        del queues[level]
    return row
