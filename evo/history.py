"""A run as it stands: the ledger's content in memory, kept up to date as events are appended.

Reading the ledger anew after each of ten thousand evaluations would cost more than the evaluations' own
bookkeeping; here an append costs the same at any length.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from evo.config import Budget
from evo.front import Front, Row, extended, front_of, rows_of
from evo.ledger import Ask, Entry, Ledger
from evo.types import Candidate, Evaluation
from fitness.types import Score, Split

log = logging.getLogger("mergefront")


class History:
    """All asks and evaluations of a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.objectives: tuple[str, ...] = tuple(ledger.meta("config")["objectives"])
        self.entries: dict[Split, dict[int, Entry]] = {  # before the asks, which a live run may add to meanwhile
            split: {entry.candidate_id: entry for entry in ledger.entries(split)} for split in Split
        }
        """Split -> candidate id -> its evaluation."""
        self.later: dict[int, Entry] = {}
        """Candidate id -> its last evaluation on the search split, where that is not the first, which is above."""
        self.asks: list[Ask] = ledger.asks()
        """Candidate id -> its ask."""
        self.budget = Budget.model_validate(ledger.meta("budget"))
        """Its limits; see Budget."""
        self.spent = {"candidates": 0.0, "tokens": 0.0, "hours": 0.0}
        """What the search has used of its budget: evaluations on the search split, nothing else."""
        for entry in self.entries[Split.SEARCH].values():
            self._count(entry)
        for entry in ledger.later():
            self._count_later(entry)
        self.front: Front = self._whole_front()

    def append_asks(self, candidates: Sequence[Candidate]) -> list[Ask]:
        """Record proposals."""
        asks = self._ledger.append_asks(candidates)
        self.asks += asks
        return asks

    def append_evaluation(self, evaluation: Evaluation, split: Split) -> Entry:
        """Record an outcome; on the search split, spend and front follow."""
        entry = self._ledger.append_evaluation(evaluation, split)
        self.entries[split][entry.candidate_id] = entry
        if split is not Split.SEARCH:
            self.front = self._whole_front()  # rare, and an older row has changed
            return entry
        self._count(entry)
        for row in self._rows([entry]):  # none, if it gave no scores
            self.front = extended(self.front, row, self.objectives)
        return entry

    def append_later(self, evaluation: Evaluation, how: str) -> Entry:
        """Record a further evaluation on the search split, which holds from now on; see Ledger.later.

        Args:
            evaluation: what to record.
            how: it was evaluated this time.
        """
        entry = self._ledger.append_evaluation(evaluation, Split.SEARCH, again=how)
        self._count_later(entry)
        self.front = self._whole_front()
        return entry

    def latest(self, candidate_id: int) -> Entry:
        """The evaluation on the search split that holds."""
        return self.later.get(candidate_id) or self.entries[Split.SEARCH][candidate_id]

    def score(self, entry: Entry) -> Score:
        """The per-problem arrays of an evaluation."""
        return self._ledger.score(entry)

    @property
    def batch_size(self) -> int | None:
        """What an automatic batch size was found to be when the run started; None: not found yet."""
        size: int | None = self._ledger.meta("batch_size")
        return size

    def keep_batch_size(self, size: int | None) -> None:
        """Remember it for later sittings: text depends on it."""
        if size is not None and self.batch_size is None:
            self._ledger.set_meta("batch_size", size)

    def keep_caveat(self, caveat: str | None) -> None:
        """Label the run with what readers of its scores have to know, once and for good."""
        if caveat is not None and self._ledger.meta("caveat") is None:
            log.warning(caveat)
            self._ledger.set_meta("caveat", caveat)

    @property
    def ended(self) -> str | None:
        """Why the search ended before its budget was spent, in words; None if it did not."""
        why: str | None = self._ledger.meta("ended")
        return why

    def keep_ended(self, why: str | None) -> None:
        """Remember it until the search goes on."""
        if why != self.ended:
            self._ledger.set_meta("ended", why)

    @property
    def exhausted(self) -> bool:
        """Whether some limit of the budget has been reached."""
        return self.share_spent() >= 1.0

    def share_spent(self, *of: str) -> float:
        """How much of the budget is used, by the limit that is nearest.

        Args:
            of: names of the limits to look at; none: all.
        """
        limits = self.budget.model_dump(exclude_none=True)
        return max((self.spent[key] / limit for key, limit in limits.items() if not of or key in of), default=0.0)

    def _whole_front(self) -> Front:
        return front_of(self._rows(map(self.latest, self.entries[Split.SEARCH])), self.objectives)

    def _rows(self, entries: Iterable[Entry]) -> list[Row]:
        return rows_of(entries, self.asks, self.entries[Split.HELD_OUT])

    def _count(self, entry: Entry) -> None:
        self.spent["candidates"] += 1
        self._count_cost(entry)

    def _count_later(self, entry: Entry) -> None:
        self.later[entry.candidate_id] = entry
        self._count_cost(entry)

    def _count_cost(self, entry: Entry) -> None:
        self.spent["tokens"] += entry.n_tokens
        self.spent["hours"] += entry.seconds / 3600.0
