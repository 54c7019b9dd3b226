"""Ways of evaluating a pool of candidates, replayed: the proxy, the best it could be, and its two rivals."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from recording import OBJECTIVES, Floats, Pool

from evo.pareto import nondominated
from fitness.proxy.irt import ItemResponse
from fitness.proxy.kriging import Kriging
from fitness.proxy.order import choose
from fitness.proxy.racing import Race, looks


@dataclass(frozen=True)
class Outcome:
    """What a way of evaluating made of a pool."""

    tokens: Floats
    """That each candidate cost, (N,)."""
    extra_tokens: float
    """References and confirmations."""
    estimates: Floats
    """Last estimates before the full split, (N, 2)."""
    selected: Floats
    """Mean losses on the full split of those that make up its front, (K, 2)."""
    seconds: float = 0.0
    """Estimated time to generate, references included."""
    notes: tuple[tuple[str, float], ...] = ()


def clock(pool: Pool) -> Callable[[Floats], float]:
    """Seconds of a block from its tokens, (n,): a step for the longest answer, and a share for each token.

    Fitted to the recorded evaluations, of one batch each.
    """
    tokens = pool.losses[:, :, 1]
    design = np.column_stack([tokens.max(axis=1), tokens.sum(axis=1)])
    a, b = np.maximum(np.linalg.lstsq(design, pool.seconds, rcond=None)[0], 0.0)
    return lambda block: float(a * block.max() + b * block.sum())


def proxied(
    pool: Pool, references: Floats, box: Floats, seed: int, *, chosen: int, tolerance: float, alpha: float
) -> Outcome:
    """Chosen problems and the race; see fitness.proxy."""
    n = references.shape[1]
    order = choose(references, chosen, seed)
    floor = np.stack([np.zeros(n), references[:, :, 1].min(axis=0)], axis=1)
    race, estimator = Race(order, tolerance * box, floor, alpha), Kriging(references)
    ends, seconds = looks(chosen or 16, n), clock(pool)
    members = _front(references)
    tokens, estimates, spent, n_full, n_false = [], [], 0.0, 0, 0
    decide = 0.0
    for losses in pool.losses:
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            asked = order.problems[:end]
            spent += seconds(losses[order.problems[start:end], 1])
            if end == n:
                members, n_full = _front(np.concatenate([members, losses[None]])), n_full + 1
                break
            before = time.perf_counter()
            beaten = race.beaten_by(losses[asked], members)
            estimate = estimator.estimate(asked, losses[asked])
            decide += time.perf_counter() - before
            if beaten is not None:
                better = losses.mean(axis=0) < members.mean(axis=1) - tolerance * box
                n_false += bool(better.any(axis=1).all())
                break
        tokens.append(losses[asked if end < n else slice(None), 1].sum())
        estimates.append(estimate)
    spent += sum(seconds(reference[:, 1]) for reference in references)
    return Outcome(
        np.array(tokens), references[:, :, 1].sum(), np.array(estimates), members.mean(axis=1), spent,
        (("full_share", n_full / len(pool.losses)), ("wrongly_stopped_share", n_false / len(pool.losses)),
         ("decision_seconds", decide / len(pool.losses))),
    )  # fmt: skip


def oracle(pool: Pool, references: Floats, box: Floats, seed: int, *, chosen: int, tolerance: float) -> Outcome:
    """A race that knows the end: who does not beat every member by the tolerance is stopped at the first look.

    No race with this first look, these references and this tolerance can take fewer tokens.
    """
    first = choose(references, chosen, seed).problems[:chosen]
    estimator, members = Kriging(references), _front(references)
    tokens, estimates = [], []
    for losses in pool.losses:
        better = losses.mean(axis=0) < members.mean(axis=1) - tolerance * box
        if goes_on := bool(better.any(axis=1).all()):
            members = _front(np.concatenate([members, losses[None]]))
        tokens.append(losses[slice(None) if goes_on else first, 1].sum())
        estimates.append(estimator.estimate(first, losses[first]))
    return Outcome(np.array(tokens), references[:, :, 1].sum(), np.array(estimates), members.mean(axis=1))


def fixed_subset(
    pool: Pool, references: Floats, problems: NDArray[np.int64], estimate: Callable[[Floats], Floats]
) -> Outcome:
    """Every candidate on the same problems; those that look best are then asked everything, to confirm them."""
    estimates = np.array([estimate(losses[problems]) for losses in pool.losses])
    full = pool.losses.mean(axis=1)
    everything = np.concatenate([references.mean(axis=1), full])
    looks_best = np.flatnonzero(nondominated(np.concatenate([references.mean(axis=1), estimates])))
    confirmed = pool.losses[looks_best[looks_best >= len(references)] - len(references)]
    rest = np.setdiff1d(np.arange(pool.losses.shape[1]), problems)
    extra = references[:, :, 1].sum() + confirmed[:, rest, 1].sum()
    seconds = clock(pool)
    spent = sum(seconds(losses[problems, 1]) for losses in pool.losses)
    spent += sum(seconds(losses[:, 1]) for losses in (*references, *confirmed))
    return Outcome(pool.losses[:, problems, 1].sum(axis=1), extra, estimates, everything[looks_best], spent)


def evo_l2s(pool: Pool, references: Floats, n: int, seed: int) -> Outcome:
    """Evo-L2S (arXiv 2604.06465): the n problems of highest entropy over the references' answers, ties by lot."""
    p = references[:, :, 0].mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.nan_to_num(-p * np.log(p) - (1 - p) * np.log(1 - p))
    problems = np.lexsort((np.random.default_rng(seed).random(len(p)), -entropy))[:n]
    return fixed_subset(pool, references, problems, lambda seen: seen.mean(axis=0))


def merge3(pool: Pool, references: Floats, n: int, seed: int) -> Outcome:
    """MERGE3 (arXiv 2502.10436): n representatives of clusters of items, and gmp-IRT."""
    estimator = ItemResponse(references, 2, OBJECTIVES)
    problems, weights = _representatives(estimator.items, n, np.random.default_rng(seed))
    return fixed_subset(pool, references, problems, lambda seen: estimator.estimate(problems, seen, weights))


def _representatives(
    points: Floats, n: int, rng: np.random.Generator, rounds: int = 20
) -> tuple[NDArray[np.int64], Floats]:
    """K-means; of each cluster the point nearest to its middle, and its share of the points."""
    centers = points[rng.choice(len(points), n, replace=False)]
    for _ in range(rounds):
        distance = ((points[:, None] - centers) ** 2).sum(axis=2)
        nearest = distance.argmin(axis=1)
        centers = np.array(
            [points[nearest == k].mean(axis=0) if (nearest == k).any() else centers[k] for k in range(n)]
        )
    found = [np.flatnonzero(nearest == k) for k in range(n)]
    kept = [k for k in range(n) if len(found[k])]
    problems = np.array([found[k][distance[found[k], k].argmin()] for k in kept])
    return problems, np.array([len(found[k]) for k in kept], float)


def _front(losses: Floats) -> Floats:
    return losses[nondominated(losses.mean(axis=1))]
