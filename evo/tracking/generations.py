"""A run told generation by generation, as numbers: what a tracker draws over time.

Read from the ledger alone, so that it comes out the same whenever, and however often, it is read.
Knows nothing of MLflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from evo.config import Budget
from evo.front import Front, Row, front_of, rows_of
from evo.ledger import Ask, Entry, Ledger, holding
from evo.types import Status
from fitness.types import Split

TOLERANCE = 0.02
"""`best/tokens` asks for the accuracy of the best parent, less these two points."""


@dataclass(frozen=True)
class Generation:
    """What one generation brought, and where it left the run."""

    index: int
    time: float
    """Of its last evaluation, in seconds since 1970."""
    complete: bool
    """Whether nothing more can belong to it; of an ended search something can to the last one, if it is extended."""
    front: Front
    """After it; `evaluated` holds everything up to here."""
    metrics: dict[str, float]


@dataclass(frozen=True)
class Record:
    """All of a run that matters here, as it was at one moment."""

    asks: tuple[Ask, ...]
    entries: tuple[Entry, ...]
    """On the search split, in the order of evaluation."""
    held_out: dict[int, Entry]
    """Candidate id -> its evaluation on the held-out split."""
    objectives: tuple[str, ...]
    budget: Budget
    later: tuple[Entry, ...] = ()
    """Further evaluations on the search split, in order; the last one of a candidate holds."""

    @classmethod
    def read(cls, ledger: Ledger) -> Record:
        """Read a ledger that may grow meanwhile: evaluations first, so that each has its ask."""
        held_out = {entry.candidate_id: entry for entry in ledger.entries(Split.HELD_OUT)}
        later = tuple(ledger.later())  # before the first ones, so that each has its own
        entries = tuple(ledger.entries(Split.SEARCH))
        objectives, budget = tuple(ledger.meta("config")["objectives"]), Budget.model_validate(ledger.meta("budget"))
        return cls(tuple(ledger.asks()), entries, held_out, objectives, budget, later)

    @cached_property
    def spent(self) -> dict[str, float]:
        """What the search has used of its budget."""
        return _spent(self.entries, self.later)

    @property
    def finished(self) -> bool:
        """Whether the search has ended by itself: its budget is spent, or everything asked has been scored."""
        limits = self.budget.model_dump(exclude_none=True)
        if any(self.spent[key] >= limit for key, limit in limits.items()):
            return True
        return bool(self.entries) and len(self.entries) == len(self.asks) and not self.front.unscored()

    @cached_property
    def front(self) -> Front:
        """The front as it is now."""
        return front_of(rows_of(self.latest, self.asks, self.held_out), self.objectives)

    @cached_property
    def latest(self) -> tuple[Entry, ...]:
        """The evaluation of each candidate that holds."""
        return tuple(holding(self.entries, self.later))

    @cached_property
    def last_time(self) -> float:
        """When the last thing happened, in seconds since 1970; 0 for never."""
        ends = (self.entries[-1:], self.later[-1:])
        events = [*(ask.time for ask in self.asks[-1:]), *(entry.time for end in ends for entry in end)]
        return max([*events, *(entry.time for entry in self.held_out.values())], default=0.0)

    def generations(self, *, running: bool = False) -> Iterator[Generation]:
        """Every complete generation, in order, and an incomplete last one if the search has ended with it.

        What happens before the next one is asked for belongs to it, so one with parked candidates ends then.

        Args:
            running: whether the search is at work, and more may happen in its last generation.
        """
        asked: dict[int, list[Ask]] = {}
        for ask in self.asks:
            asked.setdefault(ask.generation, []).append(ask)
        batches: dict[int, list[Entry]] = {index: [] for index in asked}
        for entry in self.entries:
            batches[self.asks[entry.candidate_id].generation].append(entry)
        evaluated: dict[int, Row] = {}
        kept: tuple[Row, ...] = ()  # all that the next front can depend on
        standing: dict[int, Entry] = {}  # candidate id -> the evaluation that holds
        spent, done, parked, proxied = _spent((), ()), 0, False, False
        for index, batch in batches.items():
            complete, following = len(batch) == len(asked[index]), asked.get(index + 1)
            parked |= any(entry.parked for entry in batch)
            proxied |= any(entry.status is Status.PARTIAL for entry in batch)
            closed = complete and (following is not None or not parked)
            if not batch or not (closed or (self.finished and not running)):
                return
            start, end = done, following[0].seq if following else math.inf
            while done < len(self.later) and self.later[done].seq < end:
                done += 1
            later = self.later[start:done]
            rows = rows_of(holding(batch, later), self.asks, self.held_out)
            evaluated |= {row.ask.id: row for row in rows}
            spent = {key: value + spent[key] for key, value in _spent(batch, later).items()}
            front = front_of(list({row.ask.id: row for row in (*kept, *rows)}.values()), self.objectives)
            kept = (*front.parents, *front.baselines, *front.members)
            whole = replace(front, evaluated=tuple(row for _, row in sorted(evaluated.items())))
            last = max(entry.time for entry in (*batch, *later))
            standing |= {entry.candidate_id: entry for entry in (*batch, *later)}
            metrics = {
                "front/hypervolume": front.hypervolume,
                "front/size": float(len(front.members)),
                **_best(front),
                **_of_batch([standing[entry.candidate_id] for entry in batch]),
                **(_of_proxy(list(standing.values()), self.objectives) if proxied else {}),
                **_pace(batch),
                **{f"budget/{key}": value for key, value in spent.items()},
            }
            yield Generation(index, last, closed, whole, metrics)


def _best(front: Front) -> dict[str, float]:
    """The two ends that people ask for, and the compromise."""
    if not front.members or not front.parents:
        return {}
    knee, scores = front.pick("knee").search.summary or {}, [row.search.summary or {} for row in front.members]
    goal = max((row.search.summary or {})["accuracy"] for row in front.parents) - TOLERANCE
    as_good = [score["tokens_mean"] for score in scores if score["accuracy"] >= goal]
    return {
        "best/accuracy": max(score["accuracy"] for score in scores),
        **({"best/tokens": min(as_good)} if as_good else {}),
        "knee/accuracy": knee["accuracy"],
        "knee/tokens": knee["tokens_mean"],
    }


def _of_batch(batch: Sequence[Entry]) -> dict[str, float]:
    """Means over all that were measured; the extremes over the feasible, else a broken model has the fewest tokens."""
    measured = [entry.summary for entry in batch if entry.summary and entry.measured]
    feasible = [entry.summary for entry in batch if entry.summary and entry.feasible]
    found = {"gen/failed": float(sum(entry.status is Status.FAILED for entry in batch))}
    if judged := [entry for entry in batch if entry.status is not Status.PARTIAL or entry.parked]:
        n_feasible = sum(entry.status is not Status.FAILED and not entry.violations for entry in judged)
        found["gen/feasible_share"] = n_feasible / len(judged)
    if measured:
        found["gen/accuracy_mean"] = sum(s["accuracy"] for s in measured) / len(measured)
        found["gen/tokens_mean"] = sum(s["tokens_mean"] for s in measured) / len(measured)
    if feasible:
        found["gen/accuracy_max"] = max(s["accuracy"] for s in feasible)
        found["gen/tokens_min"] = min(s["tokens_mean"] for s in feasible)
    return found


def _of_proxy(standing: Sequence[Entry], objectives: Sequence[str]) -> dict[str, float]:
    """Of all so far that have not been asked everything, those that go on later no longer among them.

    Of parked ones the means that are estimated.
    """
    stopped = [entry for entry in standing if entry.status is Status.PARTIAL]
    parked = [entry for entry in stopped if entry.parked]
    n_collapsed = sum(entry.collapsed for entry in stopped)
    estimates = [entry.losses for entry in parked if entry.losses is not None]
    means = {
        f"proxy/{name}_mean": sum(losses) / len(estimates)
        for name, losses in zip(objectives, zip(*estimates, strict=True), strict=False)
    }
    return {
        "proxy/collapsed": float(n_collapsed),
        "proxy/parked": float(len(parked)),
        "proxy/stopped": float(len(stopped) - n_collapsed - len(parked)),
        "proxy/tokens_saved": float(sum(entry.n_saved for entry in stopped)),
        **means,
    }


def _pace(batch: Sequence[Entry]) -> dict[str, float]:
    """Seconds by phase, a candidate's mean, and candidates an hour."""
    found = {}
    for phase in ("write_seconds", "generate_seconds"):
        seconds = [float(entry.detail[phase]) for entry in batch if phase in entry.detail]
        if seconds:
            found[f"time/{phase}"] = sum(seconds) / len(seconds)
    total = sum(entry.seconds for entry in batch)
    return {**found, "time/candidates_per_hour": 3600.0 * len(batch) / total} if total else found


def _spent(entries: Sequence[Entry], later: Sequence[Entry]) -> dict[str, float]:
    return {
        "candidates": float(len(entries)),
        "tokens": float(sum(entry.n_tokens for entry in (*entries, *later))),
        "hours": sum(entry.seconds for entry in (*entries, *later)) / 3600.0,
    }
