"""What the task-vector methods share: sparsified task vectors, the election of signs, and their weighted sum.

    result = base + lambda * sum_d w_d sparse(tau_d) [/ sum of the weights],   tau_d = donor_d - base

Weights w are the coefficients. Comparisons are written as arithmetic (`hardshrink`, `clamp`, `lt_` in floats):
torch takes ten times longer for boolean masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from torch import Tensor

from evo.merge import Knob, Measure, Stats
from evo.merge.blocks import Block
from evo.merge.statistics import order_statistics

GRID = 128
"""Searched densities are multiples of 1 / GRID: the thresholds of all of them are measured at once."""

DENSITY = Knob(1.0, 0.0, 1.0, step=1.0 / GRID, per_donor=True)
"""Share of a task vector's elements that is kept."""
GAMMA = Knob(0.01, 0.0, 1.0, step=1.0 / 1024, per_donor=True)
"""Share of the largest elements that is dropped."""
EPSILON = Knob(0.15, 0.0, 0.5, per_donor=True)
"""How far the probability of being kept may lie from the density."""
LAMBDA = Knob(1.0, 0.0, 10.0)
"""Factor of the merged task vector."""
_TINY = 2.0**-100  # not to be taken for 0 by float32


def switch(on: bool) -> Knob:
    """A knob that is 0 or 1."""
    return Knob(float(on), 0.0, 1.0, step=1.0)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i * t_i, in this order."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += tensor * weight
    return total


def fuse(
    base: Tensor, taus: Sequence[Tensor], weights: Sequence[float], *, elect: bool, normalize: float, lambda_: float
) -> Tensor:
    """Add the weighted task vectors to the base.

    Args:
        base: shape (r, c).
        taus: D task vectors, each (r, c). They are overwritten.
        weights: D numbers.
        elect: whether donors that disagree with an element's elected sign are left out of it.
        normalize: whether to divide by the sum of the weights (that take part).
        lambda_: factor of the result.
    """
    if elect:
        merged = elected_sum([tau.mul_(w) for tau, w in zip(taus, weights, strict=True)], weights, bool(normalize))
    else:
        merged = weighted_sum(taus, weights)
        total = sum(weights)
        lambda_ *= 1.0 / total if normalize and abs(total) >= 1e-8 else 1.0
    if lambda_ != 1.0:
        merged *= lambda_
    return merged.add_(base)


def elected_sum(weighted: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """The disjoint merge of TIES (arXiv 2306.01708): per element the sign with the larger weighted
    mass wins, plus at a draw, and only the donors of that sign are summed (or averaged).

    Args:
        weighted: D task vectors times their weights. They are overwritten.
        weights: D numbers.
        normalize: whether to divide by the sum of the weights that take part.
    """
    sign = elected_sign(weighted)
    agreeing = [x.mul_(sign).clamp_min_(0.0) for x in weighted]
    merged = total_of(agreeing)
    if normalize:
        taking_part = total_of([x.gt_(0.0).mul_(w) for x, w in zip(agreeing, weights, strict=True)])
        merged /= at_least_something(taking_part, weights)
    return merged.mul_(sign)


def elected_sign(tensors: Sequence[Tensor]) -> Tensor:
    """1 where the sum of the tensors is at least 0, else -1; -1 where all are -0, too, and nothing is left to sum."""
    total = total_of(tensors)
    return total.clone().fill_(1.0).copysign_(total)


def total_of(tensors: Sequence[Tensor]) -> Tensor:
    """The sum, in this order, in a tensor of its own."""
    total = tensors[0] + tensors[1] if len(tensors) > 1 else tensors[0].clone()
    for tensor in tensors[2:]:
        total += tensor
    return total


def at_least_something(total: Tensor, weights: Sequence[float]) -> Tensor:
    """Sums of weights to divide by, zeros replaced, in place: nobody takes part there, and 0 is what is divided.

    Args:
        total: sums of some of the weights.
        weights: of which any may be 0.
    """
    smallest = min((w for w in weights if w != 0.0), default=1.0)
    if smallest > _TINY:  # then no sum but 0 is below it
        return total.clamp_min_(smallest)
    return total.add_(total.clone().eq_(0.0))


def copy_of_sparse(
    coefficients: Sequence[float], *, density: Sequence[float], normalize: float, lambda_: float, **_: object
) -> int | None:
    """copy_of for base + lambda * sum_d w_d sparse(tau_d)."""
    active = [d for d, coefficient in enumerate(coefficients) if coefficient != 0.0]
    if lambda_ == 0.0 or all(density[d] == 0.0 for d in active):
        return 0
    if len(active) > 1 or density[active[0]] < 1.0:
        return None
    (weight,) = (coefficients[d] for d in active)
    gain = lambda_ * (1.0 if normalize and abs(weight) >= 1e-8 else weight)
    return active[0] + 1 if gain == 1.0 else None


def keep_from(tau: Tensor, smallest: float) -> Tensor:
    """The elements of at least this magnitude, zero elsewhere."""
    return tau.hardshrink(float(np.nextafter(np.float32(smallest), np.float32(-1.0))))


def keep_within(tau: Tensor, smallest: float, largest: float) -> Tensor:
    """The elements with a magnitude from smallest to largest, zero elsewhere."""
    return keep_from(tau, smallest) - tau.hardshrink(largest)


def magnitudes(donor: Tensor, base: Tensor) -> Callable[[Block], Tensor]:
    """|tau| of a block, in float32 exactly as a merge computes tau."""
    return lambda block: (donor[block].float() - base[block].float()).abs_()


def magnitude_ranges(donors: Sequence[Tensor], base: Tensor, *, density: float, gamma: float = 0.0) -> Stats:
    """Which magnitudes to keep so that a share `density` is left of a donor's task vector, after the largest
    share `gamma` has been dropped.

    Returns:
        whole: float32 (n, 2), rows (smallest, largest) for every density of the grid if this one lies on it,
        else for this one only; see `range_at`. With equal magnitudes at an edge all of them are kept.
    """
    (donor,) = donors
    n, densities = base.numel(), _densities(density)
    ends = [_kept_ranks(n, rho, gamma) for rho in densities]
    ranks = sorted({rank for end in ends if end for rank in end})
    found = dict(zip(ranks, order_statistics(magnitudes(donor, base), base, ranks) if ranks else [], strict=True))
    table = [(found[end[0]], found[end[1]]) if end else (math.inf, math.inf) for end in ends]
    if densities[-1] >= 1.0:
        table[-1] = (0.0, math.inf)
    return Stats(np.array(table, np.float32))


def range_at(stats: Stats, density: float) -> tuple[float, float]:
    """The smallest and the largest magnitude to keep at a density."""
    smallest, largest = stats.whole[int(density * GRID) if _on_grid(density) else 0].tolist()
    return smallest, largest


def _kept_ranks(n: int, density: float, gamma: float) -> tuple[int, int] | None:
    """Ranks (from 0, the smallest) of the first and the last element that is kept, or None."""
    n_kept = max(1, int(density * n)) if density > 0.0 and n else 0
    if not n_kept:
        return None
    first = max(0, n - n_kept - int(gamma * n))  # outliers stay where the density could not be met without them
    return first, first + n_kept - 1


def _on_grid(density: float) -> bool:
    return (density * GRID).is_integer()


def _densities(density: float) -> list[float]:
    return [i / GRID for i in range(GRID + 1)] if _on_grid(density) else [density]


def _measured_alike(*, density: float, **others: float) -> Hashable:
    return (None if _on_grid(density) else density, *others.values())


TOP = Measure(magnitude_ranges, ("density",), per_donor=True, key=_measured_alike)
TOP_WITHOUT_OUTLIERS = Measure(magnitude_ranges, ("density", "gamma"), per_donor=True, key=_measured_alike)
