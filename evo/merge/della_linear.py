"""DELLA (arXiv 2406.11617): DARE whose chance to keep an element grows with its magnitude's rank in its row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evo.merge import Measure, Method, Stats
from evo.merge.blocks import blocks
from evo.merge.magprune import N_BUCKETS, UNIT, bucket, magprune
from evo.merge.statistics import BLOCK_ELEMENTS, exact_sum, peak
from evo.merge.task_vectors import DENSITY, EPSILON, LAMBDA, copy_of_sparse, fuse, magnitudes, switch


def della(
    donors: Sequence[Tensor],
    base: Tensor,
    coefficients: Sequence[float],
    *,
    stats: Sequence[Stats],
    noise: Sequence[Tensor],
    density: Sequence[float],
    epsilon: Sequence[float],
    rescale: float,
    normalize: float,
    lambda_: float,
    elect: bool = False,
) -> Tensor:
    """Base + lambda * sum_d w_d m_d tau_d / k_d, m_d ~ Bernoulli(k_d) (the paper's MAGPRUNE).

    The chance to be kept is k = density - epsilon + 2 epsilon r, with r in [0, 1] the rank of |tau| in its row.
    Epsilon is narrowed to min(density, 1 - density), which keeps k in [0, 1] and its mean at the density.

    Ranks of single elements would have to be sorted anew for every candidate. Instead the magnitudes of each
    row are divided by their mean, and ranks are read from one table over the whole tensor: rows are taken to
    differ in scale, not in the shape of their distribution. Elements of one bucket share their mean rank.
    """
    taus = [
        _pruned(donor - base, measured, uniform, rho, min(half_width, rho, 1.0 - rho), bool(rescale))
        for donor, measured, uniform, rho, half_width in zip(donors, stats, noise, density, epsilon, strict=True)
    ]
    return fuse(base, taus, coefficients, elect=elect, normalize=normalize, lambda_=lambda_)


def _pruned(tau: Tensor, stats: Stats, noise: Tensor, density: float, epsilon: float, rescale: bool) -> Tensor:
    assert stats.rows is not None
    if density == 0.0:
        return tau.zero_()
    return magprune(tau, stats.rows, stats.whole, noise, density - epsilon, 2.0 * epsilon, rescale)


def ranks_by_magnitude(donors: Sequence[Tensor], base: Tensor) -> Stats:
    """The mean rank, from 0 to 1, of the magnitudes in each bucket.

    Returns:
        whole: float32 (64,), a bucket being one of 4 intervals an octave of |tau| over its row's mean.
        rows: float32 (R, 1), the inverse of that mean, over 32.
    """
    (donor,) = donors
    magnitude = magnitudes(donor, base)
    sums = exact_sum(lambda block: magnitude(block).double(), base, peak(magnitude, base), by_row=True)
    inverse = torch.where(sums > 0.0, base.shape[1] / UNIT / sums, 0.0).float()[:, None]
    counts = torch.zeros(N_BUCKETS, dtype=torch.int64, device=base.device)
    for block in blocks(base, BLOCK_ELEMENTS):
        counts += torch.bincount(bucket(magnitude(block).mul_(inverse[block[0]])), minlength=N_BUCKETS)
    ranks = counts.cumsum(0).double() - 0.5 * counts
    return Stats((ranks / torch.full_like(ranks, max(1, base.numel()))).float(), inverse)


DELLA_LINEAR = Method(
    della,
    copy_of=copy_of_sparse,
    knobs={
        "density": DENSITY,
        "epsilon": EPSILON,
        "rescale": switch(True),
        "normalize": switch(False),
        "lambda": LAMBDA,
    },
    measure=Measure(ranks_by_magnitude, per_donor=True),
    random=True,
    from_ancestor=True,
)
