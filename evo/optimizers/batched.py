"""Gives an algorithm that thinks in whole generations the one-by-one protocol.

Outcomes are kept until their batch is complete and handed over in the order of proposal, so that the
order in which evaluations finish changes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

from evo.optimizers import Outcome
from search_spaces.genes import Genome


class Batched(ABC):
    """An Optimizer made of `ask_batch` and `tell_batch`."""

    batch_size: int
    """Of the next batch."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._queue: deque[Genome] = deque()
        self._sizes: deque[int] = deque()  # of the batches that have not been told
        self._outcomes: dict[int, Outcome] = {}
        self._n_told = 0  # in whole batches

    @abstractmethod
    def ask_batch(self) -> list[Genome]:
        """Propose `batch_size` genomes."""

    @abstractmethod
    def tell_batch(self, outcomes: Sequence[Outcome]) -> None:
        """Take the outcomes of the oldest batch that has not been told, in the order of its proposals."""

    def ask(self, n: int) -> list[Genome]:
        """See Optimizer."""
        while len(self._queue) < n:
            batch = self.ask_batch()
            self._sizes.append(len(batch))
            self._queue.extend(batch)
        return [self._queue.popleft() for _ in range(n)]

    def tell(self, index: int, outcome: Outcome) -> None:
        """See Optimizer."""
        self._outcomes[index] = outcome
        while self._sizes:  # a later batch may have waited for this one
            batch = range(self._n_told, self._n_told + self._sizes[0])
            if not all(i in self._outcomes for i in batch):
                return
            self._n_told += self._sizes.popleft()
            self.tell_batch([self._outcomes.pop(i) for i in batch])
