"""Ways of evaluating a pool of candidates, replayed: the proxy, the best it could be, and its two rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from recording import OBJECTIVES, Floats, Pool
from replay import Replay, State, beats_all, front

from evo.pareto import nondominated
from fitness.proxy.irt import ItemResponse
from fitness.proxy.kriging import Kriging
from fitness.proxy.order import choose


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

    Fitted to timed blocks of 16 to 1,024 problems.
    """
    longest, tokens, seconds = pool.blocks.T
    weights = 1.0 / seconds  # so that small blocks count as much as large ones
    design = np.column_stack([longest, tokens]) * weights[:, None]
    a, b = np.maximum(np.linalg.lstsq(design, seconds * weights, rcond=None)[0], 0.0)
    return lambda block: float(a * block.max() + b * block.sum())


def proxied(
    pool: Pool,
    references: Floats,
    box: Floats,
    seed: int,
    *,
    chosen: int,
    tolerance: float,
    alpha: float,
    gain: float,
    meanwhile: float,
) -> Outcome:
    """Chosen problems, the race, and parked candidates that go on; before the end if they promise `meanwhile`."""
    replay = Replay(
        pool, references, box, seed,
        chosen=chosen, tolerance=tolerance, alpha=alpha, parks=gain > 0, seconds=clock(pool),
    )  # fmt: skip
    of_references, of_all = references[:, :, 1].sum(), pool.losses[:, :, 1].sum()
    for i in range(len(pool.losses)):
        replay.propose(i)
        while replay.go_on(max(gain, meanwhile)):
            pass
    before_the_end = replay.tokens_later
    while replay.go_on(gain):
        pass
    errors = (replay.estimates - pool.losses.mean(axis=1)) / np.maximum(replay.deviations, 1e-9)
    n = len(pool.losses)
    return Outcome(
        replay.tokens, of_references, replay.estimates, replay.members.mean(axis=1), replay.seconds_spent,
        (("full_share", replay.share_of(State.FULL)), ("stopped_share", replay.share_of(State.STOPPED)),
         ("wrongly_stopped_share", replay.n_wrong / n), ("decision_seconds", replay.decision_seconds / n),
         ("references_fraction", of_references / of_all), ("going_on_fraction", before_the_end / of_all),
         ("at_the_end_fraction", (replay.tokens_later - before_the_end) / of_all),
         *((f"errors_in_deviations_{name}", float(np.sqrt((errors[:, m] ** 2).mean())))
           for m, name in enumerate(("accuracy", "tokens")))),
    )  # fmt: skip


def oracle(pool: Pool, references: Floats, box: Floats, seed: int, *, chosen: int, tolerance: float) -> Outcome:
    """A race that knows the end: who does not beat every member by the tolerance is stopped at the first look.

    No race that decides as candidates come, with this first look and this tolerance, takes fewer tokens.
    """
    first = choose(references, chosen, seed).problems[:chosen]
    estimator, members = Kriging(references), front(references)
    tokens, estimates = [], []
    for losses in pool.losses:
        if goes_on := beats_all(losses, members, tolerance * box):
            members = front(np.concatenate([members, losses[None]]))
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
