"""Replays over seeds, and the figures that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from recording import OBJECTIVES, Floats, Pool, Recorded
from ways import Outcome, clock

from evo.pareto import Scale


class Study:
    """All replays of one recording."""

    def __init__(self, recorded: Recorded, seeds: Iterable[int]) -> None:
        self._recorded, self._seeds = recorded, list(seeds)

    def replay(
        self, way: Callable[[Pool, Floats, Floats, int], Outcome], *, line_points: int, n: int | None = None
    ) -> dict[str, Any]:
        """One way of evaluating over all seeds.

        Args:
            way: (pool, references, box, seed) -> Outcome.
            line_points: among the references.
            n: problems of the split, drawn by lot; None: all that were recorded.
        """
        return summary([self._one(way, seed, line_points, n) for seed in self._seeds])

    def ceiling(self, n: int | None = None) -> dict[str, Any]:
        """See the function of that name."""
        found = []
        for seed in self._seeds:
            pool, parents = self._on(seed, self._recorded.parents.losses, n)
            found.append(ceiling(pool, parents, seed))
        return summary(found)

    def _one(
        self, way: Callable[[Pool, Floats, Floats, int], Outcome], seed: int, line_points: int, n: int | None
    ) -> dict[str, float]:
        pool, references = self._on(seed, self._recorded.references(line_points), n)
        parents = references[: len(self._recorded.parents.losses)]
        scale = Scale.of_parents(OBJECTIVES, parents.mean(axis=1))
        return judge(way(pool, references, scale.reference, seed), pool, parents, scale)

    def _on(self, seed: int, references: Floats, n: int | None) -> tuple[Pool, Floats]:
        pool = self._recorded.pool(seed)
        n_problems = references.shape[1]
        problems = np.random.default_rng(1000 + seed).permutation(n_problems)[: n or n_problems]
        return pool.take(np.arange(len(pool.losses)), problems), references[:, problems]


def judge(outcome: Outcome, pool: Pool, parents: Floats, scale: Scale) -> dict[str, float]:
    """The figures that the issue asks for."""
    full = pool.losses.mean(axis=1)
    live = (1 - full[:, 0] > (1 - parents[:, :, 0].mean(axis=1)).min() - 0.1) & (pool.truncated < 0.1)
    all_tokens, parent_tokens = pool.losses[:, :, 1].sum(axis=1), parents[:, :, 1].sum()
    best = scale.hypervolume(np.concatenate([full, parents.mean(axis=1)]))
    seconds = clock(pool)
    all_seconds = sum(seconds(losses[:, 1]) for losses in (*pool.losses, *parents))
    error = outcome.estimates[live] - full[live]
    return {
        "tokens_fraction": (outcome.tokens.sum() + outcome.extra_tokens) / (all_tokens.sum() + parent_tokens),
        "tokens_fraction_live": (outcome.tokens[live].sum() + outcome.extra_tokens)
        / (all_tokens[live].sum() + parent_tokens),
        "hypervolume_regret": 1.0 - scale.hypervolume(outcome.selected) / best,
        "spearman_accuracy": spearman(outcome.estimates[live, 0], full[live, 0]),
        "spearman_tokens": spearman(outcome.estimates[live, 1], full[live, 1]),
        "bias_accuracy": -float(error[:, 0].mean()),
        "bias_tokens": float(error[:, 1].mean()),
        "seconds_fraction": outcome.seconds / all_seconds,
        "n_candidates": float(len(full)),
        "n_live": float(live.sum()),
        **dict(outcome.notes),
    }


def ceiling(pool: Pool, parents: Floats, seed: int) -> dict[str, float]:
    """Spearman between a random half of the problems and the other half, and between it and the whole."""
    full = pool.losses.mean(axis=1)
    live = (1 - full[:, 0] > (1 - parents[:, :, 0].mean(axis=1)).min() - 0.1) & (pool.truncated < 0.1)
    shuffled = pool.losses[live][:, np.random.default_rng(seed).permutation(pool.losses.shape[1])]
    half, other = (part.mean(axis=1) for part in np.array_split(shuffled, 2, axis=1))
    return {
        f"{against}_{name}": spearman(half[:, m], to[:, m])
        for against, to in (("half", other), ("whole", full[live]))
        for m, name in enumerate(("accuracy", "tokens"))
    }


def spearman(a: Floats, b: Floats) -> float:
    """Correlation of ranks, ties sharing their mean rank; equal up to 1e-9 counts as a tie."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Floats) -> Floats:
    _, index, count = np.unique(values.round(9), return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[index]


def summary(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean and 95% interval over seeds of every figure."""
    found = {}
    for key in rows[0]:
        values = np.array([row[key] for row in rows])
        found[key] = float(values.mean())
        found[f"{key}_interval"] = [float(q) for q in np.quantile(values, [0.025, 0.975])]
    return found
