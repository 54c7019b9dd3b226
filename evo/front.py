"""The front of a run as a table: what the command prints, the tracker logs and an export picks from.

Membership is decided on the search split alone. Held-out scores are shown beside it, never selected on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evo.ledger import Ask, Entry
from evo.pareto import Scale, knee, nondominated
from evo.types import Origin
from fitness.types import Split


class PickError(ValueError):
    """A pick names no member of the front."""


@dataclass(frozen=True)
class Row:
    """A candidate with its scores."""

    ask: Ask
    search: Entry
    held_out: Entry | None

    @property
    def losses(self) -> tuple[float, ...]:
        """Losses on the search split; only measured candidates become rows."""
        assert self.search.losses is not None
        return self.search.losses

    def __repr__(self) -> str:
        """A line, as in the table that the command prints: genomes would fill pages."""
        scores = self.to_dict(Split.SEARCH)
        return f"{self.ask.id:>5}  {self.ask.name:<12} accuracy {percent(scores)} %, tokens {scores['tokens_mean']:.1f}"

    def to_dict(self, split: Split) -> dict[str, Any]:
        """Plain data for one split; scores are None where it has not been scored there."""
        entry = self.search if split is Split.SEARCH else self.held_out
        scores = (entry.summary if entry else None) or {}
        keys = (
            "accuracy", "accuracy_stderr", "n_problems", "tokens_mean", "tokens_mean_stderr", "tokens_median",
            "tokens_p90", "tokens_correct_mean", "tokens_correct_median", "tokens_correct_p90",
            "think_tokens_mean", "truncated", "repeated_ngrams", "corrections_per_100", "well_formed",
        )  # fmt: skip
        return {
            "id": self.ask.id,
            "name": self.ask.name,
            "origin": str(self.ask.origin),
            "generation": self.ask.generation,
            **{key: scores.get(key) for key in keys},
            "feasible": self.search.feasible,
            "split": str(split),
        }


@dataclass(frozen=True)
class Front:
    """What a run has found so far."""

    members: tuple[Row, ...]
    """Feasible and not dominated on the search split, fewest tokens first. A parent or baseline that no
    candidate beats is a member too."""
    parents: tuple[Row, ...]
    baselines: tuple[Row, ...]
    evaluated: tuple[Row, ...]
    """Every candidate that was measured on the search split, in order."""
    unproven: tuple[Row, ...]
    """Would be members by their scores, but these were taken with compressed donors."""
    scale: Scale | None
    """None until the parents have been evaluated."""
    hypervolume: float
    """Of the members on the search split, as a share of the box of `scale`."""

    def __repr__(self) -> str:
        """The members, a line each."""
        head = f"Pareto front: {len(self.members)} of {len(self.evaluated)} models, hypervolume {self.hypervolume:.4f}"
        return "\n".join([head, *map(repr, self.members)])

    def pick(self, which: str | int) -> Row:
        """A member by "knee", "max-accuracy", "max-tokens=N" (the most accurate within N mean tokens), its
        id or its name. Reads search scores only.

        Raises:
            PickError: if there is no such member.
        """
        which = str(which)
        if not self.members:
            raise PickError("the front is empty: no feasible candidate has been evaluated yet")
        by_accuracy = sorted(self.members, key=lambda row: (-_accuracy(row), _tokens(row)))
        if which == "knee" and self.scale is not None:
            return self.members[knee([row.losses for row in self.members], self.scale)]
        if which == "max-accuracy":
            return by_accuracy[0]
        if which.startswith("max-tokens="):
            return self._within(which.removeprefix("max-tokens="), by_accuracy)
        for row in self.members:
            if which in (str(row.ask.id), row.ask.name):
                return row
        names = ", ".join(f"{row.ask.id} ({row.ask.name})" for row in self.members)
        raise PickError(
            f"no member of the front is called {which!r}: expected knee, max-accuracy, max-tokens=N or one of {names}"
        )

    def to_dict(self, split: Split = Split.SEARCH) -> dict[str, Any]:
        """The lists `front`, `parents` and `baselines` with the scores of one split, and the hypervolume."""
        return {
            "front": [row.to_dict(split) for row in self.members],
            "parents": [row.to_dict(split) for row in self.parents],
            "baselines": [row.to_dict(split) for row in self.baselines],
            "hypervolume": self.hypervolume_on(split),
            "reference": None if self.scale is None else self.scale.reference.tolist(),
        }

    def hypervolume_on(self, split: Split) -> float | None:
        """Hypervolume of the members' scores on a split; None if some have none there."""
        entries = [row.search if split is Split.SEARCH else row.held_out for row in self.members]
        losses = [entry.losses for entry in entries if entry is not None and entry.losses is not None]
        return None if self.scale is None or len(losses) < len(entries) else self.scale.hypervolume(losses)

    def unscored(self, *, every: bool = False) -> list[Row]:
        """Members, parents and baselines (or every measured candidate) without a held-out evaluation."""
        rows = self.evaluated if every else (*self.members, *self.parents, *self.baselines)
        shown = {row.ask.id: row for row in rows}
        return [row for _, row in sorted(shown.items()) if row.held_out is None]

    @staticmethod
    def _within(limit: str, by_accuracy: Sequence[Row]) -> Row:
        try:
            n_tokens = float(limit)
            if math.isnan(n_tokens):
                raise ValueError
        except ValueError:
            raise PickError(f"max-tokens: expected a number, got {limit!r}") from None
        for row in by_accuracy:
            if _tokens(row) <= n_tokens:
                return row
        fewest = min(_tokens(row) for row in by_accuracy)
        raise PickError(
            f"no member of the front stays within {n_tokens:g} mean tokens: the briefest takes {fewest:.1f}"
        )


def rows_of(entries: Iterable[Entry], asks: Sequence[Ask], held_out: Mapping[int, Entry]) -> list[Row]:
    """Rows of the candidates that have scores on all problems.

    Args:
        entries: on the search split, those that hold.
        asks: candidate id -> its ask.
        held_out: candidate id -> its evaluation on the held-out split.
    """
    return [Row(asks[e.candidate_id], e, held_out.get(e.candidate_id)) for e in entries if e.measured]


def front_of(rows: Sequence[Row], objectives: tuple[str, ...]) -> Front:
    """The front of measured candidates."""
    return _assemble(rows, rows, objectives)


def extended(front: Front, row: Row, objectives: tuple[str, ...]) -> Front:
    """The front with one more measured candidate: what was dominated before stays so."""
    return _assemble((*front.evaluated, row), (*front.members, *front.unproven, row), objectives)


def _assemble(evaluated: Sequence[Row], contenders: Sequence[Row], objectives: tuple[str, ...]) -> Front:
    parents = tuple(row for row in evaluated if row.ask.origin is Origin.PARENT)
    scale = Scale.of_parents(objectives, [row.losses for row in parents]) if parents else None
    feasible = [row for row in contenders if row.search.feasible]
    members = _nondominated([row for row in feasible if row.search.exact])
    unproven = [row for row in _nondominated([*members, *feasible]) if not row.search.exact]
    return Front(
        members=tuple(sorted(members, key=lambda row: (_tokens(row), row.ask.id))),
        parents=parents,
        baselines=tuple(row for row in evaluated if row.ask.origin is Origin.BASELINE),
        evaluated=tuple(evaluated),
        unproven=tuple(unproven),
        scale=scale,
        hypervolume=scale.hypervolume([row.losses for row in members]) if scale and members else 0.0,
    )


def spread(rows: Sequence[Row], limit: int) -> list[Row]:
    """At most `limit` rows, evenly over all of them: what a table with little room shows."""
    if len(rows) <= limit:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (limit - 1))] for i in range(limit)]


def percent(scores: Mapping[str, Any]) -> str:
    """Accuracy and its standard error of Row.to_dict(...), as tables write them."""
    return f"{100 * scores['accuracy']:.1f} ± {100 * scores['accuracy_stderr']:.1f}"


def _nondominated(rows: Sequence[Row]) -> list[Row]:
    keep = nondominated([row.losses for row in rows])
    return _without_twins([row for row, kept in zip(rows, keep, strict=True) if kept])


def _without_twins(rows: Sequence[Row]) -> list[Row]:
    """Of candidates with equal losses, the first: an optimizer often proposes one model twice."""
    seen: dict[tuple[float, ...], Row] = {}
    for row in rows:
        seen.setdefault(row.losses, row)
    return list(seen.values())


def _accuracy(row: Row) -> float:
    return float((row.search.summary or {})["accuracy"])


def _tokens(row: Row) -> float:
    return float((row.search.summary or {})["tokens_mean"])
